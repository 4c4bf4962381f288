"""An agent with a calculator, as one writes it with the `openai` package, and its training.

`solve` knows nothing of training: it would run against any server. `agent` hands it the address of
its own session, and tells the reward what came of it.
"""

from __future__ import annotations

import functools
import json

from openai import AsyncOpenAI

MOST_TURNS = 3
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds the two numbers of the question.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


async def solve(client: AsyncOpenAI, messages: list[dict], **options) -> tuple[str, int]:
    """The agent's loop: ask, run the tools that are called, until there is an answer."""
    question = messages[-1]["content"]
    messages, calls = list(messages), 0
    for _ in range(MOST_TURNS):
        completion = await client.chat.completions.create(
            model="policy", messages=messages, tools=TOOLS, **options
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or "", calls
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            calls += 1
            told = add(question, **json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": told})
    return "", calls


def add(question: str) -> str:
    """The tool: "12+34=" -> "046"."""
    first, _, second = question.rstrip("=").partition("+")
    return f"{int(first) + int(second):03d}"


@functools.cache
def connections() -> AsyncOpenAI:
    """One pool of connections for all agents of the run."""
    return AsyncOpenAI(base_url="http://none", api_key="none", timeout=None, max_retries=2)


async def agent(base_url, prompt, request_kwargs, metadata):
    """One sample (`--custom-agent-function-path`)."""
    client = connections().with_options(base_url=base_url)
    answer, calls = await solve(client, prompt, **request_kwargs)
    return {"answer": answer, "calls": calls}


def reward(sample):
    """0.3 for asking the calculator once, and up to 0.7 for the digits that are right
    (`--custom-rm-path`)."""
    answer, calls = sample.metadata.get("answer", ""), sample.metadata.get("calls", 0)
    right = sum(mine == theirs for mine, theirs in zip(answer, sample.label, strict=False))
    in_form = len(answer) == len(sample.label)
    return 0.3 * (calls == 1) + 0.7 * right / len(sample.label) * in_form
