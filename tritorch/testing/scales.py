"""Derives how large the terms of results are, from the function or from a subject's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from tritorch.registry import Argument, Subject
from tritorch.testing.calls import call, map_tensors, outputs_of, tensors_of
from tritorch.testing.tolerances import COMPOSITE_TERMS, root_mean_square

# far above the roundoff of float64, far below what makes the second order matter
_STEP = 2.0**-20
_PROBES = 16


class Scale(TypedDict, total=False):
    """K, s1 and s2 of one tensor, each of its shape, float64: keyword arguments of `compare`.

    A composite op has no `magnitude`.
    """

    terms: Tensor
    magnitude: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Scales:
    """The scales of a function's output and, argument by argument, of its gradients.

    A gradient's is None for an argument that has none, and for all without a `grad_output`.
    """

    output: Scale
    grads: tuple[Scale | None, ...]


def derive_scales(
    function: Callable[..., Tensor], args: Sequence[Any], grad_output: Tensor | None = None
) -> Scales:
    """K, s1 and s2 of `function(*args)`, and of its gradients with respect to `args`.

    `function` is linear in each floating-point tensor of `args`, with no negative coefficient of
    its own (matmul, convolution, average pooling; an added bias is one more term).  Other
    arguments, None included, pass through.  It runs in float64 on ones, on magnitudes and on
    squares, and is differentiated by autograd with ones, |grad_output| and grad_output^2.  Of an
    average over k elements K comes out as 1 and s2 as sqrt(k) times too large: their product
    sqrt(K) s2, which is what the rule uses, comes out right.
    """
    kinds = torch.ones_like, torch.abs, torch.square
    results = [_evaluate(function, args, grad_output, kind) for kind in kinds]
    output, *grads = (
        None
        if terms is None or magnitude is None or squares is None
        else Scale(terms=terms, magnitude=magnitude, scale=squares.sqrt())
        for terms, magnitude, squares in zip(*results, strict=True)
    )
    assert output is not None
    return Scales(output, tuple(grads))


def derive_conditions(
    function: Callable[..., Tensor], args: Sequence[Any], grad_output: Tensor | None = None
) -> Scales:
    """K and s2 of a composite function, and of its gradients.

    s2 is |t| + rms(t) plus the root mean square of the result's change, per unit, over random
    relative perturbations of every floating-point tensor of `args` and of `grad_output`: a stable
    algorithm's result is a slightly perturbed problem's.  Where all of that is 0, as in the loss of
    a single class, whose logit cancels, it is the largest operand: it may have been rounded before.
    Where the function refuses that, as one of probabilities refuses more than 1, the perturbations
    are towards zero.  The function, which runs in float64, must be differentiable where it is
    asked.
    """
    generator = torch.Generator().manual_seed(0)

    def draws(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return drawn.to(tensor.device)

    def shake(tensor: Tensor) -> Tensor:
        return tensor * (1 + _STEP * draws(tensor))

    def shrink(tensor: Tensor) -> Tensor:
        return tensor * (1 - _STEP * draws(tensor).abs())

    def evaluate(kind: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        return _evaluate(function, args, grad_output, kind)

    results = [evaluate(torch.clone)]
    try:
        results += [evaluate(shake) for _ in range(_PROBES)]
    except (RuntimeError, ValueError):
        results[1:] = [evaluate(shrink) for _ in range(_PROBES)]
    operands = [tensor.detach() for arg in (*args, grad_output) for tensor in tensors_of(arg)]
    finite = [arg[arg.isfinite()].abs() for arg in operands if arg.is_floating_point()]
    largest = max((float(some.max()) for some in finite if some.numel()), default=0.0)
    output, *grads = (_condition(largest, *found) for found in zip(*results, strict=True))
    assert output is not None
    return Scales(output, tuple(grads))


def _condition(largest: float, still: Tensor | None, *shaken: Tensor | None) -> Scale | None:
    if still is None:
        return None
    moves = torch.stack([result - still for result in shaken if result is not None]) / _STEP
    moved = moves.square().mean(0).sqrt()
    scale = moved + still.abs() + root_mean_square(still[still.isfinite()])
    scale = torch.where(scale == 0, largest, scale)
    return Scale(terms=torch.full_like(still, COMPOSITE_TERMS), scale=scale)


def _evaluate(
    function: Callable[..., Tensor],
    args: Sequence[Any],
    grad_output: Tensor | None,
    transform: Callable[[Tensor], Tensor],
) -> list[Tensor | None]:
    """The output of `function(*args)` and the gradients, of arguments put through `transform`."""
    leaves = [
        transform(arg.detach().double()).requires_grad_()
        if isinstance(arg, Tensor) and arg.is_floating_point()
        else arg
        for arg in args
    ]
    with torch.enable_grad():
        output = function(*leaves)
    if grad_output is None:
        return [output.detach(), *[None] * len(leaves)]
    differentiable = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
    inputs = [leaf for leaf, yes in zip(leaves, differentiable, strict=True) if yes]
    incoming = transform(grad_output.detach().double())
    found = iter(torch.autograd.grad(output, inputs, incoming, allow_unused=True))
    return [output.detach(), *(next(found) if yes else None for yes in differentiable)]


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
    derive = derive_scales if multilinear else derive_conditions
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
