"""A run on embedded engines in processes of their own: what it trains on is what one in the run's
own process gives, also when one of them dies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared, to_flags
from tests.loop.tiny import make_rows, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, GROUPS, SIBLINGS = 3, 2, 4
STRIKE = """
import os
import signal
from pathlib import Path

struck = Path(__file__).with_name("struck.txt")


def reward(sample):
    if not struck.exists() and "{strike}" == "yes" and sample.index == 9:
        keepers = children(os.getpid())
        engines = [engine for keeper in keepers for engine in children(keeper)]
        engine = next(pid for pid in engines if b"serve" in command(pid))
        os.kill(engine, signal.SIGKILL)
        struck.write_text(str(engine))
    return float(sum(map(str.isdigit, sample.response)))


def children(pid):
    tasks = Path(f"/proc/{{pid}}/task").iterdir()
    return [int(one) for task in tasks for one in (task / "children").read_text().split()]


def command(pid):
    return Path(f"/proc/{{pid}}/cmdline").read_bytes().split(b"\\0")
"""
ASKS = """
import aiohttp


async def generate(args, sample, sampling_params):
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    async with aiohttp.ClientSession() as session:
        ids = args_tokens(sample)
        body = {"input_ids": ids, "sampling_params": sampling_params, "return_logprob": True}
        async with session.post(f"{url}/generate", json=body) as reply:
            answer = await reply.json()
        async with session.get(f"{url}/workers") as reply:
            workers = (await reply.json())["workers"]
    sample.metadata["num_workers"] = len(workers)
    meta = answer["meta_info"]
    made = [token for _, token, _ in meta["output_token_logprobs"]]
    sample.tokens = ids + made
    sample.response, sample.response_length = answer["text"], len(made)
    sample.rollout_log_probs = [value for value, _, _ in meta["output_token_logprobs"]]
    sample.status = sample.Status.TRUNCATED
    return sample


def args_tokens(sample):
    return [10, 11, 12]
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_shared(tmp_path_factory.mktemp("shared"))
    make_rows(path / "held_out.jsonl", count=3)
    return path


def train(shared: Path, own: Path, *, strike: str = "no", **changes: object) -> Path:
    own.mkdir(parents=True)
    place = Place(shared, own)
    reward = place.write("strike.py", STRIKE.format(strike=strike))
    flags = place.train(
        custom_rm_path=f"{reward}:reward",
        num_rollout=STEPS,
        rollout_batch_size=GROUPS,
        n_samples_per_prompt=SIBLINGS,
        rollout_max_response_len=8,
        lr=1e-3,
        **changes,
    )
    assert main([*flags, "--traceback"]) == 0
    return place.run_dir


def samples(run_dir: Path) -> list[dict[str, Any]]:
    paths = sorted((run_dir / "samples").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def tokens(run_dir: Path) -> list[tuple[int, list[int]]]:
    return [(one["index"], one["tokens"]) for one in samples(run_dir)]


def assert_engine_and_trainer_agree(run_dir: Path) -> None:
    for row in read_metrics(run_dir):
        assert row["train/rollout_logprob_max_diff"] < 1e-5, row


def test_two_engines_one_of_which_dies_give_the_samples_of_one_in_the_run(
    shared: Path, tmp_path: Path
) -> None:
    alone = train(shared, tmp_path / "alone")
    several = train(
        shared,
        tmp_path / "several",
        strike="yes",
        rollout_num_engines=2,
        rollout_health_check_interval=0.5,
    )
    assert tokens(several) == tokens(alone)
    assert_engine_and_trainer_agree(several)
    for number, sample in enumerate(samples(several)):
        assert set(sample["weight_versions"]) == {str(number // (GROUPS * SIBLINGS))}
    struck = int((tmp_path / "several" / "strike.py").with_name("struck.txt").read_text())
    assert not Path(f"/proc/{struck}").exists()
    log = (several / "log.txt").read_text()
    assert "it was ended by SIGKILL" in log
    facts = json.loads((several / "result.json").read_text())["engines"]
    assert [one["name"] for one in facts] == ["engine 0 (embedded)", "engine 1 (embedded)"]
    assert sum(one["answered"] for one in facts) == STEPS * GROUPS * SIBLINGS
    assert "serving" in (several / "engines" / "engine_0.log").read_text()


def test_functions_for_other_frameworks_find_the_engines_behind_one_address(
    shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "asks.py").write_text(ASKS)
    run_dir = train(
        shared,
        tmp_path / "own",
        rollout_num_engines=2,
        custom_generate_function_path=f"{tmp_path / 'asks.py'}:generate",
    )
    assert_engine_and_trainer_agree(run_dir)
    assert {sample["metadata"]["num_workers"] for sample in samples(run_dir)} == {2}
    last = read_metrics(run_dir)[-1]
    assert last["engines/0/answered"] + last["engines/1/answered"] == STEPS * GROUPS * SIBLINGS


def test_an_evaluation_alone_is_answered_by_engines_in_processes(
    shared: Path, tmp_path: Path
) -> None:
    found = {}
    for number in (1, 2):
        flags = to_flags(
            {
                "hf_checkpoint": shared / "model",
                "label_key": "label",
                "custom_rm_path": f"{shared / 'good.py'}:reward",
                "rollout_max_response_len": 8,
                "eval_prompt_data": ["few", shared / "held_out.jsonl"],
                "dtype": "float32",
                "device": "cpu",
                "num_threads": 1,
                "progress": "off",
                "use_tensorboard": False,
                "rollout_num_engines": number,
                "run_dir": tmp_path / f"run{number}",
            }
        )
        assert main(["eval", *flags, "--traceback"]) == 0
        found[number] = (tmp_path / f"run{number}" / "evaluation.json").read_text()
    assert found[1] == found[2]
    assert sorted(os.listdir(tmp_path / "run2" / "engines")) == ["engine_0.log", "engine_1.log"]
