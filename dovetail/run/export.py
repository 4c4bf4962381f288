"""A checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from dovetail.checkpoint import hf
from dovetail.checkpoint.manager import load_checkpoint
from dovetail.run.restored import restore_policy
from dovetail.types import CheckpointError


def export_checkpoint(source: Path, target: Path) -> Path:
    """Write the policy of `source` (a checkpoint, or a directory of them: the newest good one).

    Architecture and tokenizer are those of the model that the run started from.

    Raises:
        CheckpointError: there is no good checkpoint, or the model it started from is gone.
        ConfigError: something else is in the place of `target`.
    """
    hf.check_export_path(target)
    checkpoint = load_checkpoint(source)
    facts = checkpoint.part("loop")[1]
    origin = Path(facts["hf_checkpoint"])
    if not origin.is_dir():
        raise CheckpointError(
            f"{checkpoint.path} was trained from {origin}, which is gone; its configuration and "
            "tokenizer are needed to write a Hugging Face directory. Put it back there"
        )
    trust = bool(facts["trust_remote_code"])
    model = hf.load_model(origin, facts["dtype"], "cpu", trust)
    restore_policy(model, checkpoint)
    return hf.save_hf(model, hf.load_tokenizer(origin, trust), target)
