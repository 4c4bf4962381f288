"""What goes on around Megatron's steps: the memory that it gives up between them, models that
another backend goes on with, checkpoints without ranks."""

import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dovetail.checkpoint.hf_export import save_hf_tensors
from dovetail.checkpoint.manager import CheckpointManager
from dovetail.cli.main import main
from tests.contract.test_megatron_contract import (
    EP,
    MAKE,
    MOE,
    PP,
    TP,
    alone,
    groups,
    models,
    settings_of,
)
from tests.contract.test_trainer_contract import HERE, same_metrics, same_weights
from tests.contract.trained import STEPS, Case, load, maker, rows_of
from tests.loop.tiny import make_tokenizer

pytestmark = pytest.mark.xdist_group("megatron between")

__all__ = ["alone", "groups", "models"]
OWN = "tests.contract.test_megatron_between"
TORCH = f"{HERE}:alone"


def resting(rank, world, make, case):
    """As `trained.trained`, with the device's memory given up before every step and after it."""
    trainer = maker(make)(rank, world, Case(**case))
    models = [trainer.backend.policy, trainer.backend.reference]
    metrics, left = [], set()
    for step in range(STEPS):
        trainer.offload()
        held = [p for its in models for chunk in its.chunks for p in chunk.parameters()]
        left |= {p.untyped_storage().nbytes() for p in held}
        trainer.onload()
        metrics.append(trainer.train(rows_of(step), step))
    weights = {name: tensor.flatten().tolist() for name, tensor in trainer.backend.hf_tensors()}
    return {"metrics": metrics, "weights": weights, "left": sorted(left)}


@pytest.mark.parametrize("layout", [{}, TP], ids=["dp=2", "tp=2"])
def test_memory_is_given_up_between_steps_and_taken_again(layout, groups, models, alone):
    case = "minibatches and KL"
    told = asdict(Case(**models("Qwen3"), settings=settings_of(case), layout=layout))
    expected = alone("Qwen3", case)
    for rank in groups[2].call(f"{OWN}:resting", make=MAKE, case=told):
        assert rank["left"] == [0]
        same_metrics(rank["metrics"], expected["metrics"])
        same_weights(rank["weights"], expected["weights"])


def exported(rank, world, make, case, path):
    """Two steps, then a Hugging Face directory."""
    case = Case(**case)
    trainer = maker(make)(rank, world, case)
    metrics = [trainer.train(rows_of(step), step) for step in range(2)]
    tensors = trainer.backend.hf_tensors()
    save_hf_tensors(load(case.policy), tensors, None, path, writes=rank == 0)
    if world > 1:
        dist.barrier()
    return metrics


BETWEEN = {
    "torch to Megatron tp=2": ((TORCH, 1, {}), (MAKE, 2, TP)),
    "Megatron pp=2 to torch": ((MAKE, 2, PP), (TORCH, 1, {})),
}


@pytest.mark.parametrize("change", BETWEEN)
def test_what_one_backend_exports_another_trains_on_with(change, groups, models, tmp_path):
    def run(function, who, case, **how):
        make, world, layout = who
        told = asdict(Case(**{**case, "layout": layout}))
        if world == 1:
            return [maker(function)(0, 1, make=make, case=told, **how)]
        return groups[world].call(function, make=make, case=told, **how)

    def there_and_on(first, later, path):
        case = {**models("Qwen3"), "settings": settings_of("grpo")}
        before = run(f"{OWN}:exported", first, case, path=str(path))[0]
        case = {**case, "policy": str(path)}
        ranks = run(f"{HERE}:trained", later, case, steps=(2, STEPS))
        return before, ranks

    alone = (TORCH, 1, {})
    before, ranks = there_and_on(*BETWEEN[change], tmp_path / "changed")
    as_before, expected = there_and_on(alone, alone, tmp_path / "alone")
    same_metrics(before, as_before)
    for rank in ranks:
        same_metrics(rank["metrics"], expected[0]["metrics"])
    same_weights(ranks[0]["weights"], expected[0]["weights"])


def origin(models, architecture):
    """The policy's directory, with what an export needs beside weights."""
    path = Path(models(architecture)["policy"])
    make_tokenizer(path)
    return path


def weights(path):
    return {name: p.flatten().tolist() for name, p in load(path).state_dict().items()}


SAVED = {"tp=2": ("Qwen3", TP), "pp=2": ("Qwen3", PP), "ep=2": (MOE, EP)}


@pytest.mark.parametrize("layout", SAVED)
def test_what_ranks_saved_is_exported_by_one_process(layout, groups, models, tmp_path):
    architecture, its = SAVED[layout]
    path = origin(models, architecture)
    told = asdict(Case(**models(architecture), settings=settings_of("grpo"), layout=its))
    # As a run's ranks do it: a trainer's state has a folder for the policy.
    (state := tmp_path / "state").mkdir()
    ranks = groups[2].call(
        f"{HERE}:trained", make=MAKE, case=told, steps=(0, 1), save_into=str(state)
    )

    def write(directory):
        (state / "policy").rename(directory / "policy")
        return ranks[0]["facts"]

    facts = {"hf_checkpoint": str(path), "dtype": "float32", "trust_remote_code": False}
    manager = CheckpointManager(tmp_path / "checkpoints", keep=1)
    saved = manager.save(1, {"loop": ({}, facts), "policy": write})
    plain = saved / "policy" / "policy"
    for words in ([saved], ["--origin", path, plain]):
        target = tmp_path / f"export{len(words)}"
        assert main(["convert", *map(str, words), str(target)]) == 0
        found = {name: t for name, t in _files(target).items() if name in ranks[0]["weights"]}
        same_weights(found, ranks[0]["weights"], 0)


def _files(path):
    from safetensors.torch import load_file

    return {name: t.flatten().tolist() for name, t in load_file(path / "model.safetensors").items()}


@pytest.mark.parametrize("architecture", ["Qwen3", "Llama", MOE])
def test_weights_go_into_megatrons_form_and_back_unchanged(architecture, models, tmp_path):
    path = origin(models, architecture)
    there, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert main(["convert", "--to-megatron", str(path), there]) == 0
    assert main(["convert", "--origin", str(path), there, back]) == 0
    same_weights(weights(back), weights(path), 0)
    assert not dist.is_initialized()


def test_what_can_not_be_converted_is_told(models, tmp_path, capfd):
    path, other = origin(models, "Qwen3"), origin(models, MOE)
    there = tmp_path / "megatron"
    assert main(["convert", "--to-megatron", str(path), str(there)]) == 0
    wrong = {
        "is damaged or of another model": ["--origin", other, there],
        "is no checkpoint of Megatron's": ["--origin", path, path],
        "expected 3": ["--origin", path, there],
        "does not know --to-torch": ["--to-torch", path],
    }
    for said, words in wrong.items():
        given = [*map(str, words), str(tmp_path / "new")] if said != "expected 3" else words[:3]
        assert main(["convert", *map(str, given)]) in (1, 2)
        assert said in (error := capfd.readouterr().err), error
        assert "Traceback" not in error and not (tmp_path / "new").exists()
    table = there / ".metadata"
    table.write_bytes(table.read_bytes()[:100])
    assert main(["convert", "--origin", str(path), str(there), str(tmp_path / "new")]) == 1
    assert "damaged" in capfd.readouterr().err
    assert not dist.is_initialized() and torch.is_grad_enabled()


def _change(there, kinds):
    """What its table says that things are."""
    file = there / ".metadata"
    table = pickle.loads(file.read_bytes())
    table.state_dict_metadata.update(dict.fromkeys(kinds, BytesStorageMetadata()))
    file.write_bytes(pickle.dumps(table))


def test_objects_beside_weights_are_not_read_and_none_may_stand_for_a_weight(
    models, tmp_path, capfd
):
    path, there = origin(models, "Qwen3"), tmp_path / "megatron"
    assert main(["convert", "--to-megatron", str(path), str(there)]) == 0
    words = ["convert", "--origin", str(path), str(there)]
    table = pickle.loads((there / ".metadata").read_bytes()).state_dict_metadata
    assert not [name for name, one in table.items() if isinstance(one, BytesStorageMetadata)]
    _change(there, ["rng_state/shard_0_1", "decoder.layers._extra_state/shard_0.1_2.2"])
    assert main([*words, str(tmp_path / "back")]) == 0
    same_weights(weights(tmp_path / "back"), weights(path), 0)
    name = next(one for one in table if one.endswith("weight"))
    _change(there, [name])
    assert main([*words, str(tmp_path / "new")]) == 1
    assert f"keeps '{name}' as a pickle" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
