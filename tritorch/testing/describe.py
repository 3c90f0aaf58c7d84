"""Finds out what a user's function claims to be, by calling its reference: a `Subject` to check.

Which arguments it writes, which get gradients, and by which rule its rounding is judged: all of
that follows from the reference, so nobody has to declare it, and everything can be declared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample, Subject
from tritorch.testing import cases
from tritorch.testing.calls import call, map_tensors, outputs_of
from tritorch.testing.errors import RequestError

Accuracy = Literal["exact", "multilinear", "composite"]


def describe(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    samples: Callable[[Maker], Iterable[Sample]],
    *,
    name: str = "",
    gradients: Iterable[str] | None = None,
    mutates: Iterable[str] | None = None,
    accuracy: Accuracy | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    non_finite: Iterable[str] | None = None,
) -> Subject:
    """The subject of a check; what is None is found out from the reference and the first sample.

    gradients: the floating-point arguments, where both `fn` and the reference give results that
    require a gradient.  mutates: what the reference writes.  accuracy: "exact" where every value
    of the reference's outputs is one of its inputs', "multilinear" where it is linear in each
    floating-point argument and no coefficient is negative, else "composite".  dtypes: those of
    float32, float16 and bfloat16 that the reference takes.  non_finite: the arguments in which NaN
    and infinities are tried, all floating-point ones.

    Raises RequestError where the reference takes no sample, with what it says, and for a name that
    is no such argument's.
    """
    taken, refused = [], {}
    for dtype in dtypes or (torch.float32, torch.float16, torch.bfloat16):
        arguments = _first(samples, Maker(dtype, seed="describe"))
        try:
            outputs_of(_call(reference, arguments), "the reference")
        except Exception as error:
            refused[dtype] = error
        else:
            taken.append(dtype)
    if not taken:
        why = next(iter(refused.values()))
        raise RequestError(
            f"check: the reference refuses the inputs: {type(why).__name__}: {why}"
        ) from why
    # as the truth is computed, whatever dtype an argument always has
    arguments = {
        name: map_tensors(value, lambda t: t.double() if t.is_floating_point() else t)
        for name, value in _first(samples, Maker(torch.float64, seed="describe")).items()
    }
    try:
        _call(reference, arguments)
    except Exception as error:
        raise RequestError(
            "check: the reference refuses float64, in which it says what is right: "
            f"{type(error).__name__}: {error}"
        ) from error
    floating = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    gradients = _known("gradients", gradients, floating)
    mutates = _known("mutates", mutates, arguments)
    non_finite = _known("non_finite", non_finite, floating)
    found_mutates = _mutated(reference, arguments) if mutates is None else mutates
    if gradients is None:
        give = _differentiable(reference, arguments, floating)
        gradients = give if give and not found_mutates else ()
    return Subject(
        name=name or getattr(fn, "__name__", "function"),
        op=fn,
        reference=reference,
        gradients=gradients,
        samples=samples,
        accuracy=accuracy or classify(reference, arguments),
        mutates=found_mutates,
        dtypes=tuple(taken),
        non_finite=tuple(floating) if non_finite is None else non_finite,
        double_backward=False,
    )


def _known(
    what: str, names: Iterable[str] | None, arguments: Iterable[str]
) -> tuple[str, ...] | None:
    if names is None:
        return None
    given, known = tuple(names), tuple(arguments)
    for name in given:
        if name not in known:
            raise RequestError(
                f"check: {what}: expects some of {', '.join(known)}, received {name}"
            )
    return given


def gives_gradients(subject: Subject, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether the function, called once, gives a result that requires a gradient.

    Its backward is not asked: one that raises, or gives nothing, is to be found.
    """
    arguments = _first(subject.samples, Maker(dtype, device, seed="describe"))
    given = {
        name: map_tensors(value, lambda tensor: tensor.detach().clone())
        for name, value in arguments.items()
    }
    for name in subject.gradients:
        value = given[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    return any(output.requires_grad for output in outputs_of(call(subject.op, given)))


def classify(reference: Callable[..., Any], arguments: dict[str, Argument]) -> Accuracy:
    """By which rule the rounding of what the reference computes is judged."""
    result = outputs_of(_call(reference, arguments))
    if result and _only_copies(reference, arguments, result):
        return "exact"
    floating = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    if len(result) != 1 or not floating:
        return "composite"
    (output,) = result
    if not output.is_floating_point() or not output.isfinite().all():
        return "composite"
    generator = torch.Generator().manual_seed(1)
    for name in floating:
        given = arguments[name]
        assert isinstance(given, Tensor)
        other = torch.randn(given.shape, generator=generator, dtype=given.dtype)
        of_other, of_both = (
            outputs_of(_call(reference, arguments | {name: value}))[0]
            for value in (other, given + 2 * other)
        )
        others = _without(reference, arguments, name)
        # linear up to what does not depend on it, an added bias say
        expected = output + 2 * (of_other - others)
        if not torch.allclose(of_both, expected, rtol=1e-9, atol=1e-9):
            return "composite"
    magnitudes = {n: v.abs() if n in floating else v for n, v in arguments.items()}  # type: ignore[union-attr]
    most = outputs_of(_call(reference, magnitudes))[0]
    return "multilinear" if bool((most + 1e-9 >= output.abs()).all()) else "composite"


def bind(fn: Callable[..., Any], values: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by the names of the function's parameters."""
    return dict(inspect.signature(fn).bind(*values).arguments)


def _without(reference: Callable[..., Any], arguments: dict[str, Argument], name: str) -> Tensor:
    given = arguments[name]
    assert isinstance(given, Tensor)
    return outputs_of(_call(reference, arguments | {name: torch.zeros_like(given)}))[0]


def _first(samples: Callable[[Maker], Iterable[Sample]], make: Maker) -> dict[str, Argument]:
    for sample in samples(make):
        return dict(sample.arguments)
    raise RequestError("check: there are no samples")


def _call(function: Callable[..., Any], arguments: dict[str, Argument]) -> Any:
    copies = {
        name: map_tensors(value, lambda tensor: tensor.detach().clone())
        for name, value in arguments.items()
    }
    return call(function, copies)


def _copies(output: Tensor, arguments: dict[str, Argument]) -> bool:
    """Whether every value is one of the arguments', or zero."""
    values = [
        value.reshape(-1).to(output.dtype)
        for value in arguments.values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not values or output.numel() == 0:
        return False
    known = torch.cat([*values, output.new_zeros(1)])
    return bool(torch.isin(output.reshape(-1), known).all())


def _only_copies(
    reference: Callable[..., Any], arguments: dict[str, Argument], result: tuple[Tensor, ...]
) -> bool:
    """Whether the outputs hold the arguments' values, and the gradients those of the outputs'."""
    if not all(not output.is_floating_point() or _copies(output, arguments) for output in result):
        return False
    floating = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    grads, given = _gradients(reference, arguments, floating)
    return all(_copies(grad, {"given": given}) for grad in grads.values())


def _mutated(reference: Callable[..., Any], arguments: dict[str, Argument]) -> tuple[str, ...]:
    copies = {n: map_tensors(v, lambda t: t.detach().clone()) for n, v in arguments.items()}
    call(reference, copies)
    return tuple(
        name for name, value in copies.items() if not cases.bitwise_equal(value, arguments[name])
    )


def _differentiable(
    function: Callable[..., Any], arguments: dict[str, Argument], names: Iterable[str]
) -> tuple[str, ...]:
    """The arguments of `names`, if a result of the function requires their gradients."""
    return tuple(_gradients(function, arguments, names)[0])


def _gradients(
    function: Callable[..., Any], arguments: dict[str, Argument], names: Iterable[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by argument, and all that was sent into the outputs, as one tensor."""
    given = {
        name: map_tensors(value, lambda tensor: tensor.detach().clone())
        for name, value in arguments.items()
    }
    chosen: dict[str, Tensor] = {}
    for name in names:
        value = given[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            chosen[name] = value.requires_grad_()
    nothing: tuple[dict[str, Tensor], Tensor] = {}, torch.zeros(1)
    try:
        results = outputs_of(call(function, given))
    except RuntimeError:
        # it writes to a leaf, say
        return nothing
    outputs = [output for output in results if output.requires_grad]
    if not outputs or not chosen:
        return nothing
    generator = torch.Generator().manual_seed(2)
    sent = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for output in outputs
    ]
    found = torch.autograd.grad(outputs, list(chosen.values()), sent, allow_unused=True)
    grads = {name: g for name, g in zip(chosen, found, strict=True) if g is not None}
    return grads, torch.cat([grad.reshape(-1) for grad in sent])
