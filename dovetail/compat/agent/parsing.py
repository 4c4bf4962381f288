"""slime's and miles' names for what takes a model's text apart."""

from __future__ import annotations

from dovetail.router.tool_calls import (
    ParsedModelOutput,
    json_arguments,
    parse_model_output,
    tool_call_dict,
)

__all__ = ["ParsedModelOutput", "json_arguments", "parse_model_output", "tool_call_dict"]
