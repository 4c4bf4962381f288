"""`utils.tensorboard_utils`: a plugin's own TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from dovetail.compat.modules.metrics import numbers_of

__all__ = ["_TensorboardAdapter"]


class _TensorboardAdapter:
    """One for the process: every call gives the same.

    Writes to `tensorboard_log/<tb_project_name>/<tb_experiment_name>`, below `args.tb_dir` if there
    is one.
    """

    _instance: ClassVar[_TensorboardAdapter | None] = None
    _writer: Any

    def __new__(cls, args: Any) -> _TensorboardAdapter:
        if cls._instance is None:
            from torch.utils.tensorboard import SummaryWriter

            names = [
                getattr(args, name, None) for name in ("tb_project_name", "tb_experiment_name")
            ]
            folder = Path(getattr(args, "tb_dir", None) or "tensorboard_log")
            made = super().__new__(cls)
            made._writer = SummaryWriter(str(folder.joinpath(*(n for n in names if n))))
            cls._instance = made
        return cls._instance

    def log(self, data: Mapping[str, Any], step: int | None) -> None:
        """Write the numbers of `data` at `step`."""
        for name, value in numbers_of(data).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file; the next call opens another."""
        self._writer.close()
        type(self)._instance = None

    @classmethod
    def finish_all(cls) -> None:
        """Close the file, if there is one."""
        if cls._instance is not None:
            cls._instance.finish()
