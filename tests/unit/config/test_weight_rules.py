"""How weights reach engines: what can't be, with its cure, and what has no effect."""

from __future__ import annotations

import pytest

from dovetail.config.check import check
from dovetail.config.notes import notes
from dovetail.config.resolve import resolve
from dovetail.types.errors import ConfigError

EMBEDDED = ["--rollout-num-engines", "2"]
VLLM = ["--rollout-engine", "vllm"]
SGLANG = ["--rollout-engine", "sglang"]
FAR = ["--rollout-external-engine-addrs", "10.1.1.1:30000"]
DISK = ["--weight-transport", "disk", "--update-weight-disk-dir", "/shared"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*VLLM, "--weight-transport", "broadcast"], "vLLM takes no weights by broadcast"),
        ([*SGLANG, "--weight-transport", "cuda_ipc"], "SGLang takes no weights by cuda_ipc"),
        ([*VLLM, *DISK, "--update-weight-mode", "delta"], "reads whole weights only"),
        ([*VLLM, "--check-weight-update-equal"], "--check-weight-update-equal"),
        ([*EMBEDDED, "--update-weight-mode", "delta"], "weight.transport.*disk"),
        ([*EMBEDDED, "--weight-transport", "disk"], "--update-weight-disk-dir"),
        ([*SGLANG, *FAR, "--weight-transport", "cuda_ipc"], "broadcast"),
        ([*SGLANG, *FAR], "--update-weight-disk-dir"),
        (
            [
                *EMBEDDED,
                *("--weight-transport", "broadcast"),
                *("--custom-update-weight-post-write-path", "a.b"),
            ],
            "writes none",
        ),
        (
            [*VLLM, "--vllm-custom-pull-weights-pre-read-hook", "a.b"],
            "vLLM calls no function before it reads weights",
        ),
        (
            [*SGLANG, "--sglang-custom-pull-weights-pre-read-hook", "a.b"],
            "SGLang calls no function before it reads weights",
        ),
    ],
)
def test_a_way_that_can_not_be_is_refused_with_its_cure(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(resolve([], flags).config)


@pytest.mark.parametrize(
    "flags",
    [
        [*EMBEDDED, "--weight-transport", "broadcast", "--check-weight-update-equal"],
        [*EMBEDDED, "--weight-transport", "cuda_ipc"],
        [*EMBEDDED, *DISK, "--update-weight-mode", "delta"],
        [*EMBEDDED, *DISK, "--custom-update-weight-post-write-path", "a.b"],
        [*SGLANG, *FAR, "--weight-transport", "broadcast"],
    ],
)
def test_a_way_that_can_be_is_not_refused(flags: list[str]) -> None:
    try:
        check(resolve([], flags).config)
    except ConfigError as error:
        for name in ("weight", "vLLM", "SGLang"):
            assert name not in str(error)


def test_settings_without_effect_are_told() -> None:
    shared = notes(resolve([], ["--check-weight-update-equal"]).config)
    assert any(one.startswith("check_weight_update_equal") for one in shared)
    flags = [*EMBEDDED, "--weight-transport", "broadcast", "--update-weight-disk-dir", "/x"]
    told = notes(resolve([], flags).config)
    assert any(one.startswith("update_weight_disk_dir") for one in told)
