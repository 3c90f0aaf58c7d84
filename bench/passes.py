"""The calls of one pass of a case, on a ring of slots, and what they must give."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch.bench.cases import BOTH, Case, Slot
from tritorch.bench.timing import Call
from tritorch.testing.calls import map_tensors, outputs_of, tensors_of

# slots of a ring, at most; what they lack to fill the cache is read besides
_MOST = 16


def ring(case: Case, cache: int, memory: int) -> int:
    """How many slots keep a cache of so many bytes cold, within `memory` bytes."""
    wanted = math.ceil(2 * cache / max(case.size, 1))
    # a slot's outputs, gradients and what is saved for them, of two implementations
    affordable = memory // max(12 * case.size, 1)
    return max(2, min(wanted, _MOST, affordable))


class Prepared:
    """One pass of a case, ready to be called: `calls[implementation][slot]`.

    A backward pass differentiates, again and again, what was computed here.
    """

    def __init__(self, case: Case, which: str, slots: Sequence[Slot]) -> None:
        self.case, self.which, self.slots = case, which, slots
        self.wanted = case.passes[which]
        self.grads = [self._grads(number, seed=number) for number in range(len(slots))]
        self.calls: dict[str, list[Call]] = {name: [] for name in case.implementations}

    def prepare(self, implementation: str) -> Sequence[Call]:
        """Makes the calls of one implementation; raises what it raises."""
        calls = self.calls[implementation]
        calls[:] = [self.call(implementation, number) for number in range(len(self.slots))]
        return calls

    def call(self, implementation: str, number: int) -> Call:
        """One call on one slot; of a backward pass, of what is computed now."""
        function, slot = self.case.implementations[implementation], self.slots[number]
        if not self.wanted:
            return bound(function, slot.arguments)
        given, leaves = _leaves(slot.arguments, self.wanted)
        for name in self.case.mutates:
            # what one call writes another one may have saved for its gradient
            if name in given:
                given[name] = map_tensors(given[name], Tensor.clone)
        forward, grads = bound(function, given), self.grads[number]
        if self.which == BOTH:
            return lambda: _both(forward, leaves, grads)
        with torch.enable_grad():
            outputs = _differentiable(forward())
        return lambda: torch.autograd.grad(
            outputs, leaves, grads, retain_graph=True, allow_unused=True
        )

    def named(self, result: Any) -> dict[str, Any]:
        """What a call returned, by names; not looked at yet."""
        if not self.wanted:
            return _outputs(result)
        if self.which == BOTH:
            outputs, grads = result
            return {**_outputs(outputs), **self._gradients(grads)}
        return self._gradients(result)

    def _gradients(self, grads: Sequence[Any]) -> dict[str, Any]:
        named = zip(self.wanted, grads, strict=True)
        return {f"gradient of {name}": grad for name, grad in named if grad is not None}

    def outcome(
        self, function: Callable[..., Any], number: int, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """What `function` gives on a slot, floating-point tensors converted to `dtype` first.

        On copies of what it writes, which are among the results.
        """
        slot = self.slots[number]

        def converted(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

        given: dict[str, Any] = {}
        for name, value in slot.arguments.items():
            value = map_tensors(value, converted)
            written = name in self.case.mutates
            given[name] = map_tensors(value, Tensor.clone) if written else value
        if not self.wanted:
            with torch.no_grad():
                found = _outputs(bound(function, given)())
            return found | _written(self.case, given)
        given, leaves = _leaves(given, self.wanted)
        grads = [converted(grad) for grad in self.grads[number]]
        with torch.enable_grad():
            result = bound(function, given)()
            outputs = _differentiable(result)
            grads = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)  # type: ignore[assignment]
        found = self._gradients(grads)
        return {**_outputs(result), **found} if self.which == BOTH else found

    def refill(self, number: int, seed: int) -> None:
        """New numbers in the slot's memory; calls made before must be made again."""
        self.slots[number].fill(seed)
        self.grads[number] = self._grads(number, seed)

    def _grads(self, number: int, seed: int) -> list[Tensor]:
        """Gradients of the outputs, of torch's memory format, as a layer above would send them."""
        if not self.wanted:
            return []
        case, slot = self.case, self.slots[number]
        given, _ = _leaves(slot.arguments, self.wanted)
        written = {n: map_tensors(given[n], Tensor.clone) for n in case.mutates if n in given}
        with torch.enable_grad():
            outputs = _differentiable(bound(case.reference, given | written)())
        generator = torch.Generator(slot.device).manual_seed(seed)
        return [
            torch.empty_like(output, requires_grad=False).normal_(generator=generator)
            for output in outputs
        ]


def bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Call:
    """The call with these arguments, without a look at signatures every time."""
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError):
        # other names, or a function of torch that is written in C++
        return functools.partial(function, *arguments.values())
    return functools.partial(function, **arguments)


def _both(forward: Call, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:
    with torch.enable_grad():
        result = forward()
        found = torch.autograd.grad(_differentiable(result), leaves, grads, allow_unused=True)
    return result, found


def _leaves(
    arguments: Mapping[str, Any], wanted: Sequence[str]
) -> tuple[dict[str, Any], list[Tensor]]:
    given = dict(arguments)
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    return given, [given[name] for name in wanted]


def _differentiable(result: Any) -> list[Tensor]:
    return [output for output in outputs_of(result) if output.requires_grad]


def _outputs(result: Any) -> dict[str, Any]:
    return {f"output {number}": output for number, output in enumerate(outputs_of(result))}


def _written(case: Case, given: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{name}[{number}] afterwards": tensor
        for name in case.mutates
        for number, tensor in enumerate(tensors_of(given.get(name)))
    }
