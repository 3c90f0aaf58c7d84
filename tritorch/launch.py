"""Launches kernels: which configuration, on which device, under which of Triton's modes.

Knows no op.  Kernels are imported when the first one is launched, so that the reference path needs
no Triton.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from tritorch import backend
from tritorch.testing import dry, interpreter

_overrides: dict[str, Any] = {}
_recorders: list[list[str]] = []
_choices: list[list[tuple[str, Any]]] = []


class Family:
    """The names of `tritorch.kernels.<family>`, imported when the first of them is asked for.

    Not importlib's lazy module: `inspect` looks at every module that Python knows, and so would
    import Triton.
    """

    def __init__(self, family: str) -> None:
        self._module = f"tritorch.kernels.{family}"

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        # later look-ups do not come here
        setattr(self, name, value)
        return value


def kernels(family: str) -> Family:
    """The device code of a family of ops, without importing it yet."""
    return Family(family)


def config(choose: Callable[..., Any], *sizes: int) -> Any:
    """The configuration for these sizes: the forced one inside `override`, else what `choose` says.

    `choose` is a kernel module's plain function `<kernel>_config`, from integers to a
    `triton.Config`.
    """
    name = choose.__name__
    chosen = _overrides[name] if name in _overrides else choose(*sizes)
    for record in _choices:
        record.append((name, chosen))
    return chosen


@contextlib.contextmanager
def override(name: str, forced: Any) -> Iterator[None]:
    """Inside the block the function `name` (`matmul_config`, ...) always chooses `forced`."""
    previous = _overrides.get(name)
    _overrides[name] = forced
    try:
        yield
    finally:
        if previous is None:
            del _overrides[name]
        else:
            _overrides[name] = previous


@contextlib.contextmanager
def choices() -> Iterator[list[tuple[str, Any]]]:
    """Collects (name of the choosing function, configuration) of the launches inside the block."""
    record: list[tuple[str, Any]] = []
    _choices.append(record)
    try:
        yield record
    finally:
        _choices.remove(record)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Collects the names of the kernels launched inside the block, in order."""
    names: list[str] = []
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    on: Tensor,
    config: Any = None,
    **constants: Any,
) -> None:
    """Launches `kernel` over `grid` on the device of `on`; a grid with a zero launches nothing.

    `constants` are the kernel's `tl.constexpr` parameters (and num_warps where there is no
    `config`).
    """
    if 0 in grid:
        return
    for names in _recorders:
        names.append(kernel.__name__)
    if config is not None:
        constants |= config.kwargs
        constants["num_warps"] = config.num_warps
        constants["num_stages"] = _num_stages(config.num_stages)
        if config.maxnreg is not None and not is_amd():
            constants["maxnreg"] = config.maxnreg
    if on.is_cuda:
        # a launch goes to the current device, which need not be the tensor's
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **constants)
    elif backend.INTERPRETING:
        with interpreter.corrected():
            kernel[grid](*arguments, **constants)
    elif dry.active() is not None:
        kernel[grid](*arguments, **constants)
    else:
        raise RuntimeError(
            f"launch: {kernel.__name__} needs a CUDA tensor, or TRITON_INTERPRET=1 in the "
            f"environment before Python starts, received a tensor on {on.device}"
        )


def _num_stages(stages: int) -> int:
    # AMD's pipeliner counts the stage being computed: two is its double buffering, more overflows
    # 64 KiB
    return min(stages, 2) if is_amd() else stages


def is_amd() -> bool:
    """Whether kernels compile for an AMD GPU."""
    target = dry.active()
    return target.backend == "hip" if target is not None else torch.version.hip is not None


def input_precision(dtype: torch.dtype, family: Literal["matmul", "conv"]) -> str:
    """Triton's `input_precision` of a product: TF32 for float32 where torch's own flag of the
    family allows it.
    """
    # the newer flags also answer for `allow_tf32`, which raises once a program has set one of them
    backends: Any = torch.backends
    flags = backends.cuda.matmul if family == "matmul" else backends.cudnn.conv
    return "tf32" if dtype == torch.float32 and flags.fp32_precision == "tf32" else "ieee"
