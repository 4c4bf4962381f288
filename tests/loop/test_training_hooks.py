"""Plugin files of the training side in the slime family's style, inside whole runs: what they
rewrite trains as the built-in does, and what samples carry arrives where frameworks drop it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import read_metrics

PLUGIN = """
import torch

from dovetail.algorithms.packed_logits import get_log_probs_and_entropy


def convert(args, samples):
    centre = {}
    for sample in samples:
        centre.setdefault(sample.group_index, []).append(float(sample.reward))
    rewards = []
    for sample in samples:
        own = torch.tensor(centre[sample.group_index], dtype=torch.float64)
        spread = own.std() + 1e-6 if own.std() > 0 else 1.0
        rewards.append(float((sample.reward - own.mean()) / spread))
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": rewards,
        "raw_reward": [sample.reward for sample in samples],
        "truncated": [0 for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [sample.loss_mask or [1] * sample.response_length for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
        "turns": [sample.index * 10 for sample in samples],
    }


async def generate(args, sample, sampling_params):
    from dovetail.types import Sample

    sample.tokens = sample.tokens or [4, 13, 4]
    sample.append_response_tokens(
        tokens=[5 + sample.index % 7, 9, 1], log_probs=[-4.0, -4.0, -4.0], text="7"
    )
    sample.status = Sample.Status.COMPLETED
    sample.train_metadata = {"index": sample.index}
    return sample


def advantages(args, rollout_data):
    rollout_data["advantages"] = [
        torch.full_like(logprobs, reward)
        for logprobs, reward in zip(rollout_data["log_probs"], rollout_data["rewards"])
    ]
    rollout_data["returns"] = rollout_data["advantages"]


def postprocess(args, rollout_id, rollout_data):
    rollout_data["seen_by_postprocess"] = list(rollout_data["turns"])
    rollout_data["number"] = [float(rollout_id) for _ in rollout_data["turns"]]


def loss(args, batch, logits, sum_of_sample_mean):
    assert batch["turns"] == batch["seen_by_postprocess"]
    assert batch["turns"] == [10 * one["index"] for one in batch["train_metadata"]]
    assert batch["turns"] == [10 * index for index in batch["sample_indices"]]
    assert all("plain" not in one for one in batch["metadata"])
    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    logprobs, old = torch.cat(found["log_probs"]), torch.cat(batch["log_probs"])
    ratio, own = torch.exp(logprobs - old), torch.cat(batch["advantages"])
    value = sum_of_sample_mean(torch.maximum(-ratio * own, -ratio.clamp(0.8, 1.2) * own))
    number = sum_of_sample_mean(torch.full_like(ratio, batch["number"][0]))
    return value, {
        "loss": value.clone().detach(),
        "ratio_mean": sum_of_sample_mean(ratio),
        "number": number,
    }


def tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    weight = torch.exp(torch.cat(train_log_probs) - torch.cat(rollout_log_probs))
    clipped = weight.clamp(args.tis_clip_low, args.tis_clip)
    return pg_loss * clipped, loss_masks, {"tis": weight}


def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    def reduce(x):
        parts = zip(x.split(response_lengths, dim=0), loss_masks)
        return sum([(x_i * mask).sum() / torch.clamp_min(mask.sum(), 1) for x_i, mask in parts])

    return reduce
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


def metrics(place: Place, name: str, **changes: object) -> list[dict[str, float]]:
    run_dir = place.own / name
    plugin = place.write(f"{name}_plugin.py", PLUGIN)
    settings = {
        "custom_generate_function_path": f"{plugin}:generate",
        "custom_rm_path": None,
        "rm_type": "random",
        "num_rollout": 3,
        "n_samples_per_prompt": 4,
        "num_steps_per_rollout": 2,
        # The loss reads what only this generate function sets.
        "check_hooks": False,
        "lr": 1e-3,
    }
    hooks = {
        leaf: f"{plugin}:{value[1:]}" if str(value).startswith(":") else value
        for leaf, value in changes.items()
    }
    assert main(place.train(**{**settings, **hooks}, run_dir=run_dir)) == 0
    return [
        {k: v for k, v in row.items() if k.startswith("train/")} for row in read_metrics(run_dir)
    ]


def agree(
    first: list[dict[str, float]], second: list[dict[str, float]], names: tuple[str, ...]
) -> None:
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name


def test_a_run_rewritten_in_hooks_trains_as_the_built_in_does(place: Place) -> None:
    built_in = metrics(place, "built_in")
    own = metrics(
        place,
        "own",
        custom_convert_samples_to_train_data_path=":convert",
        custom_advantage_function_path=":advantages",
        rollout_data_postprocess_path=":postprocess",
        loss_type="custom_loss",
        custom_loss_function_path=":loss",
        micro_batch_size=2,
    )
    agree(built_in, own, ("train/loss", "train/ratio_mean", "train/grad_norm", "train/tokens"))
    assert all(row["train/grad_norm"] > 0 for row in built_in)
    assert [row["train/number"] for row in own] == pytest.approx([0, 1, 2])


def test_a_rewritten_correction_and_reducer_train_as_the_built_in_ones(place: Place) -> None:
    built_in = metrics(place, "built_in", use_tis=True)
    own = metrics(
        place,
        "own",
        use_tis=True,
        custom_tis_function_path=":tis",
        custom_pg_loss_reducer_function_path=":reducer",
    )
    agree(built_in, own, ("train/loss", "train/tis", "train/grad_norm"))
    plain = metrics(place, "plain")
    assert plain[0]["train/grad_norm"] != pytest.approx(built_in[0]["train/grad_norm"], rel=1e-3)


def test_icepop_is_there_by_its_name(place: Place) -> None:
    got = metrics(place, "icepop", use_tis=True, custom_tis_function_path="icepop_function")
    assert {"train/tis", "train/tis_clipfrac", "train/tis_abs"} <= set(got[0])
