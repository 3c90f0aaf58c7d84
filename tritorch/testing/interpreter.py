"""Triton's interpreter, corrected: so that what passes on a CPU passes on a GPU.

The interpreter computes bfloat16 as integers, keeps NaN where a GPU drops it, gives masked lanes a
harmless zero and takes tiles that no compiler takes.  `corrected()` mends this for the launches
inside it and leaves Triton untouched outside; the corrections are in `corrections.py`.  What makes
interpreted kernels faster without another value is in `shortcuts.py`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritorch.testing import corrections, shortcuts

if TYPE_CHECKING:
    import triton.language as tl

_depth: int = 0


def interpreting() -> bool:
    """Whether kernels are interpreted: TRITON_INTERPRET=1 was set when Triton was imported."""
    cdiv = getattr(sys.modules.get("triton.language"), "cdiv", None)
    if cdiv is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return type(cdiv).__name__ == "InterpretedFunction"


class corrected:
    """Corrects the interpreter for the launches inside: `with corrected(): kernel[grid](...)`.

    Nests, and restores every attribute of Triton when the outermost block ends.

    tf32: True makes `tl.dot` read float32 operands as TF32 where its `input_precision` is "tf32",
    as a tensor core does: the low 13 bits of the significand are dropped.  False keeps them, and
    None (the default) does as the enclosing block does.  An outermost block keeps them: the exact
    product is the closest to the truth, and a test of TF32 can ask for its loss.

    Raises RuntimeError where kernels are not interpreted, and where the installed Triton lacks a
    private part that the corrections need.
    """

    def __init__(self, *, tf32: bool | None = None) -> None:
        self._tf32 = tf32

    def __enter__(self) -> None:
        global _depth
        if _depth == 0:
            if not interpreting():
                raise RuntimeError(
                    "interpreter.corrected: the kernels of this process are not interpreted; "
                    "set TRITON_INTERPRET=1 in the environment before Python starts"
                )
            corrections.patch()
            shortcuts.patch()
        _depth += 1
        self._outer = corrections.tf32
        if self._tf32 is not None:
            corrections.tf32 = self._tf32

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _depth
        corrections.tf32 = self._outer
        _depth -= 1
        if _depth == 0:
            shortcuts.restore()
            corrections.restore()


def self_test() -> list[str]:
    """Runs a tiny kernel per correction and says in words what is wrong; an empty list is good."""
    failures = []
    try:
        with corrected():
            kernel = _probe_kernel()
            for case in _cases():
                failures += _failure(kernel, *case)
    except RuntimeError as error:
        # nothing is interpreted, or a private part is missing
        failures.append(str(error))
    return failures


def _probe(x_ptr, y_ptr, out_ptr, n, scale, OPERATION: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    if OPERATION == "loop":
        for step in range(n):
            tl.store(out_ptr + step, tl.load(x_ptr + step))
    elif OPERATION == "index":
        for step in range(n):
            tl.store(out_ptr + step.to(tl.int64), tl.load(x_ptr + step))  # type: ignore[attr-defined]
    elif OPERATION == "arithmetic":
        x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
        tl.store(out_ptr + i, tl.where(x < y, -x * y, x - tl.abs(y)) + 0.3)
    elif OPERATION == "full":
        tl.store(out_ptr + i, tl.full((16,), 0.3, out_ptr.dtype.element_ty))
    elif OPERATION == "fma":
        tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), -tl.load(y_ptr + i)))
    elif OPERATION == "sum":
        tl.store(out_ptr, tl.sum(tl.load(x_ptr + i), axis=0))
    elif OPERATION == "atomic":
        tl.atomic_add(out_ptr + i // 8, tl.load(x_ptr + i))
    elif OPERATION == "cast":
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))
    elif OPERATION == "truncate":
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))
    elif OPERATION == "bitcast":
        tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty, bitcast=True))
    elif OPERATION == "maximum":
        x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
        tl.store(out_ptr + i, tl.maximum(x, y) + tl.minimum(x, y) + tl.max(x, 0) + tl.min(y, 0))
    elif OPERATION == "propagate":
        x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
        tl.store(out_ptr + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    elif OPERATION == "clamp":
        tl.store(out_ptr + i, tl.clamp(tl.load(x_ptr + i), 0.0, 1.0))
    elif OPERATION == "argmax":
        tl.store(out_ptr, tl.max(tl.load(x_ptr + i), 0, return_indices=True)[0])
    elif OPERATION == "mask":
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < 8))
    elif OPERATION == "scale":
        tl.store(out_ptr + i, tl.load(x_ptr + i) * scale)
    elif OPERATION == "dot":
        tl.store(out_ptr + square, tl.dot(tl.load(x_ptr + square), tl.load(y_ptr + square)))
    elif OPERATION == "small dot":
        i = tl.arange(0, 2)
        square = i[:, None] * 2 + i[None, :]
        tl.store(out_ptr + square, tl.dot(tl.load(x_ptr + square), tl.load(y_ptr + square)))


def _probe_kernel() -> Any:
    language = importlib.import_module("triton.language")
    # in globals of its own: Triton is imported late, and adds its names to those of what it runs
    function = FunctionType(_probe.__code__, {"tl": language})
    function.__annotations__ = dict(_probe.__annotations__)
    return importlib.import_module("triton").jit(function)


def _cases() -> list[tuple[str, str, Tensor, Tensor, Tensor | None]]:
    """What is tested, the operation, x, y and what it gives; None where the launch must fail."""
    nan = math.nan
    # in bfloat16: numbers, ties between two neighbours, what is just off them, NaN
    x = torch.arange(16) / 8 + torch.tensor([1.0, 2**-8, 2**-8 + 2**-20, nan]).repeat_interleave(4)
    c, d = torch.tensor([[nan, 2.0, nan, 1.0], [nan, nan, 3.0, 4.0]]).repeat(1, 4)
    late = torch.tensor([9.0, nan, 3.0, 1.0]).repeat_interleave(4)
    a = torch.arange(1, 17).bfloat16() / 7
    b = a.flip(0) * torch.tensor([1, -1]).repeat(8)
    square = torch.arange(256).reshape(16, 16) % 17 / 16
    odd = torch.tensor([5, 0x5B5B5B5B], dtype=torch.int32).repeat_interleave(8)

    arithmetic = torch.where(a < b, -a * b, a - b.abs()) + torch.full_like(a, 0.3)
    pairwise = a
    while len(pairwise) > 1:
        pairwise = pairwise[0::2] + pairwise[1::2]
    in_turn = torch.zeros(2).bfloat16()
    for column in a.view(2, 8).unbind(1):
        in_turn = in_turn + column
    towards_zero = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return [
        ("a loop bound known at run time", "loop", x, x, x[:3]),
        ("the variable of a loop is a scalar", "index", x, x, x[:3]),
        ("bfloat16 arithmetic", "arithmetic", a, b, arithmetic),
        ("a bfloat16 constant", "full", a, b, torch.full_like(a, 0.3)),
        ("a fused multiply-add", "fma", x, x, (x.double() * x.double() - x.double()).float()),
        ("the sum of bfloat16", "sum", a, b, pairwise),
        ("an atomic sum of bfloat16", "atomic", a, b, in_turn),
        ("rounding float32 to bfloat16", "cast", x, x, x.bfloat16()),
        ("rounding float64 to bfloat16", "cast", x.double(), x, x.bfloat16()),
        ("rounding to bfloat16 towards zero", "truncate", x, x, towards_zero),
        ("widening bfloat16", "cast", a, b, a.float()),
        ("the bits of bfloat16", "bitcast", a, b, a.view(torch.int16)),
        ("maximum drops NaN", "maximum", c, d, torch.fmax(c, d) + torch.fmin(c, d) + 5),
        ("maximum keeps NaN when asked", "propagate", c, d, torch.maximum(c, d)),
        ("clamp drops NaN", "clamp", x, x, x.clamp(0, 1).nan_to_num(0.0)),
        ("NaN hides the maximum before it", "argmax", late, x, late[8:9]),
        ("a masked lane holds NaN", "mask", x, x, torch.cat([x[:8], torch.full((8,), nan)])),
        ("a masked integer holds no zero", "mask", odd, odd, odd),
        ("a float argument is float32", "scale", x.double(), x, x.double() * torch.tensor(0.1)),
        ("the product of bfloat16", "dot", square.bfloat16(), square.bfloat16(), square @ square),
        ("a tile too small for any GPU", "small dot", square, square, None),
    ]


def _failure(
    kernel: Any, what: str, operation: str, x: Tensor, y: Tensor, expected: Tensor | None
) -> list[str]:
    out = torch.zeros_like(x if expected is None else expected)
    try:
        kernel[(1,)](x, y, out, 3, 0.1, operation)
    except Exception as error:
        return [] if expected is None else [f"{what}: {error}"]
    if expected is None:
        return [f"{what}: is taken"]
    if torch.allclose(out.double(), expected.double(), rtol=0, atol=0, equal_nan=True):
        return []
    return [f"{what}: expected {expected.tolist()}, received {out.tolist()}"]
