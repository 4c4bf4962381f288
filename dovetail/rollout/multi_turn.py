"""A generate function for tools: the model calls them in its turns, and reads what they answer.

    prompt -> turn -> tool calls in it? --no--> COMPLETED
               ^          | yes
               |          v
               +--- observations (not trained on), by the chat template

Turned on by `--custom-generate-function-path multi_turn`; the tools are
`--generate-tool-specs-path` (what the template shows the model) and
`--generate-execute-tool-function-path` (who runs them). miles' stock function of this kind, with
its flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dovetail.hooks import BoundHook, bind
from dovetail.types import ConfigError, DataError, GenerateCall, Sample

NAMES = ("multi_turn", "miles.rollout.generate_hub.multi_turn.generate")
"""Paths of a generate function under which this one runs."""
_PLACE = "\x1fturn\x1f"
"""Stands for the model's turn while the template is rendered."""
_HERMES = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call that the model wrote."""

    name: str
    params: dict[str, Any]


def hermes_calls(text: str) -> list[ToolCall]:
    """Calls written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen).

    What is no such object is no call.
    """
    return [call for body in _HERMES.findall(text) if (call := _call_of(body)) is not None]


def json_calls(text: str) -> list[ToolCall]:
    """One call that is the whole turn: `{"name": ..., "parameters": {...}}` (Llama 3)."""
    call = _call_of(text.strip().removeprefix("<|python_tag|>").removesuffix("<|eot_id|>"))
    return [call] if call is not None else []


def _call_of(body: str) -> ToolCall | None:
    try:
        found = json.loads(body)
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    params = found.get("arguments", found.get("parameters", {}))
    return ToolCall(found["name"], params) if isinstance(params, dict) else None


PARSERS: dict[str, Callable[[str], list[ToolCall]]] = {
    "qwen25": hermes_calls,
    "qwen": hermes_calls,
    "hermes": hermes_calls,
    "llama3": json_calls,
}
"""By the names that engines give them."""


async def generate(call: GenerateCall) -> Sample:
    """Turns of the model and of its tools, until it calls none.

    Ends COMPLETED after a turn without a call, TRUNCATED at a length limit or after
    `generate_max_turns` turns, ABORTED when the step is over; an aborted sample goes on where it
    was. What tools answer has loss mask 0. `sample.metadata["turns"]` counts the model's turns.

    Raises:
        ConfigError: no such parser.
        DataError: the prompt is plain text; tools need chat messages.
    """
    sample, parse = call.sample, _parser(str(call.args.generate_tool_call_parser))
    tools = _bound("generate_tool_specs", call.args)
    specs = tools.native() if tools is not None else sample.metadata.get("tools")
    if not sample.response_length and not (isinstance(sample.prompt, str) and specs is None):
        sample.tokens = _prompt_ids(call, specs)
    start = int(sample.metadata.get("turn_start", 0))
    while True:
        sample.status = Sample.Status.PENDING
        await call.default(sample, call.sampling)
        if sample.status is not Sample.Status.COMPLETED:
            return sample
        sample.metadata["turns"] = sample.metadata.get("turns", 0) + 1
        wanted = parse(_text(call, sample.tokens[sample.prompt_length + start :]))
        if not wanted:
            return sample
        if sample.metadata["turns"] >= call.args.generate_max_turns:
            sample.status = Sample.Status.TRUNCATED
            return sample
        answers = [await _answer(call.args, one) for one in wanted]
        observed = _observed(call, specs, answers)
        sample.append_response_tokens(tokens=observed, trainable=False, text=_text(call, observed))
        start = sample.metadata["turn_start"] = sample.response_length
        if call.aborted:
            sample.status = Sample.Status.ABORTED
            return sample


def _parser(name: str) -> Callable[[str], list[ToolCall]]:
    if name not in PARSERS:
        near = get_close_matches(name, PARSERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"--generate-tool-call-parser (TOML: rollout.generate_tool_call_parser) is {name!r}, "
            f"expected one of {', '.join(PARSERS)}{hint}"
        )
    return PARSERS[name]


_BOUND: dict[tuple[str, str], BoundHook] = {}


def _bound(slot: str, args: Any) -> BoundHook | None:
    path = getattr(args, f"{slot}_path")
    if path is None:
        return None
    if (slot, path) not in _BOUND:
        _BOUND[slot, path] = bind(slot, path, args)
    return _BOUND[slot, path]


async def _answer(args: Any, wanted: ToolCall) -> dict[str, str]:
    execute = _bound("generate_execute_tool_function", args)
    if execute is None:
        content = "error: no tools can be run here"
    else:
        content = str(await execute(wanted.name, wanted.params))
    return {"role": "tool", "name": wanted.name, "content": content}


def _prompt_ids(call: GenerateCall, specs: Any) -> list[int]:
    prompt = call.sample.prompt
    if isinstance(prompt, str):
        raise DataError(
            f"sample {call.sample.index}: multi-turn generation needs chat messages as its prompt, "
            "got text, into which no tools can be put; give messages in the input column and drop "
            "--apply-chat-template (TOML: data.apply_chat_template)"
        )
    rendered = _rendered(call, prompt, specs)
    return list(call.tokenizer.encode(rendered, add_special_tokens=False))


def _observed(call: GenerateCall, specs: Any, answers: list[dict[str, str]]) -> list[int]:
    """Ids of what the template puts between the model's turn and its next one."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _PLACE},
        *answers,
    ]
    tail = _rendered(call, messages, specs).rpartition(_PLACE)[2]
    # The model ended its turn itself: what it sampled for that is not written twice.
    ending = _text(call, call.sample.tokens[-1:])
    return list(call.tokenizer.encode(tail.removeprefix(ending), add_special_tokens=False))


def _rendered(call: GenerateCall, messages: Any, specs: Any) -> str:
    return str(
        call.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            tools=specs,
            **call.sample.apply_chat_template_kwargs,
        )
    )


def _text(call: GenerateCall, token_ids: list[int]) -> str:
    return call.tokenizer.decode(token_ids, skip_special_tokens=False)
