"""Turns of model and tools: what is trained on, where it ends, and how it goes on."""

import asyncio
import json

import pytest

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView
from dovetail.rollout.generate import generate as one_turn
from dovetail.rollout.multi_turn import ToolCall, generate, hermes_calls, json_calls
from dovetail.types import (
    ConfigError,
    DataError,
    FinishReason,
    GenerateCall,
    GenerateResult,
    Sample,
    SamplingParams,
)
from tests.unit.rollout.fakes import FakeEngine, FakeTokenizer

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
TOOLS = """
tools = [{"type": "function", "function": {"name": "add"}}]
ASKED = []

async def execute(name, params):
    ASKED.append((name, params))
    return str(params["a"] + params["b"])
"""


class Template(FakeTokenizer):
    """`role:content;` per message, tools in front, `|` ends a turn."""

    def apply_chat_template(self, conversation, tools=None, tokenize=True, **kwargs):
        head = json.dumps([t["function"]["name"] for t in tools or []]) if tools else ""
        body = "".join(f"{m['role']}:{m['content']}|;" for m in conversation)
        text = f"{head}{body}assistant:"
        return self.encode(text) if tokenize else text


class Scripted(FakeEngine):
    """Says one line per request."""

    def __init__(self, *lines, reason=FinishReason.STOP):
        super().__init__()
        self.lines, self.reason = list(lines), reason

    async def generate(self, request):
        self.requests.append(request)
        tokens = [ord(c) for c in self.lines.pop(0)]
        return GenerateResult(
            request.request_id,
            tokens,
            [-0.5] * len(tokens),
            self.reason,
            text="".join(map(chr, tokens)),
            prompt_tokens=len(request.prompt_ids),
        )


@pytest.fixture
def tools(tmp_path):
    file = tmp_path / "my_tools.py"
    file.write_text(TOOLS)
    return file


def call_of(engine, tools, sample=None, **settings):
    args = ArgsView(
        RunConfig.model_validate(
            {
                "rollout": settings,
                "hooks": {
                    "generate_tool_specs_path": f"{tools}:tools",
                    "generate_execute_tool_function_path": f"{tools}:execute",
                },
            }
        )
    )
    tokenizer = Template()

    async def default(one, sampling):
        return await one_turn(engine, tokenizer, one, sampling)

    sample = sample or Sample(index=3, prompt=[{"role": "user", "content": "1+2?"}])
    sampling = SamplingParams(max_new_tokens=1000)
    return GenerateCall(sample, sampling, engine, tokenizer, default, args=args)


def test_the_model_calls_a_tool_reads_its_answer_and_ends(tools):
    engine = Scripted(CALL + "|", "three|")
    sample = asyncio.run(generate(call_of(engine, tools)))
    observed = ";tool:3|;assistant:"
    assert sample.response == CALL + "|" + observed + "three|"
    assert "".join(map(chr, engine.requests[0].prompt_ids)) == '["add"]user:1+2?|;assistant:'
    assert engine.requests[1].prompt_ids == tuple(sample.tokens[: -len("three|")])
    masks = [1] * (len(CALL) + 1) + [0] * len(observed) + [1] * 6
    assert sample.loss_mask == masks
    assert sample.rollout_log_probs == [-0.5 * mask for mask in masks]
    assert sample.status is Sample.Status.COMPLETED and sample.metadata["turns"] == 2


def test_it_is_truncated_after_the_most_turns_and_at_a_length_limit(tools):
    sample = asyncio.run(
        generate(call_of(Scripted(CALL + "|", CALL + "|"), tools, generate_max_turns=2))
    )
    assert sample.status is Sample.Status.TRUNCATED and sample.metadata["turns"] == 2
    sample = asyncio.run(generate(call_of(Scripted("half", reason=FinishReason.LENGTH), tools)))
    assert sample.status is Sample.Status.TRUNCATED and sample.response == "half"


def test_an_aborted_turn_goes_on_and_its_call_is_read_whole(tools):
    call = call_of(Scripted(CALL[:10], reason=FinishReason.ABORT), tools)
    sample = asyncio.run(generate(call))
    assert sample.status is Sample.Status.ABORTED
    engine = Scripted(CALL[10:] + "|", "3|")
    sample = asyncio.run(generate(call_of(engine, tools, sample)))
    assert sample.status is Sample.Status.COMPLETED
    assert sample.response == CALL + "|;tool:3|;assistant:3|"


def test_a_text_prompt_and_an_unknown_parser_are_refused(tools):
    with pytest.raises(DataError, match="chat messages"):
        asyncio.run(generate(call_of(Scripted(), tools, Sample(index=1, prompt="1+2?"))))
    with pytest.raises(ConfigError, match="did you mean 'qwen25'"):
        asyncio.run(generate(call_of(Scripted(), tools, generate_tool_call_parser="qwen26")))


def test_calls_are_read_in_the_forms_of_hermes_and_llama():
    add = ToolCall("add", {"a": 1, "b": 2})
    assert hermes_calls(f"so {CALL} and {CALL}") == [add, add]
    assert hermes_calls("<tool_call>{oops}</tool_call>") == []
    assert hermes_calls('<tool_call>{"arguments": {}}</tool_call>') == []
    assert json_calls('{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>') == [add]
    assert json_calls("3") == []
