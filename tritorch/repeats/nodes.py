"""Calls of a Function whose results have a gradient, repeated: what its forward pass did, and the
node that autograd keeps of it.

The backward pass is the Function's own, repeated like any other call while nobody asks for a
gradient of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from tritorch import launch
from tritorch.repeats import seen
from tritorch.repeats import watched as watching

# what a backward pass may find in its context, besides tensors that are saved, and be repeated
_PLAIN = (type(None), bool, int, float, str, torch.dtype, type)


def apply(function: type[Function], arguments: tuple[Any, ...]) -> Any:
    """`function.apply(*arguments)`, where an argument needs a gradient."""
    key = _key(arguments)
    return function.apply(*arguments) if key is None else _calls(function)(key, arguments)


def watched(function: type[Function], arguments: tuple[Any, ...]) -> tuple[Any, Node | None]:
    """The same, and what repeats it, if anything does."""
    key = _key(arguments)
    if key is None:
        return function.apply(*arguments), None
    result, known = _calls(function).watched(key, arguments)
    return result, known if isinstance(known, Node) else None


def _key(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if launch.thread.is_whole or seen.listens():
        return None
    key = seen.key_of(arguments)
    return None if key is None else (*key, seen.gradients(arguments))


@functools.cache
def _calls(function: type[Function]) -> seen.Calls:
    def watch(
        apply: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[Any, Node | None]:
        first = _First(function)
        return first(arguments), first.node

    return seen.Calls(function.apply, watch)


class _Call:
    """A call of a Function.  Of the node that it makes autograd asks for `backward`, and before for
    the `forward` of one of the two kinds of calls below.
    """

    def __init__(self, function: type[Function]) -> None:
        self.function, self._apply = function, _apply_of(function)

    def __call__(self, arguments: Iterable[Any]) -> Any:
        """The call with these arguments, under autograd."""
        # no argument of the node's, for backward passes may return as much as they find in
        # `ctx.needs_input_grad`
        _thread.call = self
        return self._apply(*arguments)

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """Of each argument the gradient, or None."""
        return _tuple(self.function.backward(ctx, *grads))


class _First(_Call):
    """The one that is watched; `node` repeats it then, if anything does."""

    node: Node | None = None

    def forward(self, ctx: Any, arguments: tuple[Any, ...]) -> Any:
        """The outputs, and to `ctx`, which is autograd's, what the Function tells it."""
        context = _Context(ctx.needs_input_grad)

        def forward(*arguments: Any) -> tuple[Any, ...]:
            return context._made(self.function.forward(context, *arguments))

        made: tuple[Any, ...]
        made, repeat = watching.watch(forward, arguments, {})
        told = context._told(made, arguments)
        if repeat is not None and _is_plain(tuple(told.attributes.values())):
            self.node = Node(self.function, repeat, told)
        ctx._call = self.node or self
        return told.tell(ctx, made, arguments)


class Node(_Call):
    """What repeats a call; it keeps no tensor."""

    def __init__(self, function: type[Function], forward: watching.Repeat, told: _Told) -> None:
        super().__init__(function)
        self.device, self.written = forward.device, told.written
        self._forward, self._told = forward, told
        self._gradients = seen.Calls(self._backward)

    def forward(self, ctx: Any, arguments: tuple[Any, ...]) -> Any:
        """The outputs once more, and what was told."""
        ctx._call = self
        return self._told.tell(ctx, self._forward(arguments), arguments)

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        if torch.is_grad_enabled() or launch.thread.is_whole or seen.listens():
            return super().backward(ctx, grads)
        # asked for once, as checkpoints give them, and not where nothing is saved: of a graph that
        # was gone through autograd refuses even nothing
        given = *grads, *(ctx.saved_tensors if self._told.saves else ())
        key = seen.key_of(given)
        if key is None:
            return self._backward(*given)
        return _tuple(self._gradients(key, given))

    def _backward(self, *given: Any) -> tuple[Any, ...]:
        count = self._told.outputs
        context = SimpleNamespace(saved_tensors=given[count:], **self._told.attributes)
        return _tuple(self.function.backward(context, *given[:count]))


class _Told(NamedTuple):
    """What a Function's forward pass tells of what it made, some outputs and then what it saves,
    and of its arguments: by their places.
    """

    outputs: int
    alone: bool
    saves: bool
    constant: list[int]
    written: list[int]
    is_materialized: bool
    attributes: dict[str, Any]

    def tell(self, ctx: Any, made: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
        """Tells autograd's context, and returns the outputs."""
        outputs = made[: self.outputs]
        # of `needs_input_grad` it has its own, an equal one, which is not replaced
        vars(ctx).update(self.attributes)
        if self.saves:
            ctx.save_for_backward(*made[self.outputs :])
        if self.constant:
            ctx.mark_non_differentiable(*[outputs[at] for at in self.constant])
        if self.written:
            ctx.mark_dirty(*[arguments[at] for at in self.written])
        if not self.is_materialized:
            ctx.set_materialize_grads(False)
        return outputs[0] if self.alone else outputs


class _Context:
    """Stands for autograd's in a Function's forward pass."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self._count, self._alone = 0, False
        self._saved: tuple[Any, ...] = ()
        self._constant: tuple[Any, ...] = ()
        self._written: tuple[Any, ...] = ()
        self._is_materialized = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._constant = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        self._written = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._is_materialized = value

    def _made(self, result: Any) -> tuple[Any, ...]:
        """The outputs, then what is saved."""
        self._alone = not isinstance(result, tuple)
        outputs = (result,) if self._alone else result
        self._count = len(outputs)
        return *outputs, *self._saved

    def _told(self, made: tuple[Any, ...], arguments: tuple[Any, ...]) -> _Told:
        return _Told(
            outputs=self._count,
            alone=self._alone,
            saves=bool(self._saved),
            constant=_places(self._constant, made[: self._count]),
            written=_places(self._written, arguments),
            is_materialized=self._is_materialized,
            attributes={
                name: value for name, value in vars(self).items() if not name.startswith("_")
            },
        )


def _places(some: Sequence[Any], among: Sequence[Any]) -> list[int]:
    return [at for at, one in enumerate(among) if any(one is other for other in some)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _tuple(gradients: Any) -> tuple[Any, ...]:
    return tuple(gradients) if isinstance(gradients, (tuple, list)) else (gradients,)


@functools.cache
def _apply_of(function: type[Function]) -> Callable[..., Any]:
    """Makes the outputs of the call at hand; autograd knows them as those of the Function."""
    named: Any = type(function.__name__, (_Repeated,), {})
    # without a look for tensors that a transform has left: `seen.listens` and `key_of` did that
    apply: Callable[..., Any] = super(Function, named).apply
    return apply


class _Thread(threading.local):
    # the one whose forward pass begins
    call: Any


_thread = _Thread()


class _Repeated(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _thread.call.forward(ctx, arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            # which follows the Function's own
            return ctx._call.function.backward(ctx, *grads)
        return ctx._call.backward(ctx, grads)
