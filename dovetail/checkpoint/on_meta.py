"""Models whose weights have no numbers yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Modules made in the block have parameters on the meta device, and buffers as they are."""
    usual: Any = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        usual(module, name, param)

    setattr(torch.nn.Module, "register_parameter", register)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.nn.Module, "register_parameter", usual)  # noqa: B010
