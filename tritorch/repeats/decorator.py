"""The decorator of ops whose calls are repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from tritorch import launch, subclasses
from tritorch.repeats import composed, seen

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_has_autocast = torch._C._is_any_autocast_enabled


def repeated(op: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorates an op whose calls are repeated as wholes."""
    without_gradient = seen.Calls(op)
    with_gradient = seen.Calls(op, composed.watch, is_whole=False)

    @functools.wraps(op)
    def call(*arguments: _Given.args, **named: _Given.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return op(*arguments, **named)
        given = (*arguments, *named.values()) if named else arguments
        if (
            # a part of another op
            launch.thread.is_whole
            or launch.thread.composer is not None
            or seen.listens()
            or (key := seen.key_of(given)) is None
        ):
            result: _Result = subclasses.call(call, op, arguments, named)
            return result
        gradients = seen.gradients(given)
        key = (*key, gradients, torch.is_inference_mode_enabled(), *named)
        if _has_autocast():
            # what it casts to is of no argument's dtype
            key += (*_autocast(), *launch.precisions())
        calls = without_gradient if gradients is None else with_gradient
        result = calls(key, arguments, named)
        return result

    return call


def _autocast() -> tuple[Any, ...]:
    return tuple(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        for device in ("cuda", "cpu")
    )
