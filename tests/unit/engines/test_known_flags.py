"""Names of vLLM's and SGLang's settings are known before a server is started."""

import subprocess
from pathlib import Path

import pytest

from dovetail.engines.flags import chosen, written
from dovetail.engines.known_flags import known_flags
from dovetail.types.errors import ConfigError
from tests.integration.vllm_server import vllm_python

ROOT = Path(__file__).parents[3]
VLLM, SGLANG = known_flags("vllm"), known_flags("sglang")


@pytest.mark.parametrize(
    ("known", "wrong", "meant"),
    [
        (VLLM, "max_num_sqs", "--vllm-max-num-seqs"),
        (VLLM, "gpu_memory_utilisation", "--vllm-gpu-memory-utilization"),
        (VLLM, "compilation_confg.level", "--vllm-compilation-config.level"),
        (SGLANG, "mem_fraction_statik", "--sglang-mem-fraction-static"),
        (SGLANG, "atention_backend", "--sglang-attention-backend"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(known, wrong, meant):
    with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
        known.check({wrong: "1"}, known.version)
    with pytest.raises(ConfigError, match=rf"{known.engine}\.{wrong}"):
        known.check({wrong: "1"}, f"{known.version}+cu129")


@pytest.mark.parametrize("installed", ["0.99.1", None])
def test_another_version_may_have_it_which_is_told(installed):
    (told,) = VLLM.check({"max_num_sqs": "1", "max_num_seqs": "1"}, installed)
    assert "--vllm-max-num-sqs" in told and "did you mean --vllm-max-num-seqs?" in told
    assert (installed or "not known") in told


def test_every_wrong_name_has_a_line():
    with pytest.raises(ConfigError) as caught:
        VLLM.check({"max_num_sqs": "1", "zzzzzz": "1"}, VLLM.version)
    first, second = str(caught.value).splitlines()
    assert "max-num-sqs" in first and "no name of its comes near" in second


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor-parallel-size", "2"),
        ("tensor_parallel_size", 2),
        ("tensor_parallel", "2"),
        ("compilation_config.level", "3"),
        ("compilation-config.pass_config.enable_fusion", "true"),
        ("no-enable-prefix-caching", "true"),
        ("enable_prefix_caching", False),
        ("disable_uvicorn_access_log", False),
        ("allowed_origins", ["*"]),
    ],
)
def test_every_way_of_writing_a_setting_of_vllm_is_known(name, value):
    assert VLLM.check(chosen("vllm", {name: value}, {}), VLLM.version) == ()


@pytest.mark.parametrize(
    "name",
    [
        "tp_size",
        "tensor_parallel_size",
        "tp",
        "mem_fraction_static",
        "fp8_gemm_backend",
        "log_level",
    ],
)
def test_settings_of_sglang_and_their_other_names_are_known(name):
    if name == "tp":
        # argparse takes a beginning only where a single name has it.
        assert SGLANG.has(name) == (sum(one.startswith("tp") for one in SGLANG.names) == 1)
    else:
        assert SGLANG.check({name: "1"}, SGLANG.version) == ()
    assert not SGLANG.has("tensor_parallel_size.x")


def test_false_is_the_contrary_only_where_there_is_one():
    assert SGLANG.has_contrary("enable_tf32_matmul")
    assert not SGLANG.has_contrary("disable_cuda_graph")
    assert VLLM.has_contrary("enable_prefix_caching") and VLLM.has_contrary("of_another_version")


def test_a_key_of_a_table_keeps_its_spelling_and_is_one_word():
    (name,) = chosen("vllm", {"compilation-config.cudagraph_mode": "NONE"}, {})
    assert written(name, "NONE", has_no=True) == ["--compilation-config.cudagraph_mode=NONE"]
    assert written("a_b.c_d", True, has_no=True) == ["--a-b.c_d=true"]
    assert written("a_b.c_d", [1, 2], has_no=True) == ["--a-b.c_d=[1,2]"]


@pytest.mark.slow
def test_the_list_is_that_of_the_installed_vllm():
    said = subprocess.run(
        [vllm_python(), str(ROOT / "tests/engine_flags.py"), "vllm"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said == (ROOT / "dovetail/engines/vllm/flags.txt").read_text(encoding="utf-8")
