"""What a kernel promises the compiler: `tl.multiple_of`, `tl.max_contiguous`, `tl.max_constancy`.

The interpreter takes no notice of them.  A GPU loads and stores several elements at once where they
allow it, so one that does not hold is a fault there, or a wrong number.  Inside `watching` they are
looked at, and inside `believed` numbers are made to be what was promised of them, which is what the
compiler takes them for.  Some that do not hold do no harm: rows of a product that wrap around, say,
whose results are thrown away.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tritorch.testing import patches, places
from tritorch.testing.places import Place

Array = npt.NDArray[Any]

# the attribute that each of the three sets, and what it is called
_PROMISES = {
    "tt.divisibility": "tl.multiple_of",
    "tt.contiguity": "tl.max_contiguous",
    "tt.constancy": "tl.max_constancy",
}


class Promises:
    """What was promised while a block ran.

    `heard`: how often.  `broken`: by its place, what the first one that does not hold says.
    """

    def __init__(self) -> None:
        self.heard = 0
        self.broken: dict[Place, str] = {}


def watching() -> contextlib.AbstractContextManager[Promises]:
    """Looks at every promise inside the block; raises RuntimeError where Triton lacks a part."""
    return _patched(believes=False)


def believed() -> contextlib.AbstractContextManager[Promises]:
    """Makes numbers what is promised of them inside the block, as a compiler takes them."""
    return _patched(believes=True)


@contextlib.contextmanager
def _patched(*, believes: bool) -> Iterator[Promises]:
    lib = importlib.import_module("triton.runtime.interpreter")
    handles = patches.require(lib, "TensorHandle", "promises")
    original = patches.require(handles, "set_attr", "promises")
    promises = Promises()

    def set_attr(handle: Any, name: str, values: Any) -> None:
        if name in _PROMISES:
            promises.heard += 1
            _hear(handle, name, list(values), promises, believes)
        original(handle, name, values)

    handles.set_attr = set_attr
    try:
        yield promises
    finally:
        handles.set_attr = original


def _hear(handle: Any, name: str, values: list[int], promises: Promises, believes: bool) -> None:
    data: Array = handle.data
    sizes = values[-data.ndim :]
    if name == "tt.divisibility":
        # of lanes that nothing says to be together, the first of as many as the number says
        together = list(handle.attr.get("tt.contiguity", values))[-data.ndim :]
        promised = _multiples(data, max(sizes), together)
    elif name == "tt.contiguity":
        promised = _runs(data, sizes, _step(handle))
    else:
        promised = _first_of_each(data, sizes)
    wrong = promised != data
    if not wrong.any():
        return
    at = tuple(int(i) for i in wrong.nonzero()) if wrong.ndim == 0 else _first(wrong)
    shown = values if len(values) > 1 else values[0]
    promises.broken.setdefault(
        places.here(),
        f"{_PROMISES[name]}(..., {shown}) does not hold: lane {at} is {data[at]}, "
        f"where {promised[at]} was promised",
    )
    if believes:
        handle.data = promised


def _first(wrong: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _step(handle: Any) -> int:
    """From one element to the next: of pointers in bytes."""
    element = getattr(handle.dtype, "scalar", handle.dtype)
    if not element.is_ptr():
        return 1
    width: int = element.element_ty.primitive_bitwidth
    return max(1, width // 8)


def _first_of_each(data: Array, sizes: list[int]) -> Array:
    """Every lane has the first number of its group."""
    for axis, size in enumerate(sizes):
        lanes = np.arange(data.shape[axis])
        data = data.take(lanes - lanes % size, axis)
    return data


def _runs(data: Array, sizes: list[int], step: int) -> Array:
    """Along each axis the numbers of a group follow the first one."""
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        lanes = np.arange(data.shape[axis])
        past: Array = (lanes % size * step).astype(data.dtype)
        past = past.reshape([-1] + [1] * (data.ndim - axis - 1))
        data = data.take(lanes - lanes % size, axis) + past
    return data


def _multiples(data: Array, divisor: int, together: list[int]) -> Array:
    """Every group starts on a multiple."""
    starts = _first_of_each(data, together) if data.ndim else data
    found: Array = data - starts % np.asarray(divisor, data.dtype)
    return found
