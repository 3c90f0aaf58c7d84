"""The variables of loops in interpreted kernels: integers of Python, which a GPU has as scalars.

A compiled kernel converts one by `m.to(tl.int64)`, which no integer of Python has.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Index(int):
    """An integer that is a scalar of Triton's where a kernel asks it for more than a number."""

    def scalar(self) -> Any:
        # Triton is imported late
        from triton.runtime.interpreter import interpreter_semantic

        return interpreter_semantic.to_tensor(int(self), False)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self.scalar().to(*args, **kwargs)

    def cast(self, *args: Any, **kwargs: Any) -> Any:
        return self.scalar().cast(*args, **kwargs)

    @property
    def dtype(self) -> Any:
        return self.scalar().dtype


def _kept(operation: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: int, *other: Any) -> Any:
        result = operation(self, *other)
        return Index(result) if type(result) is int else result

    return compute


# what is computed of a scalar is one; what is compared is Python's, for Triton itself compares
# integers for each operand that it makes of one
for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(Index, _method, _kept(getattr(int, _method)))
for _method in ("__neg__", "__invert__"):
    setattr(Index, _method, _kept(getattr(int, _method)))


def counting(loop: Callable[..., Iterable[int]]) -> Callable[..., Iterator[Index]]:
    """`range` or its like, over scalars."""
    return lambda *args, **kwargs: map(Index, loop(*args, **kwargs))


# the modules of kernels that run, in which `range` is another, and whether they had it by that name
_changed: list[tuple[dict[str, Any], bool]] = []


def put(module: dict[str, Any]) -> None:
    """Lets the kernels of a module, its globals, count in scalars."""
    if module.get("range", builtins.range) is builtins.range:
        _changed.append((module, "range" in module))
        module["range"] = counting(builtins.range)


def restore() -> None:
    """Takes back what `put` did."""
    while _changed:
        module, had = _changed.pop()
        if had:
            module["range"] = builtins.range
        else:
            del module["range"]
