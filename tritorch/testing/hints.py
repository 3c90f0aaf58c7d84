"""Names the likely reason of a wrong result, from what the error looks like."""

from __future__ import annotations

import re
import traceback
from dataclasses import replace

import torch
from torch import Tensor

from tritorch.testing import redirect
from tritorch.testing.findings import Finding

_TILE = re.compile(r"Input shapes should have M >= \d+, N >= \d+ and K >= \d+")


def of_values(
    actual: Tensor, expected: Tensor, ratio: float | None, wrong: Tensor | None = None
) -> str:
    """A sentence on what the difference looks like; empty where it looks like nothing known.

    `ratio`: the RMS error over torch's.  `wrong`: the elements that are known to be wrong.
    """
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != e.shape or a.numel() < 2:
        return ""
    lost = ~a.isfinite() & e.isfinite()
    if lost.any():
        said = (
            f"{int(lost.sum())} elements are not finite: memory that nobody wrote, or a masked lane"
        )
        return "; ".join(filter(None, (said, _tail(lost))))
    both = a.isfinite() & e.isfinite()
    error = torch.where(both, a - e, 0.0)
    size = torch.where(both, e, 0.0).square().mean().sqrt()
    gross = error.abs() > 1e-2 * size if wrong is None else wrong.cpu()
    if not both.all():
        return _tail(gross) if gross.any() else ""
    if not a.any() and e.any():
        return "it is zero everywhere: is anything stored?"
    if float(error.square().mean().sqrt()) > 1e-2 * float(size):
        return _whole(a, e) or _tail(gross)
    narrow = actual.dtype in (torch.float16, torch.bfloat16)
    if ratio is not None and ratio > 3 and narrow:
        return f"the error is {ratio:.1f} times torch's: does it accumulate in 16 bits?"
    if ratio is not None and ratio > 100 and actual.dtype == torch.float32:
        return f"the error is {ratio:.0f} times torch's: products in TF32, or sums in 16 bits?"
    if said := _factor(a, e) or (_tail(gross) if gross.any() else ""):
        return said
    # many elements are off, and none by more than a few roundings of the partial sums
    if narrow and error.abs().max() <= 8 * torch.finfo(actual.dtype).eps * size:
        return "every error is a few roundings of 16 bits: does it accumulate in 16 bits?"
    return ""


def _whole(a: Tensor, e: Tensor) -> str:
    """What all elements have in common."""
    if said := _factor(a, e):
        return said
    if a.dim() >= 2 and min(a.shape[-2:]) > 1:
        # the shape of a transposed result that is not square is the right one, its memory is not
        turned = e.mT.contiguous().view(a.shape)
        if torch.allclose(a, turned, rtol=1e-2, atol=1e-6):
            return "it is the transposed result: two strides or two indices are swapped?"
    shift = a - e
    if torch.allclose(shift, shift.mean(), rtol=1e-2, atol=1e-6):
        return f"it is right but for {float(shift.mean()):.4g} added everywhere"
    return ""


def _factor(a: Tensor, e: Tensor) -> str:
    if not e.any():
        return ""
    factor = float((a * e).sum() / (e * e).sum())
    rest = float((a - factor * e).square().mean().sqrt())
    # the factor must explain the error, not be a part of its noise
    if abs(factor) < 1e-3 or rest > 0.05 * abs(factor - 1) * float(e.square().mean().sqrt()):
        return ""
    what = "a sign" if abs(factor + 1) < 1e-3 else "a divisor, a count or an epsilon"
    return f"it is off by the factor {factor:.4g}: {what}?"


def _tail(wrong: Tensor) -> str:
    """Whether only what lies past the last whole tile is wrong, along one dimension."""
    for dim in reversed(range(wrong.dim())):
        size = wrong.shape[dim]
        others = [d for d in range(wrong.dim()) if d != dim]
        slices = wrong.any(dim=others) if others else wrong
        first = int(slices.nonzero()[0])
        tiles = [1 << bits for bits in range(2, 17) if first and first % (1 << bits) == 0]
        if tiles and first + tiles[-1] >= size > first:
            return (
                f"only from {first} of {size} on along dimension {dim}, where the last tile "
                "begins: its mask, or what a loop carries into it?"
            )
    return ""


def of_exception(error: BaseException, case: str) -> Finding:
    """The finding for a call that raised, at the user's line."""
    # a detector gave the call up, which has one already
    known = getattr(error, "finding", None)
    if isinstance(known, Finding):
        return replace(known, case=case)
    name = type(error).__name__
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    file, line = redirect.place(cause)
    text = (str(error) or str(cause)).strip().splitlines()
    first = text[0] if text else ""
    kind = "error"
    if _TILE.search(str(cause)):
        kind, first = "tile", str(cause)
    elif "no autograd formula was registered" in first:
        # torch lets the result of such an op require a gradient, whether it is to have one or not
        first += "; if it has no gradient, say so: --gradients ''"
    source = ""
    for frame in traceback.extract_tb(cause.__traceback__):
        if frame.filename == file and frame.lineno == line:
            source = frame.line or ""
    kernel = str(getattr(error, "kernel", ""))
    return Finding(
        kind, f"{name}: {first}", kernel=kernel, file=file, line=line, source=source, case=case
    )
