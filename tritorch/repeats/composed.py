"""Calls of an op whose result has a gradient, repeated: the casts of autocast and the nodes that
the op made of its arguments, without what it asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import _pop_mode_temporarily

from tritorch import binding, launch
from tritorch.repeats import nodes
from tritorch.repeats.listener import Listener


class Cast(NamedTuple):
    place: int
    device: str
    dtype: torch.dtype

    def __call__(self, values: list[Any]) -> None:
        values.append(binding.cast(values[self.place], self.device, self.dtype))


class Applied(NamedTuple):
    """A node of its call's arguments, with values in place of the tensors."""

    node: nodes.Node
    arguments: list[Any]
    # where among the arguments, and which value
    tensors: list[tuple[int, int]]

    def __call__(self, values: list[Any]) -> None:
        arguments = self.arguments.copy()
        for at, place in self.tensors:
            arguments[at] = values[place]
        outputs = self.node(arguments)
        if isinstance(outputs, tuple):
            values.extend(outputs)
        else:
            values.append(outputs)


class Composition(NamedTuple):
    """What a call did."""

    device: int
    steps: list[Cast | Applied]
    result: int

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Does it with these arguments."""
        values = [None, *arguments]
        for step in self.steps:
            step(values)
        return values[self.result]


def watch(
    op: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, Composition | None]:
    """What `op(*arguments, **named)` returns, and what repeats the call, if anything does."""
    mode = _Mode((*arguments, *named.values()))
    result = mode.listen("composer", op, arguments, named)
    return result, mode.composition(result)


class _Mode(Listener):
    """Hears of the nodes that a call makes, and of all that it does in torch besides."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__(arguments)
        self._steps: list[Cast | Applied] = []
        # of the nodes
        self._devices: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._is_repeatable = False
        return func(*args, **(kwargs or {}))

    def apply(self, function: type[Function], arguments: tuple[Any, ...]) -> Any:
        """A node that the call makes."""
        # a view may be written or not, which the op asks each time
        is_view = [isinstance(one, Tensor) and one._is_view() for one in arguments]
        outputs, node = self._aside(lambda: nodes.watched(function, arguments))
        if node is None or any(is_view[at] for at in node.written):
            self._is_repeatable = False
        else:
            self._step(node, arguments)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            self._add(output)
        return outputs

    def _step(self, node: nodes.Node, arguments: tuple[Any, ...]) -> None:
        given, tensors = list(arguments), []
        for at, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                given[at] = None
                tensors.append((at, self._place(argument)))
        self._devices.add(node.device)
        self._steps.append(Applied(node, given, tensors))

    def _place(self, tensor: Tensor) -> int:
        place = self._places.get(id(tensor), -1)
        self._is_repeatable &= place >= 0
        return place

    def cast(self, tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        """A cast of autocast, which keeps its own count of what was cast before."""
        result: Tensor = self._aside(lambda: binding.cast(tensor, device, dtype))
        self._steps.append(Cast(self._place(tensor), device, dtype))
        self._add(result)
        return result

    def writes(self, tensors: tuple[Tensor, ...]) -> None:
        """Of tensors whose versions have counted a write, outside of any node."""
        self._is_repeatable = False

    def _aside(self, does: Callable[[], Any]) -> Any:
        """What is known of a call, and nothing that this one does besides."""
        launch.thread.composer = None
        try:
            with _pop_mode_temporarily():
                return does()
        finally:
            launch.thread.composer = self

    def composition(self, result: Any) -> Composition | None:
        """What repeats a call with this result, if anything does."""
        place = self._places.get(id(result)) if isinstance(result, Tensor) else None
        if place is None or len(self._devices) != 1 or not self._is_repeatable:
            return None
        return Composition(self._devices.pop(), self._steps, place)
