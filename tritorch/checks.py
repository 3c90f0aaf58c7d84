"""Argument checks: every message names the op, the rule and what was received; classes are torch's
own.
"""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

_Found = TypeVar("_Found")


def remembered(check: Callable[..., _Found]) -> Callable[..., _Found]:
    """Remembers what `check` makes of its arguments, shapes and numbers; what it raises, it raises
    again.
    """
    found = functools.lru_cache(maxsize=4096, typed=True)(check)

    @functools.wraps(check)
    def checked(*arguments: object) -> _Found:
        # what stands for sizes while a program is traced has no hash, or one of its own
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return check(*arguments)
        try:
            return found(*arguments)
        except TypeError:
            # of the check itself, unless it is about a key
            if _has_hash(arguments):
                raise
        return check(*arguments)

    return checked


def _has_hash(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def fail(exception: type[Exception], op: str, rule: str, **received: object) -> NoReturn:
    """Raises `exception` with the message `op: rule (name value, ...)`."""
    shown = ", ".join(f"{name} {describe(value)}" for name, value in received.items())
    raise exception(f"{op}: {rule} ({shown})" if shown else f"{op}: {rule}")


class _Thread(threading.local):
    # how many warnings the ops have given
    warned = 0


thread = _Thread()

_OURS = ("tritorch.checks", "tritorch.ops.", "tritorch.repeats.")


def warn(message: str) -> None:
    """UserWarning at the line that called the op."""
    depth = 2
    if not torch.compiler.is_compiling():
        thread.warned += 1
        frame = sys._getframe(1)
        # of a function that C calls there is no frame above
        while str(frame.f_globals.get("__name__")).startswith(_OURS) and frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
    warnings.warn(message, UserWarning, stacklevel=depth)


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor; the value of anything else."""
    if isinstance(value, torch.Size):
        return repr(tuple(value))
    if not isinstance(value, Tensor):
        return repr(value)
    dtype = str(value.dtype).removeprefix("torch.")
    place = "" if value.device.type == "cpu" else f" {value.device}"
    return f"{tuple(value.shape)} {dtype}{place}"


def tensor(op: str, optional: Mapping[str, object] | None = None, /, **tensors: object) -> None:
    """TypeError unless every argument is a tensor, or None among the `optional` ones."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            fail(TypeError, op, f"{name} must be a Tensor, not {type(value).__name__}")
    if optional is None:
        return
    for name, value in optional.items():
        if value is not None and not isinstance(value, Tensor):
            fail(TypeError, op, f"{name} must be a Tensor or None, not {type(value).__name__}")


def same_dtype_and_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """RuntimeError unless every tensor has the dtype and the device of `first`."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != first.dtype:
            fail(
                RuntimeError,
                op,
                f"expected {name} of the input's dtype",
                input=first,
                **{name: other},
            )
        if other.device != first.device:
            fail(
                RuntimeError,
                op,
                f"expected {name} on the input's device",
                input=first,
                **{name: other},
            )


def parameters(op: str, input: Tensor, wide: torch.dtype, **given: Tensor | None) -> None:
    """RuntimeError unless all share one dtype, the input's or `wide`, and are on its device."""
    dtype = None
    for tensor in given.values():
        if tensor is None:
            continue
        if tensor.dtype not in ((input.dtype, wide) if dtype is None else (dtype,)):
            fail(
                RuntimeError,
                op,
                "parameters and statistics must share the input's dtype, or float32",
                input=input,
                **_present(given),
            )
        dtype = tensor.dtype
        if tensor.device != input.device:
            fail(
                RuntimeError,
                op,
                "every tensor must be on one device",
                input=input,
                **_present(given),
            )


def _present(given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _counts_writes(tensor: Tensor) -> bool:
    """Whether torch counts what is written into an inference tensor: it does where a parameter got
    its data in inference mode.
    """
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def writable(op: str, tensor: Tensor) -> None:
    """RuntimeError unless an in-place result can be written: where torch writes one, and no element
    twice.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        _differentiable(op, tensor)
    # what a compiled program writes, torch writes itself and checks
    if (
        not torch.compiler.is_compiling()
        and tensor.is_inference()
        and not torch.is_inference_mode_enabled()
        and not _counts_writes(tensor)
    ):
        fail(
            RuntimeError,
            op,
            "a tensor made in inference mode cannot be written in place outside of it",
            input=tensor,
        )
    strides = tensor.stride()
    if (
        0 in strides
        # of no element none is written twice
        and 0 not in tensor.shape
        and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, strides, strict=True)
        )
    ):
        fail(
            RuntimeError,
            op,
            "an expanded tensor cannot be written in place: clone it first",
            input=tensor,
        )


def _differentiable(op: str, tensor: Tensor) -> None:
    """RuntimeError unless autograd can record a write: it would say so only when it is done."""
    if tensor.is_leaf:
        fail(
            RuntimeError,
            op,
            "a leaf that requires a gradient cannot be written in place",
            input=tensor,
        )
    if torch.compiler.is_compiling() or not tensor._is_view():
        return
    # torch's stub does not know that a view has a base
    if tensor._base.is_leaf:  # type: ignore[union-attr]
        fail(
            RuntimeError,
            op,
            "a view of a leaf that requires a gradient cannot be written in place",
            input=tensor,
        )
    if _get_creation_meta(tensor) != CreationMeta.DEFAULT:
        fail(
            RuntimeError,
            op,
            "a view whose writes autograd cannot follow cannot be written in place: clone it first",
            input=tensor,
        )


def is_over(number: int, limit: int) -> bool:
    """Whether it is larger; not where a program is traced that leaves it open."""
    if not torch.compiler.is_compiling():
        return number > limit
    # of no use before, and sympy takes half a second to import
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(number > limit)


_INT = {int}


def ints(op: str, name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """`value` as a tuple of `count` integers: one number stands for all of them, as in torch."""
    if type(value) is int:
        return (value,) * count
    if type(value) is tuple and len(value) == count and set(map(type, value)) == _INT:
        return value
    # torch takes no other sequences
    given = value if isinstance(value, (tuple, list)) else (value,)
    values = tuple(integer(op, name, one, "must be integers") for one in given)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        fail(RuntimeError, op, f"{name} must be one integer or {count} of them", received=values)
    return values


def integer(op: str, name: str, value: Any, rule: str = "must be an integer") -> Any:
    """`value` as an integer, if torch takes it for one: NumPy's and a tensor of one, no bool."""
    if not isinstance(value, bool):
        if type(value) is int or isinstance(value, torch.SymInt):
            return value
        with contextlib.suppress(TypeError):
            return operator.index(value)
    fail(TypeError, op, f"{name} {rule}", received=value)


def number(op: str, name: str, value: Any) -> Any:
    """`value` as a float, if torch takes it for one: NumPy's and a tensor of no dimension."""
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, Tensor):
        taken = value.dim() == 0 and not value.requires_grad
    else:
        taken = isinstance(value, (numbers.Real, torch.SymInt))
    if not taken:
        fail(TypeError, op, f"{name} must be a number", received=value)
    return float(value)


def flag(op: str, name: str, value: object) -> None:
    """TypeError unless `value` is True or False, and nothing like them."""
    if not isinstance(value, bool):
        fail(TypeError, op, f"{name} must be True or False", received=value)
