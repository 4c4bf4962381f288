"""The command line and environment of a vLLM server."""

import sys
from pathlib import Path

import orjson
import pytest

from dovetail.engines.launch import LaunchSettings
from dovetail.engines.vllm import in_server
from dovetail.engines.vllm.launch import launch, logprobs_mode
from dovetail.types.errors import ConfigError, MissingExtraError


@pytest.fixture
def python(tmp_path):
    """An interpreter that says yes to everything: it has vLLM, as far as anybody asks."""
    file = tmp_path / "python"
    file.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def settings(python, **changes):
    known = {"model_dir": Path("/m"), "port": 4242, "max_context_len": 64, "python": python}
    return LaunchSettings(**{**known, **changes})


def flags(python, **changes):
    """Flags with their values; True for those without."""
    _, _, _, *words = launch(settings(python, **changes)).argv
    found = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
            last = name
        else:
            found[last] = [*found[last], word] if isinstance(found[last], list) else [word]
    return found


def test_the_command_has_what_the_run_knows(python):
    spec = launch(settings(python, dtype="float32", seed=3, max_running=9, memory_gb=0.5))
    assert spec.argv[:3] == [python, "-m", "vllm.entrypoints.openai.api_server"]
    assert spec.ready_path == "/health"
    found = flags(python, dtype="float32", seed=3, max_running=9, memory_gb=0.5)
    assert found["model"] == "/m" and found["host"] == "127.0.0.1" and found["port"] == "4242"
    assert found["max-model-len"] == "64" and found["dtype"] == "float32" and found["seed"] == "3"
    assert found["max-num-seqs"] == "9" and found["kv-cache-memory-bytes"] == "500000000"
    assert found["enforce-eager"] is found["enable-scale-out"] is True
    assert orjson.loads(found["weight-transfer-config"]) == {"backend": in_server.BACKEND}
    assert spec.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert spec.env["TORCHDYNAMO_DISABLE"] == "1"


def test_requests_may_name_any_model_and_have_tools(python):
    assert launch(settings(python)).env["VLLM_SKIP_MODEL_NAME_VALIDATION"] == "1"
    assert flags(python)["enable-auto-tool-choice"] is True
    assert flags(python)["tool-call-parser"] == "hermes"
    own = flags(python, passthrough={"tool_call_parser": "llama3_json"})
    assert own["tool-call-parser"] == "llama3_json"


def test_the_receiver_is_found_where_the_environment_points(python, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    first, rest = launch(settings(python)).env["PYTHONPATH"].split(":")
    module, _, name = in_server.EXTENSION.partition(".")
    source = (Path(first) / f"{module}.py").read_text(encoding="utf-8")
    assert f"class {name}" in source and f'BACKEND = "{in_server.BACKEND}"' in source
    assert rest == "/mine"


@pytest.mark.parametrize(
    ("passthrough", "name", "value"),
    [
        ({"enable_prefix_caching": True}, "enable-prefix-caching", True),
        ({"enable_prefix_caching": False}, "no-enable-prefix-caching", True),
        ({"no_enable_prefix_caching": True}, "no-enable-prefix-caching", True),
        ({"enable_prefix_caching": "true"}, "enable-prefix-caching", True),
        ({"enforce_eager": "false"}, "no-enforce-eager", True),
        ({"gpu_memory_utilization": "0.5"}, "gpu-memory-utilization", "0.5"),
        ({"max_num_seqs": 64}, "max-num-seqs", "64"),
        ({"max_logprobs": "-1"}, "max-logprobs", "-1"),
        ({"allowed_origins": ["a", "b"]}, "allowed-origins", ["a", "b"]),
        ({"speculative_config.method": "ngram"}, "speculative-config.method", "ngram"),
        ({"dtype": "bfloat16"}, "dtype", "bfloat16"),
    ],
)
def test_settings_of_the_user_are_handed_through(python, passthrough, name, value):
    found = flags(python, passthrough=passthrough)
    if isinstance(value, list):
        found[name] = [one for one in found[name] if one is not True]
    assert found[name] == value


def test_a_table_is_json(python):
    config = {"method": "ngram", "num_speculative_tokens": 2}
    found = flags(python, passthrough={"speculative_config": config})
    assert orjson.loads(found["speculative-config"]) == config


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("model", "--hf-checkpoint"),
        ("port", "a free one"),
        ("max_model_len", "--rollout-max-context-len"),
        ("max-model-len", "--rollout-max-context-len"),
        ("seed", "--rollout-seed"),
        ("enable_return_routed_experts", "--use-rollout-routing-replay"),
        ("no_trust_remote_code", "--trust-remote-code"),
        ("logprobs_mode", "--rollout-temperature"),
    ],
)
def test_what_the_run_sets_itself_is_refused_with_the_cure(python, name, cure):
    value = True if name.startswith(("no_", "enable")) else "x"
    with pytest.raises(ConfigError, match="--vllm-") as caught:
        launch(settings(python, passthrough={name: value}))
    assert cure in str(caught.value)


def test_on_a_gpu_vllm_keeps_its_own_choices_and_sleeps_where_the_run_does(python):
    found = flags(python, device="cuda", sleeps=True, return_routed_experts=True)
    assert not {"enforce-eager", "kv-cache-memory-bytes"} & found.keys()
    assert found["enable-sleep-mode"] is found["enable-return-routed-experts"] is True
    assert "TORCHDYNAMO_DISABLE" not in launch(settings(python, device="cuda")).env


def test_compiling_on_a_cpu_is_possible_for_who_asks(python):
    spec = launch(settings(python, passthrough={"enforce_eager": False}))
    assert "--no-enforce-eager" in spec.argv and "TORCHDYNAMO_DISABLE" not in spec.env


def test_experts_are_not_recorded_on_a_cpu(python):
    with pytest.raises(ConfigError, match="on GPUs only"):
        launch(settings(python, return_routed_experts=True))


def test_a_python_without_vllm_is_told_with_the_cure(tmp_path):
    with pytest.raises(MissingExtraError, match="--engine-python"):
        launch(settings(sys.executable))
    with pytest.raises(MissingExtraError, match="can't be run"):
        launch(settings(str(tmp_path / "nothing")))


def test_logprobs_are_those_of_the_temperature():
    assert [logprobs_mode(t) for t in (0.0, 1.0, 0.7)] == [
        "raw_logprobs",
        "raw_logprobs",
        "processed_logprobs",
    ]
