from __future__ import annotations

import json
from typing import Any

from dovetail.compat.agent.parsing import ParsedModelOutput, parse_model_output

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sum",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "number"},
                    "note": {"type": "string"},
                    "more": {"type": "array"},
                },
            },
        },
    }
]


def _calls(parsed: ParsedModelOutput) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in parsed.tool_calls]


def test_text_without_marks_is_left_as_it_is_to_the_last_space() -> None:
    parsed = parse_model_output(" 4 \n", tools=TOOLS, reasoning_parser="qwen3")
    assert parsed == ParsedModelOutput(text=" 4 \n")


def test_calls_as_json() -> None:
    call = json.dumps({"name": "sum", "arguments": {"a": 1}})
    text = f"Let me.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}"
    parsed = parse_model_output(text, tools=TOOLS, tool_parser="qwen25")
    assert parsed.text == "Let me." and _calls(parsed) == [("sum", {"a": 1})] * 2
    assert parsed.tool_calls[0]["id"] != parsed.tool_calls[1]["id"]
    assert parse_model_output(text).tool_calls == []


def test_calls_with_parameters_take_the_declared_types() -> None:
    text = (
        "<tool_call>\n<function=sum>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n0.5\n"
        "</parameter>\n<parameter=note>\n12\nlines\n</parameter>\n<parameter=more>[1]</parameter>\n"
        "<parameter=own>x</parameter></function>\n</tool_call>"
    )
    parsed = parse_model_output(text, tools=TOOLS, tool_parser="qwen3_coder")
    wanted = {"a": 3, "b": 0.5, "note": "12\nlines", "more": [1], "own": "x"}
    assert parsed.text == "" and _calls(parsed) == [("sum", wanted)]


def test_a_call_that_can_not_be_read_stays_in_the_text() -> None:
    for broken in ('{"name": "sum", "arg', '{"arguments": {}}', "[]", "sum(1)"):
        text = f"<tool_call>{broken}</tool_call>"
        parsed = parse_model_output(text, tools=TOOLS)
        assert parsed.ill_formed and parsed.text == text and not parsed.tool_calls


def test_thoughts_are_what_stands_before_their_end() -> None:
    for text in ("<think>\nhm\n</think>\n\n4", "hm</think>4"):
        parsed = parse_model_output(text, reasoning_parser="deepseek-r1")
        assert (parsed.reasoning, parsed.text) == ("hm", "4")
    assert parse_model_output("<think>hm</think>4").text == "<think>hm</think>4"
