"""Which path an op takes: the Triton kernels or the plain-PyTorch reference.

The choice is made above torch's dispatcher, by one `if` in each public op, so that the reference
keeps
torch's own autograd and is an independent oracle for the kernels.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Choice = Literal["auto", "triton", "reference"]

# read once: Triton itself looks at the variable only while it is imported
_YES = ("1", "true", "on", "yes")
INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in _YES
# whether calls of layouts seen before are repeated, without the way through every line of their op
REPEATING: bool = os.environ.get("TRITORCH_REPEATS", "1").lower() in _YES
HAS_TRITON: bool = importlib.util.find_spec("triton") is not None

_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))

_NESTED = "a nested tensor"

_choice: Choice = "auto"
_strict: bool = False
_fallbacks: Counter[tuple[str, str]] = Counter()


class FallbackError(RuntimeError):
    """Raised under `strict` when an op would leave the kernels for the reference path."""


class use:
    """Chooses the path of every later call: `use("reference")`, or `with use("triton"):` for a
    block.

    "auto" (the default) takes the kernels for CUDA tensors, and for CPU tensors when Triton's
    interpreter
    is on; "triton" takes them for every tensor; "reference" never does.  Process-wide, like torch's
    flags.
    """

    def __init__(self, choice: Choice) -> None:
        if choice not in ("auto", "triton", "reference"):
            raise ValueError(
                f"backend.use: expects 'auto', 'triton' or 'reference', received {choice!r}"
            )
        global _choice
        self._previous = _choice
        _choice = choice

    def __enter__(self) -> use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _choice
        _choice = self._previous


class strict:
    """Makes a fallback to the reference path an error: `strict()`, `strict(False)` or `with
    strict():`.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _strict
        self._previous = _strict
        _strict = enabled

    def __enter__(self) -> strict:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _strict
        _strict = self._previous


def current() -> Choice:
    """The choice in force."""
    return _choice


def explain() -> dict[str, dict[str, int]]:
    """How often each op took the reference path, by reason, since the last `reset`."""
    table: dict[str, dict[str, int]] = {}
    for (op, reason), count in sorted(_fallbacks.items()):
        table.setdefault(op, {})[reason] = count
    return table


def reset() -> None:
    """Forgets the counts of `explain`."""
    _fallbacks.clear()


def runs_triton(op: str, *tensors: Tensor | None, declined: str | None = None) -> bool:
    """Whether this call takes the kernels.

    `declined` is the op's own reason for not taking the call; with it, or with tensors that no
    kernel takes,
    the call goes to the reference path, is counted under its reason, and raises under `strict`.
    """
    if _choice == "reference":
        return False
    if not (
        _choice == "triton" or INTERPRETING or any(t is not None and t.is_cuda for t in tensors)
    ):
        return False
    reason = declined or _reason(tensors)
    if reason is None:
        return True
    if _strict:
        raise FallbackError(f"{op}: the kernels do not take this call: {reason}")
    if not torch.compiler.is_compiling():
        _fallbacks[op, reason] += 1
    return False


def takes_nested(op: str, tensor: Tensor) -> bool:
    """Whether it is a nested tensor: one for the reference path, without a shape to check."""
    return tensor.is_nested and not runs_triton(op, tensor, declined=_NESTED)


def _computes(kind: type[Tensor]) -> bool:
    """Whether a subclass says itself what torch's ops do to it, as DTensor and quantized weights:
    of ours it knows none.
    """
    # torch's own know every op that has shapes
    is_torchs = kind.__module__.startswith("torch._subclasses.")
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_torchs


def _reason(tensors: tuple[Tensor | None, ...]) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.is_nested:
            return _NESTED
        if tensor.layout != torch.strided:
            return f"layout {str(tensor.layout).removeprefix('torch.')}"
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter and _computes(kind):
            return f"a {kind.__name__}, which computes torch's ops by itself"
    # its graphs hold numbers where our ops take lists, and are run where we are not
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording"
    # the kernels know no tangents
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    # neither do transforms know what kernels differentiate, nor the compiler that traces them
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    return None
