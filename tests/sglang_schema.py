"""What sglang 0.5.23 takes: facts out of its wheel, written down as tables.

`/generate`: GenerateReqInput and SamplingParams (srt/managers/io_struct.py,
srt/sampling/sampling_params.py), gated by api/v1/api_types.py. Control routes: the *ReqInput
classes of io_struct.py and the routes of srt/entrypoints/http_server.py. Fields of servers that
work together (prefill and decode, data parallel) and of media are left out: nothing here sends
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A JSON type as it is called in messages, and whether a value has it."""

    name: str
    types: tuple[type, ...]
    of: tuple[type, ...] = ()
    """Of a list: its items. Of an object: its values."""
    optional: bool = True
    """Whether null stands for the default."""
    choices: tuple[str, ...] = ()

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) and bool not in self.types:
            return False
        if not isinstance(value, self.types) or (self.choices and value not in self.choices):
            return False
        items = value.values() if isinstance(value, dict) else value
        return not self.of or all(
            isinstance(item, self.of) and (not isinstance(item, bool) or bool in self.of)
            for item in items
        )


TEXT = Kind("a string", (str,))
TEXT_NEEDED = Kind("a string", (str,), optional=False)
FLAG = Kind("true or false", (bool,))
FLAG_NEEDED = Kind("true or false", (bool,), optional=False)
WHOLE = Kind("a whole number", (int,))
WHOLE_NEEDED = Kind("a whole number", (int,), optional=False)
NUMBER = Kind("a number", (int, float))
TEXTS = Kind("a list of strings", (list,), (str,))
TEXTS_NEEDED = Kind("a list of strings", (list,), (str,), optional=False)
TEXT_OR_TEXTS = Kind("a string or a list of strings", (str, list), (str,))
IDS = Kind("a list of token ids", (list,), (int,))
LISTS = Kind("a list of lists", (list,), (list,), optional=False)
TABLE = Kind("an object", (dict,))
NUMBERS_BY_TEXT = Kind("an object of numbers", (dict,), (int, float))
SELECTOR = Kind("target, draft or all", (str,), choices=("target", "draft", "all"), optional=False)

SAMPLING = {
    "max_new_tokens": WHOLE,
    "stop": TEXT_OR_TEXTS,
    "stop_token_ids": IDS,
    "stop_regex": TEXT_OR_TEXTS,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": WHOLE,
    "min_p": NUMBER,
    "frequency_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "min_new_tokens": WHOLE,
    "n": WHOLE,
    "beam_width": WHOLE,
    "json_schema": TEXT,
    "regex": TEXT,
    "ebnf": TEXT,
    "structural_tag": TEXT,
    "ignore_eos": FLAG,
    "skip_special_tokens": FLAG,
    "spaces_between_special_tokens": FLAG,
    "no_stop_trim": FLAG,
    "stream_interval": WHOLE,
    "logit_bias": NUMBERS_BY_TEXT,
    "sampling_seed": WHOLE,
    "custom_params": TABLE,
}
"""Unknown names are refused."""
MOST_STOPS = 32
SEED_END = 2**63

GENERATE = {
    "rid": TEXT,
    "session_id": TEXT,
    "text": TEXT,
    "input_ids": IDS,
    "sampling_params": TABLE,
    "return_logprob": FLAG,
    "logprob_start_len": WHOLE,
    "top_logprobs_num": WHOLE,
    "token_ids_logprob": IDS,
    "return_text_in_logprobs": FLAG,
    "stream": FLAG,
    "log_metrics": FLAG,
    "return_routed_experts": FLAG,
    "routed_experts_start_len": WHOLE,
    "lora_path": TEXT,
    "routing_key": TEXT,
    "priority": WHOLE,
    "extra_key": TEXT,
    "cache_salt": TEXT,
    "return_prompt_token_ids": FLAG,
}
"""For one prompt. SGLang passes over unknown names; nothing here may rely on that."""

CONTROL: Mapping[str, tuple[tuple[str, ...], dict[str, Kind], tuple[str, ...]]] = {
    "/health": (("GET",), {}, ()),
    "/health_generate": (("GET",), {}, ()),
    "/model_info": (("GET",), {}, ()),
    "/flush_cache": (("GET", "POST"), {}, ()),
    "/abort_request": (
        ("POST",),
        {"rid": TEXT, "abort_all": FLAG_NEEDED, "abort_message": TEXT},
        (),
    ),
    "/pause_generation": (
        ("POST",),
        {"mode": Kind("a mode", (str,), choices=("abort", "retract", "in_place"), optional=False)},
        (),
    ),
    "/continue_generation": (("POST",), {"torch_empty_cache": FLAG_NEEDED}, ()),
    "/update_weights_from_disk": (
        ("POST",),
        {
            "model_path": TEXT_NEEDED,
            "load_format": TEXT,
            "abort_all_requests": FLAG_NEEDED,
            "weight_version": TEXT,
            "is_async": FLAG_NEEDED,
            "torch_empty_cache": FLAG_NEEDED,
            "keep_pause": FLAG_NEEDED,
            "recapture_cuda_graph": FLAG_NEEDED,
            "token_step": WHOLE_NEEDED,
            "flush_cache": FLAG_NEEDED,
            "manifest": TABLE,
        },
        ("model_path",),
    ),
    "/update_weight_version": (
        ("POST",),
        {"new_version": TEXT_NEEDED, "abort_all_requests": FLAG_NEEDED},
        ("new_version",),
    ),
    "/init_weights_update_group": (
        ("POST",),
        {
            "master_address": TEXT_NEEDED,
            "master_port": WHOLE_NEEDED,
            "rank_offset": WHOLE_NEEDED,
            "world_size": WHOLE_NEEDED,
            "group_name": TEXT_NEEDED,
            "backend": TEXT_NEEDED,
        },
        ("master_address", "master_port", "rank_offset", "world_size"),
    ),
    "/destroy_weights_update_group": (("POST",), {"group_name": TEXT_NEEDED}, ()),
    "/update_weights_from_distributed": (
        ("POST",),
        {
            "names": TEXTS_NEEDED,
            "dtypes": TEXTS_NEEDED,
            "shapes": LISTS,
            "group_name": TEXT_NEEDED,
            "flush_cache": FLAG_NEEDED,
            "abort_all_requests": FLAG_NEEDED,
            "weight_version": TEXT,
            "load_format": TEXT,
            "selector": SELECTOR,
            "torch_empty_cache": FLAG_NEEDED,
        },
        ("names", "dtypes", "shapes"),
    ),
    "/release_memory_occupation": (("GET", "POST"), {"tags": TEXTS}, ()),
    "/resume_memory_occupation": (("GET", "POST"), {"tags": TEXTS}, ()),
    "/weights_checker": (
        ("GET", "POST"),
        {
            "action": TEXT_NEEDED,
            "allow_quant_error": FLAG_NEEDED,
            "skip_tensor_list": TEXTS,
            "selector": SELECTOR,
        },
        (),
    ),
}
"""Path -> methods, fields, fields that must be there. All bodies may also have `rid` and
`http_worker_ipc`."""


def problems_of_generate(body: Any) -> list[str]:
    """What SGLang would refuse, or pass over, in a request for one prompt."""
    if not isinstance(body, dict):
        return [f"the body is {type(body).__name__}, no object"]
    problems = _problems(body, GENERATE, "")
    if (body.get("text") is None) == (body.get("input_ids") is None):
        problems.append("exactly one of text and input_ids must be there")
    sampling = body.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        return problems
    problems += _problems(sampling, SAMPLING, "sampling_params.")
    return problems or _out_of_bounds(sampling)


def problems_of_control(path: str, method: str, body: Any) -> list[str]:
    """As `problems_of_generate`, for the other routes."""
    methods, fields, needed = CONTROL[path]
    problems = [] if method in methods else [f"method {method}, expected {methods}"]
    if body is None and method == "POST" and fields:
        # FastAPI refuses a request without a body where a model of it is declared.
        return [*problems, "no body"]
    body = body or {}
    problems += [f"{name} is missing" for name in needed if name not in body]
    return problems + _problems(body, fields, "")


def _problems(body: Mapping[str, Any], fields: Mapping[str, Kind], path: str) -> list[str]:
    problems = [f"{path}{name} is no field of SGLang" for name in body if name not in fields]
    return problems + [
        f"{path}{name} is {value!r}, expected {fields[name].name}"
        for name, value in body.items()
        if name in fields and not fields[name].takes(value)
    ]


def _out_of_bounds(sampling: Mapping[str, Any]) -> list[str]:
    """SamplingParams.verify."""

    def value(name: str, default: float) -> Any:
        found = sampling.get(name)
        return default if found is None else found

    most, seed = value("max_new_tokens", 128), value("sampling_seed", 0)
    stops = sampling.get("stop") or []
    bounds = {
        "temperature": value("temperature", 1.0) >= 0,
        "top_p": 0 < value("top_p", 1.0) <= 1,
        "min_p": 0 <= value("min_p", 0.0) <= 1,
        "top_k": value("top_k", -1) == -1 or value("top_k", -1) >= 1,
        "frequency_penalty": -2 <= value("frequency_penalty", 0.0) <= 2,
        "presence_penalty": -2 <= value("presence_penalty", 0.0) <= 2,
        "repetition_penalty": 0 < value("repetition_penalty", 1.0) <= 2,
        "max_new_tokens": most >= 0,
        "min_new_tokens": 0 <= value("min_new_tokens", 0) <= most,
        "sampling_seed": -SEED_END <= seed < SEED_END,
        "stop": isinstance(stops, str) or len(stops) <= MOST_STOPS,
    }
    return [
        f"sampling_params.{name} is {sampling[name]!r}" for name, good in bounds.items() if not good
    ]
