from __future__ import annotations

import importlib
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView
from dovetail.types import ConfigError

pytestmark = pytest.mark.usefixtures("aliases_on")


def _module(family: str = "slime") -> Any:
    return importlib.import_module(f"{family}.utils.eval_config")


def _config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "eval": {
                "eval_prompt_data": ["a", "a.jsonl"],
                "eval_temperature": 0.5,
                "eval_sets": {
                    "b": {"path": "b.jsonl", "rm_type": "f1", "metadata": {"level": 2}, "top_k": 7}
                },
            },
            "rollout": {"rollout_max_response_len": 33, "rollout_stop": ["END"]},
            "data": {"label_key": "gold"},
        }
    )


def test_args_have_the_run_s_sets_with_everything_inherited() -> None:
    args = pickle.loads(pickle.dumps(ArgsView(_config())))
    a, b = args.eval_datasets
    assert isinstance(a, _module("vime").EvalDatasetConfig)
    assert (a.name, a.path, a.label_key, a.temperature) == ("a", "a.jsonl", "gold", 0.5)
    assert (a.max_response_len, a.stop, a.n_samples_per_eval_prompt) == (33, ["END"], 1)
    assert b.top_k == 7 and b.inject_metadata({"level": 1, "id": 3}) == {
        "level": 2,
        "id": 3,
        "rm_type": "f1",
    }
    assert a.inject_metadata(None) == {} and a.cache_key != b.cache_key
    assert ArgsView(RunConfig()).eval_datasets == []


def test_sets_of_a_file_take_what_they_leave_out_from_defaults_and_then_from_args() -> None:
    module = _module("miles")
    raw = module.ensure_dataset_list({"x": {"path": "x.jsonl", "prompt_key": "question"}})
    raw += module.ensure_dataset_list([{"name": "y", "path": "y.jsonl", "temperature": 0.0}])
    args = SimpleNamespace(eval_top_p=None, rollout_top_p=0.9, input_key="input", label_key=None)
    x, y = module.build_eval_dataset_configs(args, raw, {"temperature": 0.7, "max_new_tokens": 5})
    assert (x.input_key, x.temperature, x.top_p, x.max_response_len) == ("question", 0.7, 0.9, 5)
    assert (y.input_key, y.temperature) == ("input", 0.0)
    assert module.pick_from_args(args, ("eval_top_p", "rollout_top_p")) == 0.9


@pytest.mark.parametrize(
    ("raw", "defaults", "said"),
    [
        ([{"name": "x", "path": "x", "temprature": 1}], {}, "did you mean temperature"),
        ([{"name": "x", "path": "x"}], {"topp": 1}, "did you mean top_p"),
        ([{"name": "x"}], {}, "needs a name and a path"),
    ],
)
def test_a_wrong_set_is_refused(raw: list[dict], defaults: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _module().build_eval_dataset_configs(SimpleNamespace(), raw, defaults)


@pytest.mark.parametrize("config", [[{"path": "x"}], "x"])
def test_what_is_no_list_of_named_sets_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError):
        _module().ensure_dataset_list(config)
