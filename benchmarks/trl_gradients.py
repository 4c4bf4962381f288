"""Our gradients beside TRL's: the same weights, batch and advantages under every loss of its
GRPOTrainer that we have too.

    .venv/bin/python benchmarks/trl_gradients.py                                # about a minute
    .venv/bin/python benchmarks/trl_gradients.py --write docs/benchmarks.md     # table into a page

TRL runs in an environment of its own, as in `vs_trl.py`. A difference is the largest entry of
(ours - TRL's), over the length of TRL's gradient; the check fails above 1e-5. Ours is taken
twice: the batch at once, and in micro-batches of two.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint import make_tokenizer
from benchmarks.compare import ROOT, ensure_peer, machine
from benchmarks.gradient_cases import CASES, Batch, Case, make_batch
from benchmarks.shapes import EOS_ID, PAD_ID, VOCAB_SIZE

ALLOWED = 1e-5
BEGIN, END = "<!-- trl: begin -->", "<!-- trl: end -->"
_SEED = 3


def make_model(directory: Path) -> Any:
    """A Qwen3 of 4 M parameters whose logits are far from flat."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(_SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.08,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model


def rows_of(batch: Batch, case: Case | None = None) -> list[Any]:
    """The batch as rows of ours."""
    from dovetail.batch.rows import TrainRow

    engine = batch.engine if case is not None and case.from_engine else None
    return [
        TrainRow(
            tokens=prompt + response,
            response_length=len(response),
            loss_mask=mask,
            rollout_logprobs=None if engine is None else engine[i],
            group_index=0,
            index=i,
        )
        for i, (prompt, response, mask) in enumerate(
            zip(batch.prompts, batch.responses, batch.masks, strict=True)
        )
    ]


def make_trainer(model: Any, batch: Batch, case: Case | None, micro_batch_size: int | None) -> Any:
    """One optimizer step over everything, with the batch's numbers for what others said."""
    import torch

    from dovetail.config.sections import AlgorithmConfig, BatchConfig, OptimizerConfig
    from dovetail.trainers.hooks import TrainHooks
    from dovetail.trainers.torch.backend import TorchBackend
    from dovetail.trainers.trainer import Trainer

    def given(rollout_id: int, data: dict[str, Any], samples: list[Any]) -> None:
        data["advantages"] = [
            torch.full((len(row),), value)
            for row, value in zip(batch.responses, batch.advantages, strict=True)
        ]
        data["log_probs"] = [torch.tensor(row) for row in batch.old]
        data["ref_log_probs"] = [torch.tensor(row) for row in batch.reference]

    batches, optimizer = BatchConfig(micro_batch_size=micro_batch_size), OptimizerConfig(lr=1e-3)
    return Trainer(
        TorchBackend(model, model, batches, optimizer, temperature=1.0, total_steps=None),
        AlgorithmConfig(**({} if case is None else case.own)),
        temperature=1.0,
        pad_token_id=PAD_ID,
        samples_per_optimizer_step=10**6,
        hooks=TrainHooks(postprocess=given),
    )


def own_gradient(
    model: Any, batch: Batch, case: Case, micro_batch_size: int | None
) -> dict[str, Any]:
    """What our optimizer would apply; the weights stay as they are."""
    import torch

    trainer = make_trainer(model, batch, case, micro_batch_size)
    optimizer, kept = trainer.backend.optimizer, {}
    real = optimizer.step

    def step() -> Any:
        for param in optimizer.params.values():
            optimizer.grad_for(param)
        kept.update({name: grad.clone() for name, grad in optimizer.main_grads.items()})
        # A gradient that is not finite is not applied.
        optimizer.main_grads[next(iter(optimizer.params))].fill_(torch.nan)
        return real()

    optimizer.step = step
    trainer.train(rows_of(batch, case))
    return kept


def difference(own: dict[str, Any], its: dict[str, Any]) -> float:
    """Largest entry of the difference, over the length of TRL's gradient."""
    length = sum(float(grad.double().square().sum()) for grad in its.values()) ** 0.5
    worst = max(float((own[name] - grad).abs().max()) for name, grad in its.items())
    return worst / length


def compare(directory: Path, peer: Path) -> list[tuple[Case, float, float]]:
    """Each case with its difference at once, and in micro-batches."""
    from safetensors.torch import load_file

    model = make_model(directory / "model")
    batch = make_batch(_SEED, VOCAB_SIZE)
    own = make_trainer(model, replace(batch, logprobs=[]), None, None).logprobs(rows_of(batch))
    batch = replace(batch, logprobs=own)
    batch.write(directory / "batch.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(peer), "-m", "benchmarks.trl_gradient_side", str(directory)]
    log = directory / "trl.log"
    with log.open("w") as file:
        made = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    if made.returncode:
        raise SystemExit(f"trl_gradients: TRL's side failed:\n{log.read_text()[-3000:]}")
    found = []
    for number, case in enumerate(CASES):
        its = load_file(directory / f"trl_{number}.safetensors")
        at_once, split = (
            difference(own_gradient(model, batch, case, size), its) for size in (None, 2)
        )
        found.append((case, at_once, split))
        print(f"{case.name:<40}{at_once:>12.1e}{split:>12.1e}", flush=True)
    return found


def _words(settings: dict[str, Any]) -> str:
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags.append(f"--{flag}" if value is True else f"--{flag} {value}")
    return f"`{' '.join(flags)}`" if flags else "the defaults"


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what is the default on both sides."""
    return {name: value for name, value in settings.items() if (name, value) not in _DEFAULTS}


def table(found: list[tuple[Case, float, float]]) -> str:
    """Markdown."""
    facts = machine()
    day = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"{day}, {facts['cpu']}, float32, TRL 1.16.0; largest entry of the difference over the "
        "length of TRL's gradient, at once and in micro-batches of two:",
        "",
        "| TRL | settings of ours | at once | split |",
        "|---|---|---|---|",
    ]
    for case, at_once, split in found:
        trl = ", ".join(f"{name}={value}" for name, value in _told(case.trl).items())
        lines.append(f"| `{trl}` | {_words(_told(case.own))} | {at_once:.0e} | {split:.0e} |")
    return "\n".join(lines)


_DEFAULTS = (("epsilon", 0.2), ("eps_clip", 0.2))


def main() -> int:
    parser = argparse.ArgumentParser(prog="trl_gradients.py", description=__doc__)
    parser.add_argument("--peer-python", type=Path, help="interpreter that has TRL")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dovetail_gradients_") as directory:
        found = compare(Path(directory), ensure_peer(arguments.peer_python))
    if arguments.write is not None:
        text = arguments.write.read_text()
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.write.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")
    bad = [case.name for case, *values in found if max(values) > ALLOWED]
    print(f"above {ALLOWED}: {', '.join(bad)}" if bad else f"all within {ALLOWED}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
