"""New weights for a model in memory out of a Hugging Face directory: all of them, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dovetail.checkpoint.hf import read_in_silence
from dovetail.checkpoint.weight_files import weight_files
from dovetail.types.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SHOWN = 3


def read_weights(directory: Path, model: PreTrainedModel, cure: str) -> dict[str, torch.Tensor]:
    """The weights in `directory` under the names of `model`'s parameters, as many as it has.

    Nothing is written to `model`. Where its names are not those of the files (experts of one layer
    as one tensor, say), transformers turns them, in a second model of its kind.

    Raises:
        CheckpointError: a file is missing or damaged, a weight is missing, is one too many or has
            another shape.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for file in weight_files(directory, cure):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return fitted(found, model, f"the weights in {directory}", cure)


def own_names(model: PreTrainedModel) -> dict[str, str]:
    """Every name of a parameter, tied ones too -> the first name of the same parameter."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def fitted(
    found: dict[str, torch.Tensor], model: PreTrainedModel, what: str, cure: str
) -> dict[str, torch.Tensor]:
    """Weights by the names of Hugging Face files -> by those of `model`'s parameters.

    Args:
        what: first words of every message.

    Raises:
        CheckpointError: as `read_weights`.
    """
    own, names = dict(model.named_parameters()), own_names(model)
    if found.keys() <= names.keys() and {names[name] for name in found} == own.keys():
        found = {names[name]: tensor for name, tensor in found.items()}
    else:
        found = _converted(found, model, what, cure)
    wrong = [name for name, tensor in found.items() if own[name].shape != tensor.shape]
    if wrong:
        got, wanted = tuple(found[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise CheckpointError(
            f"{what} are of another model: {len(wrong)} have another shape, "
            f"e.g. {wrong[0]} is {got}, expected {wanted}. {cure}"
        )
    return found


def _converted(
    found: dict[str, torch.Tensor], model: PreTrainedModel, what: str, cure: str
) -> dict[str, torch.Tensor]:
    def read() -> tuple[PreTrainedModel, dict[str, set[str]]]:
        return type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=found,
            dtype=model.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    made, told = read_in_silence(read, what.removeprefix("the "))
    wrong = {
        "have another shape": told.get("mismatched_keys"),
        "are none of this model's": told.get("unexpected_keys"),
        "are missing": told.get("missing_keys"),
    }
    for how, names in wrong.items():
        if names:
            some = ", ".join(sorted(map(str, names))[:_SHOWN])
            raise CheckpointError(
                f"{what} are of another model: {len(names)} {how}, e.g. {some}. {cure}"
            )
    return {name: tensor.detach() for name, tensor in made.named_parameters()}
