"""The properties of a function's gradients: through views, by finite differences, and their own.

As in `battery.py`, each is a function from a subject and a case to findings, and none is good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from tritorch.registry import Argument, Subject
from tritorch.testing import calls, cases
from tritorch.testing.findings import Finding
from tritorch.testing.trials import Case, judged, outcome


def views(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Gradients reach what an argument is a view of, and add up where two arguments are one tensor.

    In turn each argument with a gradient is the transposed of a tensor, the rest of one without its
    first slice, and any other of its shape and dtype.
    """
    arguments = case.arguments(subject)
    findings: list[Finding] = []
    tensors = {
        n: v
        for n in subject.gradients
        if isinstance(v := arguments.get(n), Tensor) and v.is_floating_point() and v.dim()
    }
    for name, tensor in tensors.items():
        turned = tensor.transpose(0, -1).contiguous()
        longer = torch.cat([tensor[:1], tensor])
        given = [("leaf[1:]", longer, lambda leaf: leaf[1:])]
        if tensor.dim() > 1:
            given.insert(0, ("leaf.mT", turned, lambda leaf: leaf.transpose(0, -1)))
        for said, leaf, view in given:
            change, said = _replacing(name, name, view), f"{name} is {said}"
            findings += _changed(subject, case, arguments | {name: leaf}, change, said, order)
        for other, value in tensors.items():
            if other > name and (value.shape, value.dtype) == (tensor.shape, tensor.dtype):
                change, said = _replacing(other, name, lambda leaf: leaf), f"{other} is {name}"
                findings += _changed(subject, case, arguments, change, said, order)
    return findings


Change = Callable[[dict[str, Argument]], dict[str, Argument]]


def _replacing(target: str, source: str, view: Callable[[Tensor], Tensor]) -> Change:
    return lambda given: given | {target: calls.map_tensors(given[source], view)}


def _changed(
    subject: Subject,
    case: Case,
    arguments: dict[str, Argument],
    change: Change,
    said: str,
    order: Any,
) -> list[Finding]:
    """Judges the subject where both functions get their arguments changed."""

    def changing(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: calls.call(function, change(given))

    changed = replace(subject, op=changing(subject.op), reference=changing(subject.reference))
    actual, findings = outcome(changed, case, arguments, order=order)
    if actual is not None:
        findings += judged(changed, case, arguments, actual)
    return [replace(finding, message=f"{said}: {finding.message}") for finding in findings]


def gradcheck(subject: Subject, case: Case) -> list[Finding]:
    """Gradients are what finite differences say; the case is a small one in float64."""
    call, inputs = _of_inputs(subject, case)
    try:
        torch.autograd.gradcheck(call, inputs)
    except GradcheckError as error:
        return [Finding("gradients", f"gradcheck: {error}", case=str(case))]
    return []


def second_gradient(subject: Subject, case: Case) -> list[Finding]:
    """The gradient of a gradient is right too, or raises, as `once_differentiable` makes it.

    Right by finite differences where the subject claims to have it; else it may be right by the
    reference.
    """
    call, inputs = _of_inputs(subject, case)
    if subject.double_backward:
        try:
            torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
        except GradcheckError as error:
            return [Finding("gradients", f"gradgradcheck: {error}", case=str(case))]
        return []
    try:
        ours = _second(call, inputs, case)
    except RuntimeError:
        # it says that there is none
        return []
    references, same_inputs = _of_inputs(replace(subject, op=subject.reference), case)
    try:
        theirs = _second(
            references, [t.detach().double().requires_grad_() for t in same_inputs], case
        )
    except RuntimeError as error:
        # the first gradient is a constant
        if not any(grad is not None and bool(grad.any()) for grad in ours):
            return []
        raise cases.Refused(f"{subject.name}: the reference has no second gradient") from error
    for grad, true in zip(ours, theirs, strict=True):
        expected = torch.zeros_like(inputs[0]) if true is None else true
        received = torch.zeros_like(expected) if grad is None else grad
        bound = 1e3 * torch.finfo(case.dtype).eps * float(expected.abs().max()) + 1e-30
        if not bool(((received.double() - expected.double()).abs() <= bound).all()):
            message = (
                "the gradient of the gradient is wrong, and nothing says that there is none: "
                "decorate backward with once_differentiable"
            )
            return [Finding("gradients", message, case=str(case))]
    return []


def once_differentiable(subject: Subject, case: Case) -> list[Finding]:
    """A subject without a second gradient says so, by that decorator's own error."""
    call, inputs = _of_inputs(subject, case)
    try:
        _second(call, inputs, case)
    except RuntimeError as error:
        if "once_differentiable" in str(error):
            return []
        said = f"raises {error}"
    else:
        said = "is computed"
    return [Finding("gradients", f"the gradient of the gradient {said}", case=str(case))]


def _second(
    call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], case: Case
) -> tuple[Tensor | None, ...]:
    """The gradient of the sum of the gradients' cosines, which no constant factor hides."""
    generator = torch.Generator().manual_seed(case.seed)
    outputs = [output for output in call(*inputs) if output.requires_grad]
    # the decorator minds whether these require a gradient
    weights = [torch.randn(o.shape, generator=generator).to(o).requires_grad_() for o in outputs]
    grads = torch.autograd.grad(outputs, inputs, weights, create_graph=True, allow_unused=True)
    total = sum((grad.cos().sum() for grad in grads if grad is not None), inputs[0].new_zeros(()))
    # unlike grad(), it goes everywhere, and meets what the decorator left to raise
    torch.autograd.backward(total)
    return tuple(tensor.grad for tensor in inputs)


def _of_inputs(
    subject: Subject, case: Case
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The op as a function of the arguments that have a gradient, and those."""
    given = case.arguments(subject)
    # a target may be class indices
    named = {
        n: t.clone().requires_grad_()
        for n in subject.gradients
        if isinstance(t := given.get(n), Tensor) and t.is_floating_point()
    }

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        fresh = {n: calls.map_tensors(v, torch.clone) for n, v in given.items()}
        result = calls.call(subject.op, fresh | dict(zip(named, tensors, strict=True)))
        outputs = calls.outputs_of(result, subject.name)
        return tuple(output for output in outputs if output.is_floating_point())

    return call, list(named.values())
