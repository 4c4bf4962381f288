"""The user's functions of the rollout side inside whole small runs: each is called at its moment
with the right values, and what it does reaches the data, the log or the buffer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.same import assert_same_run, source_state
from tests.loop.tiny import read_metrics

COMMON = """
import json
from pathlib import Path

LOG = Path(__file__).with_name("calls.jsonl")


def note(*what):
    with LOG.open("a") as file:
        file.write(json.dumps(what) + "\\n")


def digits(sample):
    return float(sum(map(str.isdigit, sample.response)))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def _user(place: Place, code: str) -> str:
    return place.write("user.py", COMMON + code)


def _train(place: Place, **changes: object) -> list[str]:
    """A run without the rehearsal, which would call the functions too."""
    return place.train(check_hooks=False, **changes)


def _calls(place: Place) -> list[list[Any]]:
    path = place.own / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _samples(place: Place, step: int) -> list[dict[str, Any]]:
    path = place.run_dir / "samples" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_hooks_of_a_step_are_called_in_order_and_reach_data_and_log(place: Place) -> None:
    file = _user(
        place,
        """
async def generate(args, sample, sampling_params, evaluation=False):
    from dovetail.types import Sample
    note("generate", sample.index, evaluation, sampling_params["max_new_tokens"])
    sampling_params["max_new_tokens"] = 0
    sample.append_response_tokens(tokens=[5 + sample.index % 3, 1], log_probs=[-1.0, -0.5],
                                  text=str(2 + sample.index % 3))
    sample.status = Sample.Status.COMPLETED
    return sample


def first(args, sample):
    note("first", sample.index, sample.reward)
    sample.metadata["hooks"] = ["first"]


async def second(args, sample, **kwargs):
    note("second", sample.index, kwargs["rollout_id"], kwargs["evaluation"])
    sample.metadata["hooks"].append("second")
    return sample


async def reward(args, sample):
    note("reward", sample.index, sample.metadata["hooks"])
    return digits(sample) + sample.index % 2


def keep(args, group):
    note("keep", group[0].group_index, [s.reward for s in group])
    return group[0].group_index != 1


def sample_filter(args, groups):
    note("filter", [g[0].group_index for g in groups])
    groups[0][0].remove_sample = True


def everything(args, all_samples, get_samples):
    note("all", [g[0].group_index for g in all_samples], callable(get_samples))


def log_step(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    note("log", rollout_id, [s.index for s in samples], rollout_time > 0)
    rollout_extra_metrics["rollout/mine"] = 7 + rollout_id
    return False
""",
    )
    argv = _train(
        place,
        num_rollout=2,
        custom_rm_path=f"{file}:reward",
        custom_generate_function_path=f"{file}:generate",
        dynamic_sampling_filter_path=f"{file}:keep",
        rollout_sample_filter_path=f"{file}:sample_filter",
        rollout_all_samples_process_path=f"{file}:everything",
        custom_rollout_log_function_path=f"{file}:log_step",
    )
    argv += ["--rollout-sample-hook-path", f"{file}:first"]
    argv += ["--rollout-sample-hook-path", f"{file}:second"]
    assert main(argv) == 0
    calls = _calls(place)
    of_one = [call[0] for call in calls if call[1] == 0 and call[0] in _PER_SAMPLE]
    assert of_one == ["generate", "first", "second", "reward"]
    assert ["generate", 0, False, 4] in calls and ["second", 0, 0, False] in calls
    assert ["reward", 0, ["first", "second"]] in calls and ["first", 0, None] in calls
    assert all(call[3] == 4 for call in calls if call[0] == "generate")
    per_step = [call for call in calls if call[0] in ("filter", "all", "log")]
    assert [call[0] for call in per_step] == ["filter", "all", "log"] * 2
    kept = per_step[0][1]
    assert len(kept) == 2 and 1 not in kept and set(kept) | {1} == set(per_step[1][1])
    assert per_step[1][2] is True and per_step[2][1] == 0 and per_step[5][1] == 1
    samples = _samples(place, 1)
    assert [s.get("remove_sample", False) for s in samples] == [True, False, False, False]
    assert [s["index"] for s in samples] == per_step[2][2]
    assert all(s["metadata"]["hooks"] == ["first", "second"] for s in samples)
    rows = read_metrics(place.run_dir)
    assert [row["rollout/mine"] for row in rows] == [7.0, 8.0]
    assert rows[0]["rollout/removed_samples"] == 1.0 and "rollout/reward" in rows[0]
    assert rows[0]["rollout/dynamic_filter/drop_unnamed"] == 1.0


_PER_SAMPLE = ("generate", "first", "second", "reward")


def test_log_functions_take_the_place_of_the_default_and_see_evaluation(place: Place) -> None:
    file = _user(
        place,
        """
def log_step(rollout_id, args, samples, extra, seconds):
    note("step", rollout_id, len(samples))
    return True


def log_eval(rollout_id, args, data, extra_metrics):
    note("eval", rollout_id, {k: [len(v["rewards"]), len(v["truncated"]), len(v["samples"])]
                              for k, v in data.items()})
    extra_metrics["eval/mine"] = rollout_id + 0.5
    return rollout_id == 2
""",
    )
    argv = _train(
        place,
        num_rollout=2,
        custom_rollout_log_function_path=f"{file}:log_step",
        custom_eval_rollout_log_function_path=f"{file}:log_eval",
        eval_interval=1,
        eval_prompt_data=["held", f"{place.shared / 'rows.jsonl'}@[0:3]"],
    )
    assert main(argv) == 0
    assert _calls(place) == [
        ["eval", 0, {"held": [3, 3, 3]}],
        ["step", 0, 4],
        ["eval", 1, {"held": [3, 3, 3]}],
        ["step", 1, 4],
        ["eval", 2, {"held": [3, 3, 3]}],
    ]
    rows = read_metrics(place.run_dir)
    assert not any(name.startswith("rollout/") for row in rows for name in row)
    assert [row["eval/mine"] for row in rows if "eval/mine" in row] == [0.5, 1.5]
    assert sum("eval/held/reward" in row for row in rows) == 2
    assert sum("train/loss" in row for row in rows) == 2


def test_a_replay_is_logged_by_the_users_function_too(place: Place) -> None:
    file = _user(
        place,
        """
def log_step(rollout_id, args, samples, extra, seconds):
    note(rollout_id, [s.index for s in samples], sorted(extra))
""",
    )
    saved = str(place.own / "saved" / "{rollout_id}.jsonl")
    first = _train(place, run_dir=place.own / "first", save_debug_rollout_data=saved)
    assert main(first) == 0
    argv = _train(
        place, load_debug_rollout_data=saved, custom_rollout_log_function_path=f"{file}:log_step"
    )
    assert main(argv) == 0
    assert _calls(place) == [[0, [0, 1, 2, 3], ["rollout/reward"]]]


def test_evaluation_alone_calls_the_users_functions_too(place: Place) -> None:
    file = _user(
        place,
        """
def evaluate(args, rollout_id, data_source, evaluation=False):
    note("eval", rollout_id, evaluation, data_source)
    return {"mine": {"rewards": [1, 0], "truncated": [False, False]}}


def log_eval(rollout_id, args, data, extra_metrics):
    note("log", data["mine"]["rewards"])
    extra_metrics["eval/mine/best"] = 1
""",
    )
    flags = place.flags(
        eval_function_path=f"{file}:evaluate",
        custom_eval_rollout_log_function_path=f"{file}:log_eval",
        eval_prompt_data=["held", f"{place.shared / 'rows.jsonl'}@[0:2]"],
        prompt_data=None,
        check_hooks=False,
    )
    assert main(["eval", *flags]) == 0
    assert _calls(place) == [["eval", 0, True, None], ["log", [1, 0]]]
    (row,) = read_metrics(place.run_dir)
    assert row["eval/mine/reward"] == 0.5 and row["eval/mine/best"] == 1


def test_a_set_has_its_own_generate_function(place: Place) -> None:
    file = _user(
        place,
        """
async def generate(args, sample, sampling_params, evaluation=False):
    note(sample.index, evaluation)
    sample.append_response_tokens(tokens=[5], log_probs=[0.0], text="3")
    return sample
""",
    )
    rows = place.shared / "rows.jsonl"
    toml = place.write(
        "run.toml",
        f"""
        [eval]
        eval_interval = 5
        [eval.eval_sets.theirs]
        path = "{rows}@[0:2]"
        custom_generate_function_path = "{file}:generate"
        [eval.eval_sets.ours]
        path = "{rows}@[0:2]"
        """,
    )
    assert main(["train", toml, *place.flags(check_hooks=False)]) == 0
    assert _calls(place) == [[0, True], [1, True]] * 2
    row = read_metrics(place.run_dir)[0]
    assert row["eval/theirs/response_length"] == 1.0 and row["eval/theirs/reward"] == 1.0
    wrong = toml.replace("run.toml", "wrong.toml")
    Path(wrong).write_text(Path(toml).read_text().replace(":generate", ":generat"))
    assert main(["train", wrong, *place.flags(run_dir=place.own / "wrong")]) == 2


SOURCE = """
from dovetail.types import Sample


class Source:
    def __init__(self, args):
        self.args, self.next, self.back = args, 0, []

    def get_samples(self, num_samples):
        note("get", num_samples)
        groups = [self.fresh() for _ in range(num_samples)]
        return groups

    def fresh(self):
        number, n = self.next, self.args.n_samples_per_prompt
        self.next += 1
        return [Sample(group_index=number, index=number * n + i, prompt=f"{number % 10}+1=",
                       label=str(number)) for i in range(n)]

    def add_samples(self, samples):
        self.back += samples

    def save(self, rollout_id):
        path = Path(self.args.save) / "mine" / f"{rollout_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.next))
        note("save", rollout_id)

    def load(self, rollout_id):
        note("load", rollout_id, self.args.start_rollout_id)
        self.next = json.loads((Path(self.args.load) / "mine" / f"{rollout_id}.json").read_text())
"""


def test_a_users_source_gives_the_prompts_and_keeps_its_own_state(place: Place) -> None:
    file = _user(place, SOURCE)
    flags = {"data_source_path": f"{file}:Source", "prompt_data": None, "save_interval": 2}
    assert main(_train(place, **flags, num_rollout=2)) == 0
    assert _calls(place) == [["get", 2], ["get", 2], ["save", 1]]
    assert [s["group_index"] for s in _samples(place, 2)] == [2, 2, 3, 3]
    more = _train(place, **flags, num_rollout=4, load=place.run_dir, run_dir=None)
    assert main(more) == 0
    assert _calls(place)[3:] == [["load", 1, 2], ["get", 2], ["get", 2], ["save", 3]]
    assert [s["group_index"] for s in _samples(place, 4)] == [6, 6, 7, 7]
    assert {s["prompt"] for s in _samples(place, 4)} == {"6+1=", "7+1="}


def test_epochs_of_a_users_source_come_from_its_length_or_its_dataset(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    file = _user(place, SOURCE + "\n\nclass Sized(Source):\n    dataset = [1, 2, 3, 4, 5]\n")
    flags: dict[str, object] = {"prompt_data": None, "num_rollout": None, "num_epoch": 1}
    assert main(_train(place, **flags, data_source_path=f"{file}:Sized")) == 0
    assert len(read_metrics(place.run_dir)) == 2
    argv = _train(place, **flags, data_source_path=f"{file}:Source", run_dir=place.own / "other")
    assert main(argv) == 2
    assert "neither a length nor a `dataset`" in capfd.readouterr().err


ROLLOUTS = """
import asyncio
from dovetail.types import RolloutFnEvalOutput, RolloutFnTrainOutput, Sample


def finished(group):
    for sample in group:
        sample.append_response_tokens(tokens=[5 + sample.index % 2], log_probs=[-0.7], text="3")
        sample.status = Sample.Status.COMPLETED
        sample.reward = float(sample.index % 2)
    return group


def flat(args, rollout_id, data_source, evaluation=False):
    groups = data_source.get_samples(args.rollout_batch_size)
    return [s for group in groups for s in finished(group)]


def nested(args, rollout_id, data_source, evaluation=False):
    groups = data_source.get_samples(args.rollout_batch_size)
    return RolloutFnTrainOutput([finished(group) for group in groups], {"rollout/mine": 3})


async def deep(args, rollout_id, *, evaluation=False):
    note("deep", rollout_id)
    groups = []
    for number in range(2):
        pair = [[Sample(group_index=number, index=4 * number + 2 * i + j, rollout_id=2 * number + i,
                        tokens=[4]) for j in range(2)] for i in range(2)]
        groups.append([finished(siblings) for siblings in pair])
    return groups


def threaded(args, rollout_id, data_source, evaluation=False):
    import threading

    from slime.utils.async_utils import run

    assert threading.current_thread() is not threading.main_thread()

    async def collect():
        await asyncio.sleep(0)
        return data_source.get_samples(args.rollout_batch_size)

    return [finished(group) for group in run(collect())]


def forgetful(args, rollout_id, data_source, evaluation=False):
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            sample.response, sample.reward = "3", 1.0
    return groups


class Both:
    made = 0

    def __init__(self, input):
        Both.made += 1
        self.source = input.data_source

    def __call__(self, input):
        note("class", Both.made, input.rollout_id, input.evaluation)
        if input.evaluation:
            columns = {"rewards": [0.25, 0.75], "truncated": [False, True]}
            return RolloutFnEvalOutput({"mine": columns})
        return RolloutFnTrainOutput([finished(g) for g in self.source.get_samples(2)])
"""


@pytest.mark.parametrize(
    ("name", "num_samples"), [("flat", 4), ("nested", 4), ("deep", 8), ("threaded", 4)]
)
def test_rollout_functions_give_flat_or_nested_samples(
    place: Place, name: str, num_samples: int
) -> None:
    file = _user(place, ROLLOUTS)
    assert main(_train(place, rollout_function_path=f"{file}:{name}", custom_rm_path=None)) == 0
    assert len(_samples(place, 1)) == num_samples
    (row,) = read_metrics(place.run_dir)
    assert row["rollout/reward"] == 0.5 and row["rollout/response_length"] == 1.0
    assert row["train/grad_norm"] > 0
    assert row.get("rollout/mine") == (3 if name == "nested" else None)


def test_samples_without_ids_are_refused_before_training(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    file = _user(place, ROLLOUTS)
    argv = _train(place, rollout_function_path=f"{file}:forgetful", custom_rm_path=None)
    assert main(argv) == 1
    told = capfd.readouterr().err
    assert "--rollout-function-path" in told and "sample 0 of group 0" in told
    assert "response_length 0" in told


def test_a_class_for_rollout_and_evaluation_is_one_object_and_rewards_alone_are_logged(
    place: Place,
) -> None:
    file = _user(place, ROLLOUTS)
    argv = _train(
        place,
        rollout_function_path=f"{file}:Both",
        eval_function_path=f"{file}:Both",
        custom_rm_path=None,
        eval_interval=1,
    )
    assert main(argv) == 0
    assert _calls(place) == [
        ["class", 1, 0, True],
        ["class", 1, 0, False],
        ["class", 1, 1, True],
    ]
    evals = [row for row in read_metrics(place.run_dir) if "eval/mine/reward" in row]
    assert [row["eval/mine/reward"] for row in evals] == [0.5, 0.5]
    assert [row["eval/mine/truncated"] for row in evals] == [0.5, 0.5]


def test_a_group_is_rewarded_flat_also_where_samples_fan_out(place: Place) -> None:
    file = _user(
        place,
        """
import copy


async def fan_out(args, sample, sampling_params):
    twin = copy.deepcopy(sample)
    for one in (sample, twin):
        one.append_response_tokens(tokens=[5], log_probs=[-1.0], text="3")
    return [sample, twin]


async def rank(args, samples):
    note("rank", [s.index for s in samples])
    return [float(i % 2) for i in range(len(samples))]


async def single(args, sample):
    note("single", sample.index)
    return float(sample.index % 2)
""",
    )
    common = {"custom_generate_function_path": f"{file}:fan_out"}
    assert main(_train(place, **common, custom_rm_path=f"{file}:rank", group_rm=True)) == 0
    assert _calls(place) == [["rank", [0, 0, 1, 1]], ["rank", [2, 2, 3, 3]]]
    assert [s["rollout_id"] for s in _samples(place, 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    other = _train(place, **common, custom_rm_path=f"{file}:single", run_dir=place.own / "other")
    assert main(other) == 0
    assert sorted(call[1] for call in _calls(place)[2:]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_filter_hands_groups_back_to_the_buffer(place: Place) -> None:
    file = _user(
        place,
        """
def again(args, all_samples, data_source):
    for group in all_samples:
        if group[0].group_index == 0 and "again" not in group[0].metadata:
            for sample in group:
                sample.reset_for_retry()
                sample.metadata["again"] = True
            data_source.add_samples([group])


def keep(args, group):
    return group[0].group_index != 0 or "again" in group[0].metadata
""",
    )
    argv = _train(
        place,
        num_rollout=2,
        dynamic_sampling_filter_path=f"{file}:keep",
        rollout_all_samples_process_path=f"{file}:again",
    )
    assert main(argv) == 0
    assert 0 not in {s["group_index"] for s in _samples(place, 1)}
    assert [s["group_index"] for s in _samples(place, 2)][:2] == [0, 0]


def test_a_subclass_of_the_familys_source_goes_on_exactly_with_its_buffer(place: Place) -> None:
    file = _user(
        place,
        """
from slime.rollout.data_source import RolloutDataSourceWithBuffer


class Counting(RolloutDataSourceWithBuffer):
    def get_samples(self, num_samples):
        self.update_metadata({"asked": self.get_metadata().get("asked", 0) + num_samples})
        note("buffer", self.get_buffer_length())
        return super().get_samples(num_samples)


def keep(group):
    return len({sample.reward for sample in group}) > 1
""",
    )
    flags: dict[str, object] = {
        "data_source_path": f"{file}:Counting",
        "dynamic_sampling_filter_path": f"{file}:keep",
        "n_samples_per_prompt": 4,
        "over_sampling_batch_size": 6,
        "partial_rollout": True,
        "rollout_max_response_len": 24,
        "rollout_shuffle": True,
        "save_interval": 2,
    }
    whole, parts = place.own / "whole", place.own / "parts"
    assert main(_train(place, **flags, num_rollout=4, run_dir=whole)) == 0
    assert any(call[1] > 0 for call in _calls(place))
    assert main(_train(place, **flags, num_rollout=2, run_dir=parts)) == 0
    assert source_state(parts)["buffer"]
    assert main(_train(place, **flags, num_rollout=4, run_dir=None, load=parts)) == 0
    assert_same_run(whole, parts)
    assert source_state(parts)["metadata"]["asked"] >= 8
    assert sorted(path.name for path in (parts / "checkpoints" / "rollout").iterdir()) == [
        "global_dataset_state_dict_1.json",
        "global_dataset_state_dict_3.json",
    ]
