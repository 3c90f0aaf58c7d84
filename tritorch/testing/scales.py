"""Derives from its reference how large the terms of a subject's results are, for each result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Subject
from tritorch.testing import tolerances
from tritorch.testing.calls import call, map_tensors, outputs_of, tensors_of


def scales_of(
    spec: Subject,
    arguments: dict[str, Argument],
    grads: list[Tensor],
    wanted: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `tolerances.compare` by the names in an outcome.

    Of every floating-point output, and of the gradients where `grads` are those of the outputs that
    are differentiable, in their order.  `wanted`: the arguments that have a gradient, by default
    all of the subject's.
    """
    gradients = spec.gradients if wanted is None else tuple(wanted)
    if spec.accuracy == "exact" or (spec.mutates and not gradients):
        return {}
    multilinear = spec.accuracy == "multilinear"
    derive = tolerances.derive_scales if multilinear else tolerances.derive_conditions
    names = list(arguments)
    # by the number of an output, filled by the first call
    floating: list[int] = []
    differentiable: list[int] = []

    def outputs(values: tuple[Argument, ...]) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        # torch refuses a gradient of what has none, and what the op writes would be written three
        # times
        fixed = {n: map_tensors(v, Tensor.detach) for n, v in given.items() if n not in gradients}
        fresh = {n: map_tensors(given[n], lambda t: t.detach().clone()) for n in spec.mutates}
        found = outputs_of(call(spec.reference, given | fixed | fresh))
        floating[:] = [i for i, output in enumerate(found) if output.is_floating_point()]
        differentiable[:] = [i for i in floating if found[i].requires_grad]
        return found

    def one(number: int) -> Callable[..., Tensor]:
        return lambda *values: outputs(values)[number].double()

    def all_as_one(*values: Argument) -> Tensor:
        found = outputs(values)
        return torch.cat([found[i].double().reshape(-1) for i in differentiable])

    values = list(arguments.values())
    outputs(tuple(map_tensors(value, _float64) for value in values))
    scales: dict[str, Any] = {}
    if len(grads) == 1:
        derived = derive(one(differentiable[0]), values, grads[0])
        scales[f"output {differentiable[0]}"] = derived.output
    elif grads:
        derived = derive(all_as_one, values, torch.cat([g.double().reshape(-1) for g in grads]))
    for name, scale in zip(names, derived.grads if grads else [None] * len(names), strict=True):
        if scale is not None:
            scales[f"gradient of {name}"] = scale
    for i in floating:
        if f"output {i}" not in scales:
            scales[f"output {i}"] = derive(one(i), values).output
    if any(0 in t.stride() for value in [*arguments.values(), *grads] for t in tensors_of(value)):
        # equal terms round alike: their errors add up in step, not as a random walk
        for scale in scales.values():
            scale["terms"] = scale["terms"].square()
    return scales


def _float64(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_()
