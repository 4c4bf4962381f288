"""Every training backend, on any number of ranks, makes the steps that one process makes.

A row: who makes the trainer of one rank (see `trained`), on how many ranks, in which layout, and
the cases that it is held to (all of them by default).
"""

from dataclasses import KW_ONLY, asdict, dataclass, field

import pytest
import torch

from tests.contract.ranks import PATIENCE_S, Ranks
from tests.contract.special import REPLAY, specially
from tests.contract.trained import (
    CASES,
    WITH_MORE_MODELS,
    Case,
    load,
    saved_behind,
    settings_of,
    trained,
    write_models,
)

pytestmark = [pytest.mark.xdist_group("torch ranks"), pytest.mark.timeout(PATIENCE_S + 60)]

APART = 1e-4
HERE = "tests.contract.trained"


@dataclass(frozen=True)
class Row:
    make: str
    world: int = 2
    layout: dict = field(default_factory=dict)
    cases: tuple = tuple(CASES)
    _: KW_ONLY
    apart: float = APART
    alone: str = f"{HERE}:alone"
    """Who makes the trainer of the one process that it is compared with."""
    architecture: str = "Qwen3"


SOME = ("grpo", "minibatches and KL", "sequences", *WITH_MORE_MODELS)
TORCH = "tests.contract.torch_made:sharded"
ROWS = {
    "torch, 2 ranks FSDP2": Row(TORCH, cases=(*CASES, *WITH_MORE_MODELS)),
    "torch, tp 2": Row(TORCH, layout={"tensor_model_parallel_size": 2}, cases=SOME),
    "torch, cp 2": Row(TORCH, layout={"context_parallel_size": 2}, cases=SOME),
    "torch, 2 copies": Row(TORCH, layout={"dp_replicate_size": 2}, cases=("grpo",)),
    "torch, experts": Row(TORCH, cases=("minibatches and KL",), architecture="Qwen3Moe"),
    "torch, untied": Row(TORCH, cases=("grpo",), architecture="Llama"),
    "torch, capped logits": Row(TORCH, cases=("grpo",), architecture="Gemma2"),
    "torch, experts, tp 2": Row(
        TORCH,
        layout={"tensor_model_parallel_size": 2},
        cases=("grpo",),
        architecture="Qwen3Moe",
    ),
    "torch, LoRA": Row(
        TORCH,
        layout={"lora_rank": 4},
        cases=("minibatches and KL", "sequences"),
        alone="tests.contract.torch_made:adapted",
    ),
    "torch, recomputed": Row("tests.contract.torch_made:recomputing", cases=("grpo",)),
    "torch, passes in bfloat16": Row(
        "tests.contract.torch_made:low",
        cases=("grpo",),
        alone="tests.contract.torch_made:low_alone",
        apart=0.1,
    ),
    "torch, CPU offload": Row(TORCH, layout={"fsdp_cpu_offload": True}, cases=("grpo",)),
    "torch, 2 ranks replicated": Row(f"{HERE}:replicated", cases=("grpo", "sequences")),
}
PAIRS = [(row, case) for row, its in ROWS.items() for case in its.cases]


@pytest.fixture(scope="module")
def pair():
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of policy and reference by architecture."""
    made = {}

    def of(architecture):
        if architecture not in made:
            made[architecture] = write_models(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return of


@pytest.fixture(scope="module")
def alone(models):
    """What one process makes of a case."""
    made = {}

    def of(row, case):
        key = (row.architecture, row.alone, case)
        if key not in made:
            told = Case(**models(row.architecture), settings=settings_of(case), layout=row.layout)
            made[key] = trained(0, 1, row.alone, asdict(told))
        return made[key]

    return of


@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_it_makes_the_steps_of_one_process(row, case, pair, models, alone):
    row = ROWS[row]
    told = Case(**models(row.architecture), settings=settings_of(case), layout=row.layout)
    ranks = pair.call(f"{HERE}:trained", make=row.make, case=asdict(told))
    expected = alone(row, case)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"], row.apart)
    same_weights(ranks[0]["weights"], expected["weights"], row.apart)


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["dp", "tp"])
@pytest.mark.parametrize("what", REPLAY)
def test_experts_that_one_rank_recorded_are_replayed_by_all(what, layout, pair, models):
    # A small budget: rows come into other micro-batches, on another rank, from pass to pass.
    own = {**settings_of("grpo"), **REPLAY[what], "batch": {"max_tokens_per_gpu": 40}}
    told = {**models("Qwen3Moe"), "settings": own}
    given = {"make": TORCH, "case": {**told, "layout": layout}, "what": what}
    ranks = pair.call("tests.contract.special:specially", **given)
    expected = specially(0, 1, f"{HERE}:alone", told, what)
    for rank in ranks:
        same_metrics(rank["metrics"], expected["metrics"])
        # Counted over all ranks; which tokens of prompts are shared is the matter of a plan.
        assert rank["replaced"] == ranks[0]["replaced"]
        assert rank["replaced"] == pytest.approx(expected["replaced"], abs=0.05)
    same_weights(ranks[0]["weights"], expected["weights"])
    assert max(expected["replaced"]) > 0, "nothing was replayed that a router would not choose"


SAVED = {
    "dp 2": {},
    "tp 2": {"tensor_model_parallel_size": 2},
    "cp 2": {"context_parallel_size": 2},
    "1 rank": None,
}
"""Layouts of a torch state, in the order in which it goes through them; None: one process."""
SAVED_ADAPTERS = {name: SAVED[name] for name in ("dp 2", "1 rank", "cp 2")}


@pytest.mark.parametrize(
    ("layouts", "own_layout", "alone"),
    [
        (SAVED, {}, f"{HERE}:alone"),
        (SAVED_ADAPTERS, {"lora_rank": 4}, "tests.contract.torch_made:adapted"),
    ],
    ids=["weights", "LoRA"],
)
def test_a_state_goes_from_layout_to_layout(layouts, own_layout, alone, pair, models, tmp_path):
    own, settings = models("Qwen3"), settings_of("grpo")
    state, weights = None, None
    for step, (name, layout) in enumerate(layouts.items()):
        told = {
            "case": asdict(Case(**own, settings=settings, layout={**own_layout, **(layout or {})})),
            "steps": (step, step + 1),
            "load_from": state,
            "save_into": str(tmp_path / name),
        }
        if layout is None:
            ranks = [trained(0, 1, alone, **told)]
        else:
            ranks = pair.call(f"{HERE}:trained", make=TORCH, **told)
        assert all(rank["facts"] == ranks[0]["facts"] for rank in ranks)
        state, weights = (str(tmp_path / name), ranks[0]["facts"]), ranks[0]["weights"]
    told = asdict(Case(**own, settings=settings, layout=own_layout))
    expected = trained(0, 1, alone, told, steps=(0, len(layouts)))
    same_weights(weights, expected["weights"])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(layout, pair, models):
    told = asdict(Case(**models("Qwen3"), settings=settings_of("grpo"), layout=layout))
    ranks = pair.call(f"{HERE}:not_finite", make=TORCH, case=told)
    assert ranks == [{"skipped": 1.0, "same": True, "changed": False}] * 2


def test_training_goes_on_while_a_state_is_written(pair, models, tmp_path):
    told = asdict(Case(**models("Qwen3"), settings=settings_of("grpo")))
    for folder in ("whole", "behind"):
        (tmp_path / folder).mkdir()
    saved = pair.call(f"{HERE}:saved_behind", make=TORCH, case=told, directory=str(tmp_path))
    assert saved == [True, True]


def test_a_file_that_one_rank_can_not_write_is_told_alike_on_all(pair, models, tmp_path):
    told = asdict(Case(**models("Qwen3"), settings=settings_of("grpo")))
    for folder in ("spoilt", "whole"):
        (tmp_path / folder).mkdir()
    given = {"case": told, "directory": str(tmp_path)}
    answers = pair.call(f"{HERE}:not_saved_behind", make=TORCH, **given)
    assert answers[0] == answers[1]
    said, whole = answers[0]
    assert "the trainer's state was not written" in said and whole


def test_one_process_alone_writes_in_the_background_too(models, tmp_path):
    told = asdict(Case(**models("Qwen3"), settings=settings_of("grpo")))
    for folder in ("whole", "behind"):
        (tmp_path / folder).mkdir()
    assert saved_behind(0, 1, f"{HERE}:alone", told, str(tmp_path))


PIECES = {
    "FSDP2": ({}, "Qwen3", {}),
    "tp 2": ({"tensor_model_parallel_size": 2}, "Qwen3", {}),
    "experts": ({}, "Qwen3Moe", {}),
    "LoRA": ({"lora_rank": 4}, "Qwen3", {}),
    "CPU offload": ({"fsdp_cpu_offload": True}, "Qwen3", {}),
    "bfloat16": ({}, "Qwen3", {"low": True}),
}


@pytest.mark.parametrize("what", PIECES)
def test_no_more_than_the_buffer_is_gathered_at_a_time(what, pair, models):
    layout, architecture, how = PIECES[what]
    make = "tests.contract.torch_made:low" if how else TORCH
    told = Case(**models(architecture), settings=settings_of("grpo"), layout=layout)
    # A layer has 31 kB, half of it in bfloat16; the embedding 7.8, the experts of a layer 24.6.
    for most_bytes in (8_000, 14_000):
        given = {"make": make, "case": asdict(told), "most_bytes": most_bytes}
        for same, most in pair.call(f"{HERE}:in_pieces", **given):
            assert same
            assert 0 < most <= max(most_bytes, 24_576 if architecture == "Qwen3Moe" else 0)


def test_an_export_is_what_the_ranks_hold(pair, models, tmp_path):
    told = asdict(Case(**models("Qwen3Moe"), settings=settings_of("grpo")))
    place = str(tmp_path / "exported")
    weights = pair.call(f"{HERE}:exported", make=TORCH, case=told, path=place)[0]
    got = {name: p.flatten().tolist() for name, p in load(place).state_dict().items()}
    assert got == weights


def same_metrics(got_steps, want_steps, apart=APART):
    for got, want in zip(got_steps, want_steps, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            if name != "train/model_tokens":
                assert got[name] == pytest.approx(want[name], rel=apart, abs=apart / 10), name


def same_weights(got, want, apart=APART):
    assert got.keys() == want.keys()
    for name, values in want.items():
        torch.testing.assert_close(
            torch.tensor(got[name]), torch.tensor(values), rtol=0, atol=apart, msg=name
        )
