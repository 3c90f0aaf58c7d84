"""Names the likely reason of a wrong result, from what the error looks like."""

from __future__ import annotations

import re
import traceback

import torch
from torch import Tensor

from tritorch.testing import redirect
from tritorch.testing.findings import Finding

_TILE = re.compile(r"Input shapes should have M >= \d+, N >= \d+ and K >= \d+")


def of_values(actual: Tensor, expected: Tensor, ratio: float | None) -> str:
    """A sentence on what the difference looks like; empty where it looks like nothing known.

    `ratio`: the RMS error over torch's.
    """
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != e.shape or a.numel() < 2:
        return ""
    if not a.isfinite().all() and e.isfinite().all():
        share = int((~a.isfinite()).sum())
        return f"{share} elements are not finite: memory that nobody wrote, or a masked lane"
    if not (a.isfinite().all() and e.isfinite().all()):
        return ""
    wrong = (a - e).abs() > 1e-2 * e.abs().max().clamp(min=1e-30)
    if not wrong.any():
        if ratio is not None and ratio > 4 and actual.dtype in (torch.float16, torch.bfloat16):
            return f"the error is {ratio:.1f} times torch's: accumulated in 16 bits?"
        if ratio is not None and ratio > 100:
            return f"the error is {ratio:.0f} times torch's: products in TF32, or sums in 16 bits?"
        return ""
    if not a.any():
        return "it is zero everywhere"
    scale = float((a * e).sum() / (e * e).sum()) if e.any() else 0.0
    if scale and abs(scale - 1) > 1e-3 and torch.allclose(a, scale * e, rtol=1e-3, atol=1e-6):
        return f"it is right but for the factor {scale:.4g}: a divisor, a count or a sign?"
    if a.dim() == 2 and a.shape[0] == a.shape[1] and torch.allclose(a, e.mT, rtol=1e-3, atol=1e-6):
        return "it is the transposed result: two strides are swapped?"
    for dim in range(a.dim()):
        size = a.shape[dim]
        others = [d for d in range(a.dim()) if d != dim]
        slices = wrong.any(dim=others) if others else wrong
        first = int(slices.nonzero()[0])
        if first > 0 and bool(slices[first:].all()):
            return f"only from {first} of {size} on along dimension {dim}: the mask of a last tile?"
    return ""


def of_exception(error: BaseException, case: str) -> Finding:
    """The finding for a call that raised, at the user's line."""
    name = type(error).__name__
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    file, line = redirect.place(cause)
    text = (str(error) or str(cause)).strip().splitlines()
    first = text[0] if text else ""
    kind = "error"
    if name == "ProgramOrderError":
        kind = "program order"
    elif _TILE.search(str(cause)):
        kind, first = "tile", str(cause)
    source = ""
    for frame in traceback.extract_tb(cause.__traceback__):
        if frame.filename == file and frame.lineno == line:
            source = frame.line or ""
    kernel = str(getattr(error, "kernel", ""))
    return Finding(
        kind, f"{name}: {first}", kernel=kernel, file=file, line=line, source=source, case=case
    )
