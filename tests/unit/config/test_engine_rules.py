"""Engines that can't be had, and settings of engines that do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.config.engine_rules import engine_notes, engine_rules
from dovetail.config.resolve import resolve


def _problems(flags: str) -> list[str]:
    return list(engine_rules(resolve([], flags.split()).config))


def _notes(flags: str) -> list[str]:
    return list(engine_notes(resolve([], flags.split()).config))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rollout-external-engine-addrs a:1", "rollout_engine 'embedded'"),
        ("--rollout-engine vllm --rollout-external-engine-addrs host", "'host', which is no"),
        ("--rollout-engine vllm --rollout-external-engine-addrs ftp://h:1", "no address"),
        ("--rollout-engine vllm --rollout-external-engine-addrs http://h:1/v1", "no address"),
        ("--rollout-engine vllm --rollout-external-engine-addrs http://u:p@h:1", "no address"),
        ("--rollout-engine vllm --rollout-external-engine-addrs h:99999", "no address"),
        (
            "--rollout-engine sglang --rollout-external-engine-addrs localhost:1 http://localhost:1",
            "twice",
        ),
        (
            "--rollout-engine vllm --rollout-num-engines 2 "
            "--rollout-external-engine-addrs localhost:1",
            "contradict",
        ),
        ("--rollout-engine vllm --rollout-external-engine-addrs gpu7:1", "other machines"),
        ("--rollout-engine vllm --weight-transport disk", "no place to write"),
        ("--rollout-num-engines 2 --weight-transport disk", "no place to write"),
        (
            "--rollout-engine vllm --rollout-external-engine-addrs localhost:1 "
            "--engine-token-env NOBODY_SET_THIS",
            "NOBODY_SET_THIS",
        ),
        ('--rollout-engine vllm --multimodal-keys {"image":"images"}', "images"),
    ],
)
def test_what_can_not_be_is_told_with_the_cure(flags: str, words: str) -> None:
    (problem,) = _problems(flags)
    assert words in problem
    assert "--" in problem and "TOML" in problem
    assert "u:p" not in problem


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--rollout-num-engines 3",
        "--rollout-engine vllm --rollout-num-engines 2",
        "--rollout-engine vllm --rollout-external-engine-addrs 127.0.0.1:8000 http://[::1]:8001/",
        "--rollout-engine sglang --rollout-external-engine-addrs gpu7:1 "
        "--update-weight-disk-dir /shared",
        '--multimodal-keys {"image":"images"}',
    ],
)
def test_what_can_be_is_not_refused(flags: str) -> None:
    assert _problems(flags) == []


def test_addresses_are_taken_with_and_without_a_scheme() -> None:
    flags = "--rollout-external-engine-addrs host:8000 http://10.0.0.2:30000/ https://b:1"
    own = resolve([], flags.split()).config.engine
    assert own.external_urls == ["http://host:8000", "http://10.0.0.2:30000", "https://b:1"]
    assert own.in_processes and not own.all_local


@pytest.mark.parametrize(
    ("flags", "leaf"),
    [
        ("--use-fault-tolerance", "use_fault_tolerance"),
        ("--server-concurrency 8", "server_concurrency"),
        ("--rollout-health-check-interval 3", "rollout_health_check_interval"),
        ("--weight-transport disk --update-weight-disk-dir x", "weight_transport"),
        ("--router-policy round_robin", "router_policy"),
        ("--rollout-engine vllm --engine-fused off", "engine_fused"),
        (
            "--rollout-engine vllm --rollout-external-engine-addrs a:1 --engine-python /bin/python",
            "engine_python",
        ),
        (
            "--rollout-engine vllm --weight-transport shared_memory --update-weight-disk-dir x",
            "update_weight_disk_dir",
        ),
    ],
)
def test_a_setting_without_effect_is_told(flags: str, leaf: str) -> None:
    assert [
        note for note in _notes(flags) if note.startswith(f"{leaf} ") and "does nothing" in note
    ]


@pytest.mark.parametrize(
    "flags",
    [
        "--engine-fused off --engine-kv-tokens 100",
        "--rollout-num-engines 2 --engine-fused off --use-fault-tolerance --server-concurrency 8",
        "--rollout-engine vllm --engine-memory-gb 1 --router-policy round_robin",
    ],
)
def test_a_setting_with_effect_is_not(flags: str) -> None:
    assert _notes(flags) == []


def test_only_settings_of_engines_that_are_started_are_read(tmp_path: Path) -> None:
    own = "--vllm-max-num-seqs 4 --sglang-mem-fraction-static 0.5 --megatron-x 1"
    (note,) = resolve([], ["--rollout-engine", "vllm", *own.split()]).notes
    assert "--sglang-mem-fraction-static, --megatron-x" in note and "vllm" not in note.lower()
    assert resolve([], ["--rollout-engine", "vllm", "--vllm-max-num-seqs", "4"]).notes == ()
    (note,) = resolve([], own.split()).notes
    assert "--vllm-max-num-seqs" in note
