"""Guesses from a function's signature what its arguments look like."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from tritorch.registry import Maker
from tritorch.testing import calls
from tritorch.testing.errors import RequestError
from tritorch.testing.input_sizes import SMALL
from tritorch.testing.inputs import parse

# what functions of one to three tensors commonly look like; before each its more general forms
_COMMON = {
    1: ("{0}[M, N]", "{0}[N]", "{0}[N, C, H, W]", "{0}[B, M, N]"),
    2: (
        "{0}[M, K] {1}[K, N]",
        "{0}[M, K] {1}[N, K]",
        "{0}[M, N] {1}[M, N]",
        "{0}[N] {1}[N]",
        "{0}[M, N] {1}[N]",
        "{0}[M, V] {1}[M]:int64<V",
        "{0}[V, D] {1}[M]:int64<V",
        "{0}[M]:int64<V {1}[V, D]",
        "{0}[N, C, H, W] {1}[K, C, 3, 3]",
    ),
    3: (
        "{0}[M, K] {1}[K, N] {2}[N]",
        "{0}[M, K] {1}[N, K] {2}[N]",
        "{0}[B, H, M, D] {1}[B, H, N, D] {2}[B, H, N, D]",
        "{0}[M, N] {1}[M, N] {2}[M, N]",
        "{0}[M, N] {1}[N] {2}[N]",
        "{0}[N] {1}[N] {2}[N]",
    ),
}
_INDEX = re.compile(r"target|label|ind(ex|ices)|idx|ids?$|token", re.IGNORECASE)
_AFFINE = re.compile(r"weight|bias|gamma|beta|scale|shift|^[wb]$", re.IGNORECASE)


def guess(fn: Callable[..., Any], reference: Callable[..., Any]) -> str:
    """The first common description with which the reference works, those first that suit the names.

    Parameters with defaults keep them.  Raises ValueError where none fits.
    """
    parameters = inspect.signature(fn).parameters.values()
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    patterns = sorted(_COMMON.get(len(names), ()), key=lambda text: _unlikely(text, names))
    for pattern in patterns:
        text = pattern.format(*names)
        inputs = parse(text)
        sizes = dict(zip(inputs.letters, itertools.cycle(SMALL), strict=False))
        arguments = inputs.sample(sizes, Maker(seed="guess")).arguments
        try:
            result = calls.outputs_of(calls.call(reference, arguments))
        except Exception:
            continue
        if result:
            return text
    raise RequestError(
        f"inputs: what {getattr(fn, '__name__', fn)}({', '.join(names)}) takes cannot be guessed: "
        "say what its arguments look like, for example 'x[M, K] weight[N, K] eps=1e-5'"
    )


def _unlikely(pattern: str, names: Sequence[str]) -> int:
    """How many of the names suggest another thing: a target is an index, a bias has no rows."""
    tensors = parse(pattern.format(*names)).tensors
    wrong = 0
    for tensor in tensors:
        wrong += (tensor.dtype is not None) != (_INDEX.search(tensor.name) is not None)
        broadcasts = tensor is not tensors[0] and _AFFINE.search(tensor.name) is not None
        wrong += broadcasts and tensor.sizes == tensors[0].sizes
    return wrong
