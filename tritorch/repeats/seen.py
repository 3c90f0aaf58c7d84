"""Which calls were seen before, and what is known of them.

What makes two calls alike is `key_of`.  Whoever lets an op depend on more must add it there, or to
`launch.circumstances`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritorch import launch
from tritorch.repeats import watched

# keys of one function: a program with ever new shapes would make more and more
_MOST_KEYS = 4096
# the one of equal calls that is watched, which takes as long as several that are not
_WATCHED = 4

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = frozenset((type(None), bool, int, str, torch.dtype))
_TUPLES = frozenset((tuple, torch.Size))
_INTEGERS = frozenset((int,))
_FLAGS = frozenset((bool,))
# of dimensions, until torch 2.12
_HAS_NAMES = hasattr(Tensor, "has_names")
_NONE: Mapping[str, Any] = MappingProxyType({})

# to look each of them up takes as long as to call it
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_has_profiler = torch._C._autograd._profiler_enabled
_has_transform = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
# torch's own way to ask would load a compiler that nobody has loaded, which takes a second
_callback_of_compiler: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback
_profilers = torch.autograd.profiler


def listens() -> bool:
    """Whether anything in torch would hear of an op: a mode, a profiler, a transform, a tracer, a
    compiler, derivatives that are carried along.
    """
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _has_profiler()
        # of all threads
        or _profilers._is_profiler_enabled
        or _has_transform()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
        or _callback_of_compiler() is not None
    )


def is_compiler_at_work() -> bool:
    """Whether torch.compile looks at the frames that this thread runs."""
    return _callback_of_compiler() is not None


def key_of(arguments: Iterable[Any]) -> tuple[Any, ...] | None:
    """What an op can know of its arguments but the addresses and what is there, and what else its
    launches depend on.  None where an argument is no ordinary tensor, and nothing that has a key,
    or where no launch may be left to a repeat.
    """
    circumstances = launch.circumstances()
    if circumstances is None:
        return None
    key: list[Any] = [circumstances]
    first: torch.dtype | None = None
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            try:
                # batched, sparse and nested tensors lack one of them
                address, strides = argument.data_ptr(), argument.stride()
            except RuntimeError:
                return None
            # others are no memory to read as it is: zeros that are nowhere, negated numbers
            if not address or argument.is_neg() or (_HAS_NAMES and argument.has_names()):
                return None
            dtype, inference = argument.dtype, argument.is_inference()
            key += dtype, argument.shape, strides, address % 16, argument.device, inference
            first = first or dtype
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
    # all operands of a product have the dtype of the first, but where autocast casts them
    if first is torch.float32:
        key += launch.precisions()
    return tuple(key)


def gradients(arguments: Iterable[Any]) -> tuple[Any, ...] | None:
    """What autograd wants of the tensors among the arguments: no gradient, or one, and of what.
    None where it wants none.
    """
    if not torch.is_grad_enabled():
        return None
    wanted = [
        one.requires_grad and (one.is_leaf, one._is_view())
        for one in arguments
        if type(one) in _TENSORS
    ]
    return tuple(wanted) if any(wanted) else None


class Known(Protocol):
    """What repeats a call, while `device` is the current one; if that is negative, wherever."""

    @property
    def device(self) -> int: ...

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """Does it with these arguments."""


_Watch = Callable[
    [Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], tuple[Any, Known | None]
]


class Calls:
    """Calls of one function, each repeated where it can be.

    `watch(function, arguments, named)` makes the call that is watched, and returns its result and
    what repeats it, if anything does.  Of a call that is no whole its parts are repeated too.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        watch: _Watch = watched.watch,
        *,
        is_whole: bool = True,
    ) -> None:
        self._function, self._watch, self._is_whole = function, watch, is_whole
        # how often a key was seen, and then what repeats the call, if anything does
        self._seen: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[Any, ...], Known | None] = {}

    def __call__(
        self, key: tuple[Any, ...], arguments: tuple[Any, ...], named: Mapping[str, Any] = _NONE
    ) -> Any:
        """`function(*arguments, **named)`; the key says everything that decides its way."""
        known = self._known.get(key)
        if known is not None and (known.device < 0 or known.device == torch._C._cuda_getDevice()):
            return known((*arguments, *named.values()) if named else arguments)
        if key in self._known:
            return self._function(*arguments, **named)
        launch.thread.is_whole = self._is_whole
        try:
            if not self._is_to_be_watched(key):
                return self._function(*arguments, **named)
            result, self._known[key] = self._watch(self._function, arguments, named)
            return result
        finally:
            launch.thread.is_whole = False

    def watched(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Known | None]:
        """The result of a call, and what repeats it: it is watched if none was before."""
        if key in self._known:
            return self(key, arguments), self._known[key]
        launch.thread.is_whole = self._is_whole
        try:
            result, self._known[key] = self._watch(self._function, arguments, _NONE)
        finally:
            launch.thread.is_whole = False
        return result, self._known[key]

    def _is_to_be_watched(self, key: tuple[Any, ...]) -> bool:
        seen = self._seen.get(key, 0) + 1
        if seen >= _WATCHED and not launch.is_captured():
            self._seen.pop(key, None)
            if len(self._known) >= _MOST_KEYS:
                self._known.clear()
            return True
        if len(self._seen) >= _MOST_KEYS:
            self._seen.clear()
        self._seen[key] = seen
        return False
