"""Who hears of what a call launches, and of what it is composed of, to do it again."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Watcher(Protocol):
    """Hears of what a call does besides what torch hears of."""

    def launches(
        self, prepared: Any, on: Tensor, tensors: tuple[Any, ...], floats: tuple[float, ...]
    ) -> None:
        """Of a launch of a `launch.Prepared`, which is left to the watcher."""

    def writes(self, tensors: tuple[Tensor, ...]) -> None:
        """Of tensors whose versions have counted a write."""


class Composer(Protocol):
    """Hears of what a call with a gradient is composed of."""

    def apply(self, function: type[Any], arguments: tuple[Any, ...]) -> Any:
        """Of a node, which is left to the composer."""

    def cast(self, tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        """Of a cast, likewise."""

    def writes(self, tensors: tuple[Tensor, ...]) -> None:
        """Of tensors whose versions have counted a write."""
