"""Calls of a Function whose results have a gradient, repeated: what its forward pass did, and the
node that autograd keeps of it.

The backward pass is the Function's own, repeated like any other call while nobody asks for a
gradient of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from tritorch import launch, seen, watched


def apply(function: type[Function], arguments: tuple[Any, ...]) -> Any:
    """`function.apply(*arguments)`, where an argument needs a gradient."""
    key = _key(arguments)
    return function.apply(*arguments) if key is None else _calls(function)(key, arguments)


def known(function: type[Function], arguments: tuple[Any, ...]) -> Node | None:
    """What repeats this call, if anything does yet."""
    key = _key(arguments)
    return None if key is None else cast("Node | None", _calls(function).known(key))


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
        node = Node(function, arguments)
        result = node(arguments)
        return result, node if node.is_repeatable else None

    return seen.Calls(function.apply, watch)


class Node:
    """One call of a Function: its first call is watched, and the later ones repeat that.

    No tensor is kept.
    """

    def __init__(self, function: type[Function], arguments: tuple[Any, ...]) -> None:
        self.function, self._apply = function, _apply_of(function)
        self._needs = tuple(isinstance(one, Tensor) and one.requires_grad for one in arguments)
        self._forward: watched.Repeat | None = None
        self._gradients = seen.Calls(self._backward)
        # what the backward pass finds in its context besides tensors
        self._attributes: dict[str, Any] = {}
        # how many outputs there are, and whether they are one alone
        self._count, self._alone, self._is_materialized = 0, True, True
        # places of outputs that have no gradient, and of arguments that are written
        self._constant: list[int] = []
        self.written: list[int] = []

    @property
    def is_repeatable(self) -> bool:
        """Whether a call is repeated once more: none is before it was watched."""
        return self._forward is not None

    @property
    def device(self) -> int:
        """That of the launches."""
        return -1 if self._forward is None else self._forward.device

    def __call__(self, arguments: Iterable[Any]) -> Any:
        """The call with these arguments, under autograd."""
        # not among them, which the Function's backward pass may count
        _thread.node = self
        return self._apply(*arguments)

    def forward(self, ctx: Any, arguments: tuple[Any, ...]) -> Any:
        """The outputs, for which autograd asks with a context of its own."""
        made = self._watch(arguments) if self._forward is None else self._forward(arguments)
        outputs = made[: self._count]
        ctx.node = self
        vars(ctx).update(self._attributes)
        ctx.save_for_backward(*made[self._count :])
        if self._constant:
            ctx.mark_non_differentiable(*[outputs[at] for at in self._constant])
        if self.written:
            ctx.mark_dirty(*[arguments[at] for at in self.written])
        if not self._is_materialized:
            ctx.set_materialize_grads(False)
        return outputs[0] if self._alone else outputs

    def _watch(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outputs, and what is saved."""
        said = _Said()
        context = _Context(said, self._needs)

        def forward(*arguments: Any) -> tuple[Any, ...]:
            result = self.function.forward(context, *arguments)
            self._alone = not isinstance(result, tuple)
            outputs = (result,) if self._alone else result
            self._count = len(outputs)
            return *outputs, *said.saved

        made: tuple[Any, ...]
        made, self._forward = watched.watch(forward, arguments, {})
        self._constant = _places(said.constant, made[: self._count])
        self.written = _places(said.written, arguments)
        self._is_materialized = said.is_materialized
        self._attributes = context.attributes()
        if any(isinstance(value, Tensor) for value in self._attributes.values()):
            # of this call alone
            self._forward = None
        return made

    def backward(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """Of each argument the gradient, or None."""
        if torch.is_grad_enabled() or launch.thread.is_whole or seen.listens():
            return _tuple(self.function.backward(ctx, *grads))
        # asked for once: checkpoints give them once
        given = *grads, *ctx.saved_tensors
        key = seen.key_of(given)
        if key is None:
            return self._backward(*given)
        return _tuple(self._gradients(key, given))

    def _backward(self, *given: Any) -> tuple[Any, ...]:
        saved = given[self._count :]
        context = SimpleNamespace(
            needs_input_grad=self._needs, saved_tensors=saved, **self._attributes
        )
        return _tuple(self.function.backward(context, *given[: self._count]))


@dataclass
class _Said:
    """What a Function's forward pass tells autograd of its tensors."""

    saved: tuple[Any, ...] = ()
    constant: tuple[Any, ...] = ()
    written: tuple[Any, ...] = ()
    is_materialized: bool = True


class _Context:
    """Stands for autograd's in a Function's forward pass."""

    def __init__(self, said: _Said, needs_input_grad: tuple[bool, ...]) -> None:
        self._said = said
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self._said.saved = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self._said.constant = tensors

    def mark_dirty(self, *tensors: Tensor) -> None:
        self._said.written = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self._said.is_materialized = value

    def attributes(self) -> dict[str, Any]:
        """What the pass has set for the backward one."""
        own = "_said", "needs_input_grad"
        return {name: value for name, value in vars(self).items() if name not in own}


def _places(some: Sequence[Any], among: Sequence[Any]) -> list[int]:
    return [at for at, one in enumerate(among) if any(one is other for other in some)]


def _tuple(gradients: Any) -> tuple[Any, ...]:
    return tuple(gradients) if isinstance(gradients, (tuple, list)) else (gradients,)


@functools.cache
def _apply_of(function: type[Function]) -> Callable[..., Any]:
    """Of the present node's arguments the outputs; autograd calls them as those of the Function."""
    named: Any = type(function.__name__, (_Repeated,), {})
    # without a look for tensors that a transform has left: `seen.listens` and `key_of` did that
    apply: Callable[..., Any] = super(Function, named).apply
    return apply


class _Thread(threading.local):
    # the one whose forward pass begins
    node: Node


_thread = _Thread()


class _Repeated(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _thread.node.forward(ctx, arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            # which follows the Function's own
            return ctx.node.function.backward(ctx, *grads)
        return ctx.node.backward(ctx, grads)
