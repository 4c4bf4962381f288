"""The simulated run: hand-worked numbers, and what holds in every way of running."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate as command
from benchmarks.simulated_engines import Clock, Engines, EngineSpeed, Sequence
from benchmarks.simulated_lengths import Fixed, LogNormal, LongTail, Recorded, lengths_of
from benchmarks.simulated_machines import GPUS, MODELS, Setting, machine_of, placed
from benchmarks.simulated_run import shared_out, simulate
from benchmarks.simulated_work import Machine, Work

ONE = Machine(
    engines=1,
    engine=EngineSpeed(0.01, 0.001, prompt_s=0.05),
    trainer_groups=1,
    train_token_s=0.002,
    train_fixed_s=0.5,
    publish_s=0.25,
    turns=True,
    switch_s=0.1,
)
APART = Machine(
    engines=2,
    engine=EngineSpeed(0.01, 0.0005, max_running=8),
    trainer_groups=2,
    train_token_s=0.004,
    engine_devices=2,
    trainer_devices=2,
    publish_s=0.1,
)
TAIL = LogNormal(60, 1.0, 600)


def test_one_device_and_one_sample_are_what_one_works_out_by_hand() -> None:
    made = simulate(ONE, Work(Fixed(100), groups=1, samples=1, steps=3, warm_up=1))
    # prompt 0.05 + 100 x (0.01 + 0.001), switch 0.1, train 0.5 + 100 x 0.002, publish 0.25
    step = 0.05 + 1.1 + 0.1 + 0.7 + 0.25
    assert made.step_ends == pytest.approx([step, 2 * step, 3 * step])
    assert made.step_s == pytest.approx(step)
    assert made.engine_share == pytest.approx(1.15 / step)
    assert made.trainer_share == pytest.approx(0.7 / step)
    assert made.utilisation == pytest.approx(1.85 / step)
    assert (made.made_tokens, made.trained_tokens, made.wasted) == (pytest.approx(300), 300, 0)


def test_sequences_of_one_engine_slow_each_other_down() -> None:
    clock, ends = Clock(), []
    engines = Engines(clock, 1, EngineSpeed(0.0, 1.0), lambda s: ends.append((s.tokens, clock.now)))
    engines.submit([Sequence(0, 2), Sequence(1, 5)])
    while clock.turn():
        pass
    # Two tokens each at 2 s, then three alone at 1 s.
    assert [end for _, end in ends] == pytest.approx([4.0, 7.0])
    assert engines.made_tokens == pytest.approx(7) and engines.busy_s == pytest.approx(7)


def test_what_finds_no_place_waits_and_what_is_ended_gives_its_place_away() -> None:
    clock, ends = Clock(), []
    engines = Engines(
        clock, 1, EngineSpeed(1.0, 0.0, max_running=1), lambda s: ends.append((s.group, clock.now))
    )
    first, second = Sequence(0, 100), Sequence(1, 3)
    engines.submit([first, second])
    clock.at(10.5, lambda: engines.cancel([first]))
    clock.at(11.5, lambda: engines.pause(2.0))
    while clock.turn():
        pass
    assert first.tokens == 90
    assert ends == [(1, pytest.approx(10.5 + 3 + 2))]
    assert engines.busy_s == pytest.approx(13.5)


def test_a_lag_trains_while_the_next_step_is_made() -> None:
    one = replace(APART, engines=1, trainer_groups=1, engine=EngineSpeed(0.0, 0.01))
    work = Work(Fixed(100), groups=1, samples=1, steps=10, warm_up=4)
    # 1 s to make, 0.4 s to train, 0.1 s to publish, in which nothing is made.
    assert simulate(one, work).step_s == pytest.approx(1.5)
    assert simulate(one, replace(work, max_lag=1)).step_s == pytest.approx(1.1, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(["sync", "partial", "lag 1", "lag 4"]),
    groups=st.integers(1, 6),
    samples=st.integers(1, 4),
    over=st.integers(0, 3),
    refused=st.sampled_from([0.0, 0.4]),
    reward_s=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_nothing_is_busier_than_always_and_no_lag_is_over_its_bound(
    way: str, groups: int, samples: int, over: int, refused: float, reward_s: float, seed: int
) -> None:
    lag = {"lag 1": 1, "lag 4": 4}.get(way, 0)
    work = Work(
        TAIL,
        groups=groups,
        samples=samples,
        steps=6,
        max_lag=lag,
        submit_size=groups + over,
        partial=way == "partial",
        refused=refused,
        reward_s=reward_s,
        seed=seed,
    )
    made = simulate(APART, work)
    left = made.trained + made.dropped + made.put_back + made.discarded + made.pending
    assert made.issued == left and made.trained == 6 * groups
    for share in (made.utilisation, made.trainer_share, made.engine_share, made.of_peak):
        assert 0 < share <= 1 + 1e-9
    assert made.trained_tokens <= made.made_tokens * (1 + 1e-9) + 1
    if way != "partial":
        assert max(made.lags) <= lag and min(made.lags) >= 0
    assert simulate(APART, work) == made


def test_a_long_tail_gains_from_a_lag() -> None:
    work = Work(LongTail(20, 0.15, 600), groups=8, samples=4, steps=16, seed=3)
    sync, ahead = simulate(APART, work), simulate(APART, replace(work, max_lag=2))
    assert ahead.steps_per_hour > 1.3 * sync.steps_per_hour


def test_a_lag_on_shared_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="can't share devices"):
        simulate(ONE, Work(Fixed(1), max_lag=1))


def test_the_longest_samples_are_shared_out_first() -> None:
    assert sorted(shared_out([5, 4, 3, 3, 3], 2)) == [8, 10]
    assert shared_out([1], 3).count(0) == 2


def test_lengths_are_read_and_drawn(tmp_path: Path) -> None:
    assert lengths_of("lognormal:100,0.5,1000") == LogNormal(100, 0.5, 1000)
    assert lengths_of("longtail:10,0.1,500") == LongTail(10, 0.1, 500)
    lines = [{"group_index": 0, "response_length": n} for n in (3, 0)]
    lines.append({"group_index": 1, "response_length": 9})
    (tmp_path / "step.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert lengths_of(str(tmp_path)) == Recorded(((3, 1), (9,)))
    for wrong in ("lognormal:1", "nowhere.jsonl", "fixed:x"):
        with pytest.raises(SystemExit, match="lengths"):
            lengths_of(wrong)


@pytest.mark.parametrize("devices", [8, 64, 4096])
def test_clusters_are_placed_by_the_plan(devices: int) -> None:
    setting = Setting(devices, MODELS["8b"], GPUS["h100"])
    apart = machine_of(setting, placed(setting, colocated=False))
    assert apart.devices == devices and apart.engines + apart.trainer_groups == devices
    turns = machine_of(setting, placed(setting, colocated=True))
    assert turns.turns and turns.devices == turns.engines == turns.trainer_groups == devices


def test_the_sizes_of_the_models_are_what_their_names_say() -> None:
    assert MODELS["8b"].count.total == pytest.approx(8.19e9, rel=1e-3)
    moe = MODELS["30b-a3b"]
    assert moe.count.total == pytest.approx(30.5e9, rel=1e-2)
    assert moe.active + moe.count.embedding == pytest.approx(3.35e9, rel=1e-2)


def test_the_command_prints_a_table_and_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    flags = ["--devices", "8", "--groups", "4", "--samples", "2", "--steps", "3"]
    flags += ["--lengths", "longtail:20,0.2,200", "--json", str(out)]
    assert command.main(flags) == 0
    text = capsys.readouterr().out
    assert [row["way"] for row in json.loads(out.read_text())] == list(command.WAYS)
    assert all(way in text for way in command.WAYS)
    assert command.main(flags) == 0
    assert capsys.readouterr().out == text
