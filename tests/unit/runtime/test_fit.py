"""Whether a model can be split as asked."""

import json
from pathlib import Path

import pytest

from dovetail.config.resolve import resolve
from dovetail.runtime.fit import check_fit
from dovetail.runtime.shape import ModelShape, shape_of
from dovetail.types.errors import ConfigError

DENSE = ModelShape(layers=6, hidden=64, heads=8, kv_heads=2, head_dim=8, intermediate=96, vocab=50)
MOE = ModelShape(
    layers=6, heads=8, kv_heads=8, experts=6, experts_per_token=2, expert_intermediate=32
)
TORCH = "--colocate --actor-num-gpus-per-node 8"
MEGATRON = f"{TORCH} --train-backend megatron"


@pytest.mark.parametrize(
    ("shape", "flags", "expected"),
    [
        (DENSE, f"{TORCH} --tensor-model-parallel-size 4", "2 key-value heads can't be shared out"),
        (DENSE, f"{MEGATRON} --tensor-model-parallel-size 16", "8 attention heads can't be shared"),
        (
            DENSE,
            f"{MEGATRON} --pipeline-model-parallel-size 4",
            "6 layers can't be shared out to 4",
        ),
        (
            DENSE,
            f"{MEGATRON} --pipeline-model-parallel-size 2 "
            "--num-layers-per-virtual-pipeline-stage 2",
            "6 layers can't be interleaved",
        ),
        (DENSE, f"{MEGATRON} --expert-model-parallel-size 2", "the model has none"),
        (MOE, f"{MEGATRON} --expert-model-parallel-size 4", "6 experts can't be shared out to 4"),
        (
            MOE,
            f"{MEGATRON} --tensor-model-parallel-size 2",
            "only under sequence parallelism; add --sequence-parallel",
        ),
        (
            DENSE,
            f"{TORCH} --rollout-engine vllm --rollout-num-gpus-per-engine 3",
            "have rollout_num_gpus_per_engine divide it: --rollout-num-gpus-per-engine 2",
        ),
    ],
)
def test_a_model_that_does_not_come_out_even_is_refused_with_the_cure(
    shape: ModelShape, flags: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_fit(resolve([], flags.split()).config, shape)


@pytest.mark.parametrize(
    ("shape", "flags"),
    [
        (DENSE, "--tensor-model-parallel-size 7"),
        (DENSE, f"{TORCH} --tensor-model-parallel-size 2"),
        (DENSE, f"{MEGATRON} --tensor-model-parallel-size 4"),
        (DENSE, f"{TORCH} --rollout-engine vllm --rollout-num-gpus-per-engine 4"),
        (MOE, f"{MEGATRON} --tensor-model-parallel-size 2 --sequence-parallel"),
        (ModelShape(), f"{MEGATRON} --tensor-model-parallel-size 8"),
    ],
)
def test_a_model_that_comes_out_even_is_let_pass(shape: ModelShape, flags: str) -> None:
    check_fit(resolve([], flags.split()).config, shape)


def test_the_text_part_of_a_vision_language_model_counts(tmp_path: Path) -> None:
    text = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "hidden_size": 7}))
    shape = ModelShape.read(tmp_path)
    assert shape == ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, head_dim=8)
    assert shape.kv_elements == 2 * 2 * 4 * 8
    assert ModelShape.read(tmp_path / "nowhere") is None
    config = resolve([], ["--hf-checkpoint", str(tmp_path)]).config
    assert shape_of(config) is None


def test_a_configuration_that_is_no_json_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        ModelShape.read(tmp_path)
