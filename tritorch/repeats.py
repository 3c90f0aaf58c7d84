"""Calls that come again: what a call allocated and launched is done once more, without asking why.

A program calls an op with the same shapes over and over.  The first call goes its way, the second
one is watched, and from the third on its allocations and launches are repeated with the tensors at
hand.  Only what did nothing else is repeated: a call that did more in torch, a copy say, or took a
tensor from elsewhere than its arguments, goes its way for ever.

What makes two calls alike is `key_of` and `launch.circumstances`.  Whoever lets an op depend on
more must add it there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritorch import launch, watched

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# keys of one function: a program with ever new shapes would make more and more
_MOST_KEYS = 4096

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), bool, int, str, torch.dtype))
_TUPLES = frozenset((tuple, torch.Size))
_INTEGERS = frozenset((int,))
_FLAGS = frozenset((bool,))
_NONE: Mapping[str, Any] = MappingProxyType({})

# to look each of them up takes as long as to call it
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_has_profiler = torch._C._autograd._profiler_enabled
_has_transform = torch._C._are_functorch_transforms_active
_has_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_profilers = torch.autograd.profiler


def listens() -> bool:
    """Whether anything in torch would hear of an op: a mode, a profiler, a transform, a tracer, a
    compiler.
    """
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _has_profiler()
        # of all threads
        or _profilers._is_profiler_enabled
        or _has_transform()
        or _tracing_state() is not None
        or is_compiler_at_work()
    )


def is_compiler_at_work() -> bool:
    """Whether torch.compile looks at the frames that this thread runs."""
    # to ask a compiler that nobody has loaded would load it, which takes a second
    if "torch._dynamo" not in sys.modules:
        return False
    evaluation: Any = torch._C._dynamo.eval_frame
    return evaluation.get_eval_frame_callback() is not None


def key_of(arguments: Iterable[Any]) -> tuple[Any, ...] | None:
    """What an op can know of its arguments but the addresses and what is there; None where one is
    no ordinary tensor, and nothing that has a key.
    """
    key: list[Any] = []
    has_float32 = False
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            try:
                # batched, sparse and nested tensors lack one of them
                address, strides = argument.data_ptr(), argument.stride()
            except RuntimeError:
                return None
            # others are no memory to read as it is: zeros that are nowhere, negated numbers
            if not address or argument.is_neg():
                return None
            dtype = argument.dtype
            key += dtype, argument.shape, strides, address % 16, argument.device
            key.append(argument.is_inference())
            has_float32 = has_float32 or dtype is torch.float32
        elif kind in _PLAIN:
            # True is equal to 1
            key += kind, argument
        elif kind is float:
            # -0.0 is equal to 0.0
            key += kind, argument or repr(argument)
        elif kind in _TUPLES and _INTEGERS.issuperset(map(type, argument)):
            key.append(argument)
        elif kind is tuple and _FLAGS.issuperset(map(type, argument)):
            key += bool, argument
        else:
            return None
    if has_float32:
        key += launch.precisions()
    return tuple(key)


class Repeats:
    """Calls of one function, each repeated where it can be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        # whether a key was seen, and never led to a repeat, or what repeats it
        self._known: dict[tuple[Any, ...], bool | watched.Repeat] = {}

    def __call__(
        self, key: tuple[Any, ...], arguments: tuple[Any, ...], named: Mapping[str, Any] = _NONE
    ) -> Any:
        """`function(*arguments, **named)`, of which the key says everything that decides its way
        besides the `launch.circumstances`.
        """
        circumstances = launch.circumstances()
        if circumstances is None:
            return self._function(*arguments, **named)
        whole = key, circumstances
        known = self._known.get(whole)
        if known is None:
            if len(self._known) >= _MOST_KEYS:
                self._known.clear()
            self._known[whole] = True
        elif known is True:
            result, self._known[whole] = watched.watch(self._function, arguments, named)
            return result
        elif known is not False and known.is_here():
            return known((*arguments, *named.values()) if named else arguments)
        return self._function(*arguments, **named)


def repeated(op: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorates an op whose calls without gradients are repeated as wholes."""
    repeats = Repeats(op)

    @functools.wraps(op)
    def call(*arguments: _Given.args, **named: _Given.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return op(*arguments, **named)
        given = (*arguments, *named.values()) if named else arguments
        if (
            _needs_gradient(given)
            or forward_ad._current_level >= 0
            or listens()
            or (key := key_of(given)) is None
        ):
            return op(*arguments, **named)
        key = (*key, torch.is_inference_mode_enabled(), *named)
        if _has_autocast():
            key += _autocast()
        result: _Result = repeats(key, arguments, named)
        return result

    return call


def _needs_gradient(arguments: Iterable[Any]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:
            if type(argument) in _TENSORS and argument.requires_grad:
                return True
    return False


def _autocast() -> tuple[Any, ...]:
    return tuple(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        for device in ("cuda", "cpu")
    )
