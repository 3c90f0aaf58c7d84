"""What kernels are chosen and compiled for: the device of a tensor, or the one that stands in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch import backend
from tritorch.testing import dry

# the capability that the interpreter takes kernels for
pretended = 80


def capability(on: Tensor) -> int:
    """Compute capability that kernels on the device of `on` are chosen for: 80, 90, 100, ...

    That of the GPU, or of the dry driver's target; 0 for AMD.  The interpreter has that of the
    portable kernels, 80, except inside `pretend`.
    """
    if backend.INTERPRETING:
        return pretended
    target = dry.active()
    if target is not None:
        return target.arch if isinstance(target.arch, int) else 0
    return _device_capability(on.get_device()) if on.is_cuda else 0


@functools.cache
def _device_capability(device: int) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def pretend(capability: int) -> Iterator[None]:
    """Inside the block the interpreter takes the kernels of GPUs of this compute capability."""
    global pretended
    previous, pretended = pretended, capability
    try:
        yield
    finally:
        pretended = previous


def is_amd() -> bool:
    """Whether kernels compile for an AMD GPU."""
    target = dry.active()
    return target.backend == "hip" if target is not None else torch.version.hip is not None


def options(config: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Constants, and what a configuration adds to them, as Triton takes them by keyword."""
    if config is None:
        return constants
    found: dict[str, Any] = constants | config.kwargs
    found["num_warps"] = config.num_warps
    found["num_stages"] = _num_stages(config.num_stages)
    if config.maxnreg is not None and not is_amd():
        found["maxnreg"] = config.maxnreg
    return found


def _num_stages(stages: int) -> int:
    # AMD's pipeliner counts the stage being computed: two is its double buffering, more overflows
    # 64 KiB
    return min(stages, 2) if is_amd() else stages
