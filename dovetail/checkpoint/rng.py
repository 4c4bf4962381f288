"""The state of every random generator of this process, as plain data that a checkpoint can hold."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dovetail.types.errors import CheckpointError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (every device)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def capture_rng() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """States of Python's, numpy's and torch's global generators (CPU and every CUDA device)."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch_cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch_cuda_{index}"] = state
    facts = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "name": str(name),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
    }
    return tensors, facts


def restore_rng(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Set the generators to what `capture_rng` gave, so they draw the same numbers again.

    States of CUDA devices that this machine does not have are left out, with a warning.

    Raises:
        CheckpointError: the states are not those of `capture_rng`.
    """
    import numpy as np
    import torch

    try:
        python, numpy_facts = facts["python"], facts["numpy"]
        words = tuple(int(word) for word in tensors["python"].tolist())
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(
            (
                numpy_facts["name"],
                tensors["numpy"].numpy().astype(np.uint32),
                numpy_facts["position"],
                numpy_facts["has_gauss"],
                numpy_facts["cached_gaussian"],
            )
        )
        torch.set_rng_state(tensors["torch_cpu"].clone())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the random states of the checkpoint do not fit: {error!r}"
        ) from error
    _restore_cuda(tensors)


def _restore_cuda(tensors: Mapping[str, torch.Tensor]) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name, state in tensors.items():
        if not name.startswith("torch_cuda_"):
            continue
        index = int(name.rpartition("_")[2])
        if index < count:
            torch.cuda.set_rng_state(state.clone(), index)
        else:
            log.warning("the checkpoint has the random state of CUDA device %d, not here", index)
