"""The user's functions inside Megatron's training: what they are given, and when."""

import json
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView, bind
from dovetail.run.interrupt import Interrupt
from dovetail.run.parts import Run
from dovetail.run.saving import Saving
from tests.contract.test_megatron_contract import MAKE, alone, groups, models, settings_of
from tests.contract.test_trainer_contract import same_metrics, same_weights
from tests.contract.trained import STEPS, Case, maker, rows_of

pytestmark = pytest.mark.xdist_group("megatron hooks")

__all__ = ["alone", "groups", "models"]
OWN = "tests.contract.test_megatron_hooks"
PROBES = """
import json
from pathlib import Path


def see(*what):
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(what) + "\\n")


def init(args):
    from megatron.core import parallel_state

    see("init", args.mine, parallel_state.model_parallel_is_initialized())


def before_log_prob(args, model, store_prefix):
    see("logprobs", args.mine, store_prefix, [one.training for one in model])


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    clean = all(not buffer.grad_data.any() for one in model for buffer in one.buffers)
    rate = opt_param_scheduler.get_lr(optimizer.param_groups[0])
    see("step", args.mine, rollout_id, step_id, clean, rate)


def built(family, config, vp_stage, **ends):
    from transformers import AutoConfig

    from dovetail.trainers.megatron.provider import gpt_model, leave_pad_alone

    see("provider", family, ends, vp_stage)
    hf_config = AutoConfig.from_pretrained("POLICY")
    chunk = gpt_model(config, hf_config, vp_stage, **ends)
    leave_pad_alone(chunk, hf_config)
    return chunk


def slime(pre_process=True, post_process=True, vp_stage=None):
    import torch
    from transformers import AutoConfig

    from dovetail.config.sections import TrainerConfig
    from dovetail.trainers.megatron.architecture import transformer_config

    hf_config, alone = AutoConfig.from_pretrained("POLICY"), TrainerConfig()
    config = transformer_config(hf_config, alone, torch.float32, on_cpu=True)
    return built("slime", config, vp_stage, pre_process=pre_process, post_process=post_process)


def miles(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    assert pg_collection is None
    return built("miles", config, vp_stage, pre_process=pre_process, post_process=post_process)


def wrong(pre_process=True, post_process=True):
    return {}
"""
SLOTS = {
    "custom_megatron_init": "init",
    "custom_megatron_before_log_prob_hook": "before_log_prob",
    "custom_megatron_before_train_step_hook": "before_train_step",
}


def probed(rank, world, case, file, provider):
    """As `trained.trained`, with a user's functions."""
    from dovetail.trainers.megatron.hooks import megatron_hooks

    args = ArgsView(RunConfig(), {}, mine=7)
    named = {**SLOTS, "custom_model_provider": provider}
    bound = {slot: bind(slot, f"{file}:{name}", args) for slot, name in named.items()}
    trainer = maker(MAKE)(rank, world, Case(**case), hooks=megatron_hooks(bound))
    metrics = [trainer.train(rows_of(step), step + 5) for step in range(STEPS)]
    weights = {name: tensor.flatten().tolist() for name, tensor in trainer.backend.hf_tensors()}
    return {"metrics": metrics, "weights": weights}


def written(directory, policy):
    file = directory / "probes.py"
    file.write_text(PROBES.replace("POLICY", policy))
    return file


@pytest.mark.parametrize("family", ["slime", "miles"])
def test_they_are_given_what_the_families_give_at_the_same_moments(
    family, groups, models, alone, tmp_path
):
    own, case = models("Qwen3"), "minibatches and KL"
    file = written(tmp_path, own["policy"])
    told = asdict(Case(**own, settings=settings_of(case)))
    (rank,) = groups[1].call(f"{OWN}:probed", case=told, file=str(file), provider=family)
    expected = alone("Qwen3", case)
    same_metrics(rank["metrics"], expected["metrics"])
    same_weights(rank["weights"], expected["weights"])
    seen = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    ends = {"pre_process": True, "post_process": True}
    # After Megatron's groups are there and before a model is; policy, then reference.
    assert seen[:3] == [["init", 7, True], *[["provider", family, ends, None]] * 2]
    moments = seen[3:]
    passes = [one for one in moments if one[0] == "logprobs"]
    assert {one[2] for one in passes} == {"", "ref_"} and all(one[1] == 7 for one in passes)
    assert not any(training for one in passes for training in one[3])
    steps = [one for one in moments if one[0] == "step"]
    assert [one[2] for one in steps] == sorted(one[2] for one in steps)
    for rollout_id in (5, 6, 7):
        # 12 rows in steps of 5: three, counted anew in each rollout, gradients being zero.
        assert [one[1:5] for one in steps if one[2] == rollout_id] == [
            [7, rollout_id, step_id, True] for step_id in range(3)
        ]
    assert {one[5] for one in steps} == {1e-2}
    # What old logprobs a rollout needs is known before its first step.
    assert moments[0][0] == "logprobs" and moments[-1][0] == "step"


def test_a_provider_of_something_else_is_refused(groups, models, tmp_path):
    own = models("Qwen3")
    told = asdict(Case(**own, settings=settings_of("grpo")))
    file = written(tmp_path, own["policy"])
    with pytest.raises(AssertionError, match="the function gave back a dict, expected a module"):
        groups[1].call(f"{OWN}:probed", case=told, file=str(file), provider="wrong")


class Told:
    """What a run tells when a checkpoint is there."""

    def save(self, done, parts):
        return Path("checkpoints") / f"step_{done:06d}"

    def saved(self, done, path):
        pass


@pytest.mark.parametrize(
    ("save_hf", "exported", "told"),
    [
        (None, None, None),
        ("e-{rollout_id}", "e-3", "e-3"),
        ("e-{rollout_id}", "e-2", None),
        ("e", "e", None),
    ],
)
def test_a_checkpoint_is_told_with_the_export_of_its_step(save_hf, exported, told, tmp_path):
    file = tmp_path / "after.py"
    file.write_text(
        "def after(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):\n"
        "    args.calls.append((rollout_id, checkpoint_dir, hf_checkpoint_dir))\n"
    )
    args = ArgsView(RunConfig(), {}, calls=[])
    run = object.__new__(Run)
    run.policy, run.reporter, run.interrupt = object(), Told(), Interrupt()
    run.interrupt.signum = signal.SIGTERM
    run.config = RunConfig.model_validate({"checkpoint": {"save_hf": save_hf}})
    run.exported = None if exported is None else Path(exported)
    run.after_save = bind("custom_megatron_post_save_hook", f"{file}:after", args)
    run._parts = lambda evaluated, behind: {}
    run.saving = Saving(Told(), run._written)
    run._checkpoint(3, False)
    assert args.calls == [(2, "checkpoints/step_000003", told)]
