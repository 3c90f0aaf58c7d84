"""The properties of a function as a part of torch: autograd, autocast, compiler, library, strides.

As in `battery.py`, each is a function from a subject and a case to findings, and none is good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.library import opcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch.registry import Argument, Subject
from tritorch.testing import calls, cases, interpreter, products
from tritorch.testing.findings import Finding
from tritorch.testing.trials import Case, different, judged, outcome, raised, same_bits

# namespaces of torch's own ops
_TORCHS = frozenset(("aten", "prim", "prims", "profiler", "inductor", "debugprims", "triton"))


def layout_of_results(
    subject: Subject, case: Case, *, channels_last: bool = False
) -> list[Finding]:
    """Outputs and gradients have the strides that torch gives them.

    channels_last: every argument of four or five dimensions is.
    """
    arguments = case.arguments(subject)
    if channels_last:
        arguments = {
            n: cases.relayout(v, "channels_last") if isinstance(v, Tensor) else v
            for n, v in arguments.items()
        }
    actual, findings = outcome(subject, case, arguments)
    if actual is None:
        return findings
    grad = case.gradient(subject)
    torchs = [
        dict(cases.reference(subject, given, grad).named()) for given in _on_devices(arguments)
    ]
    for what, value in actual.named():
        findings += _other_strides(what, value, [named[what] for named in torchs], case)
    return findings


def format_of_outputs(subject: Subject, case: Case, argument: str) -> list[Finding]:
    """Outputs have torch's memory format where that argument alone is channels_last.

    Of gradients torch promises less: on a CPU convolution's follow the library that it calls.
    """
    case = replace(case, layout=(argument, "channels_last"))
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, wanted=())
    if actual is None:
        return findings
    torchs = [
        cases.reference(subject, given, wanted=()).outputs for given in _on_devices(arguments)
    ]
    for number, value in enumerate(actual.outputs):
        findings += _other_strides(
            f"output {number}", value, [outputs[number] for outputs in torchs], case
        )
    return findings


def _on_devices(arguments: dict[str, Argument]) -> list[dict[str, Argument]]:
    """The arguments where they are, and on the CPU: torch's group norm, say, keeps channels_last on
    one of the two alone.
    """
    tensors = [t for value in arguments.values() for t in calls.tensors_of(value)]
    return [arguments, *([cases.on_cpu(arguments)] if any(t.is_cuda for t in tensors) else [])]


def _other_strides(what: str, value: Tensor, torchs: Sequence[Tensor], case: Case) -> list[Finding]:
    """A finding if `value` has the strides of none of torch's results."""
    received, *wanted = (
        tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
        for t in (value, *torchs)
    )
    if received in wanted:
        return []
    message = f"{what} has strides {received}, torch's {wanted[0]}"
    return [Finding("shape", message, argument=what, case=str(case))]


def counts_writes(subject: Subject, case: Case) -> list[Finding]:
    """Autograd sees what a call writes: the version of the tensor moves with its bits."""
    arguments = {
        name: calls.map_tensors(value, lambda tensor: tensor.detach().clone())
        for name, value in case.arguments(subject).items()
    }
    written = [
        (name, tensor) for name in subject.mutates for tensor in calls.tensors_of(arguments[name])
    ]
    before = [(tensor._version, tensor.clone()) for _, tensor in written]
    calls.call(subject.op, arguments)
    return [
        Finding(
            "mutation",
            f"{name} has changed and its version has not: autograd takes it for what it was",
            argument=name,
            case=str(case),
        )
        for (name, tensor), (version, bits) in zip(written, before, strict=True)
        if tensor._version == version and not cases.bitwise_equal(tensor, bits)
    ]


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
        given = [("is leaf[1:]", longer, lambda leaf: leaf[1:])]
        if tensor.dim() > 1:
            given.insert(0, ("is leaf.mT", turned, lambda leaf: leaf.transpose(0, -1)))
        for said, leaf, view in given:
            change = _replacing(name, name, view)
            findings += _changed(subject, case, arguments | {name: leaf}, change, said, order)
        for other, value in tensors.items():
            if other > name and (value.shape, value.dtype) == (tensor.shape, tensor.dtype):
                change = _replacing(other, name, lambda leaf: leaf)
                findings += _changed(subject, case, arguments, change, f"is {other}", order)
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


def autocast(subject: Subject, case: Case) -> list[Finding]:
    """Under autocast results have torch's dtypes, and the bits of a call with the arguments that
    autocast makes.
    """
    device = torch.device(case.device).type

    def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Argument) -> Any:
            with torch.autocast(device, dtype=torch.bfloat16):
                return calls.call(function, arguments)

        return call

    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, function=under_autocast(subject.op))
    if actual is None:
        return findings
    other = replace(subject, reference=under_autocast(subject.reference))
    torchs = dict(cases.reference(other, arguments, case.gradient(subject)).named())
    rounded = arguments
    if subject.autocast == "lower":
        lowered = subject.lowered or tuple(arguments)
        rounded = {
            n: v.bfloat16()
            if n in lowered and isinstance(v, Tensor) and v.is_floating_point()
            else v
            for n, v in arguments.items()
        }
    plain, findings = outcome(subject, case, rounded)
    if plain is None:
        return findings
    without = dict(plain.named())
    if not torchs.keys() == without.keys() == dict(actual.named()).keys():
        message = f"results are {list(dict(actual.named()))}, torch's {list(torchs)}"
        return [*findings, Finding("shape", message, case=str(case))]
    for what, value in actual.named():
        if value.dtype != torchs[what].dtype:
            message = f"{what} is {value.dtype}, torch's {torchs[what].dtype}"
            findings.append(Finding("shape", message, argument=what, case=str(case)))
        expected = without[what].to(value.dtype)
        if not torch.equal(value, expected):
            findings.append(different("values", what, value, expected, case))
    return findings


def compiles(subject: Subject, case: Case) -> list[Finding]:
    """torch.compile makes one graph of the op, which computes the same bits."""
    torch.compiler.reset()
    compiled = torch.compile(subject.op, fullgraph=True, backend="aot_eager")
    arguments = case.arguments(subject)
    try:
        actual = cases.run(compiled, subject, arguments, grad_outputs=case.gradient(subject))
    except Exception as error:
        found = raised(error, case)
        return [replace(found, kind="compilation", message=f"torch.compile: {found.message}")]
    eager, findings = outcome(subject, case, arguments)
    if eager is None:
        return findings
    return same_bits("compilation", "under torch.compile", actual, eager, case)


def library(subject: Subject, case: Case, *, required: bool = False) -> list[Finding]:
    """Every op of torch.library that the call runs passes torch's own checks of it.

    required: there must be one.
    """
    arguments = case.arguments(subject)
    with _Recorded() as recorded:
        _, findings = outcome(subject, case, arguments)
    calls = {call[0]: call for call in recorded.calls}
    if required and not calls:
        findings.append(Finding("library", "no library op was called", case=str(case)))
    for function, args, kwargs in calls.values():
        try:
            opcheck(function, args, kwargs)
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), repr(error))
            # there is none
            text = text.removesuffix(" (scroll up for stack trace)")
            findings.append(Finding("library", f"{function}: {text}", case=str(case)))
    return findings


class _Recorded(TorchDispatchMode):
    """Collects the calls of ops that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace not in _TORCHS:
            # the ops know nothing of autograd: the Function around them does
            given = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.calls.append((function, *given))
        return function(*args, **(kwargs or {}))


def tf32_is_used(subject: Subject, case: Case) -> list[Finding]:
    """Where torch's flags allow TF32, float32 products are right within its rounding, and not
    within float32's: it was asked for and happened.
    """
    arguments = case.arguments(subject)
    with products.allowing_tf32(), _rounding_to_tf32(case):
        actual, findings = outcome(subject, case, arguments)
        if actual is None:
            return findings
        findings += judged(subject, replace(case, unit_in=2**-11), arguments, actual)
        within = judged(subject, replace(case, unit_in=0.0), arguments, actual)
    if not any(finding.argument == "output 0" for finding in within):
        message = "the result is as close as float32's, though TF32 is allowed"
        findings.append(Finding("tf32", message, case=str(case)))
    return findings


def tf32_is_not_used(subject: Subject, case: Case) -> list[Finding]:
    """Products of float32 keep its rounding, on hardware whose tensor cores would take TF32."""
    arguments = case.arguments(subject)
    with _rounding_to_tf32(case):
        actual, findings = outcome(subject, case, arguments)
    if actual is None or not (wrong := judged(subject, case, arguments, actual)):
        return findings
    exact, _ = outcome(subject, case, arguments)
    known = {f.argument for f in judged(subject, case, arguments, exact)} if exact else set()
    said = 'a product of float32 operands without input_precision="ieee" is TF32\'s'
    return findings + [
        replace(finding, kind="tf32", message=f"{said}: {finding.message}")
        for finding in wrong
        if finding.argument not in known
    ]


def _rounding_to_tf32(case: Case) -> contextlib.AbstractContextManager[None]:
    """On the CPU the interpreter drops the bits that a tensor core would."""
    on_gpu = torch.device(case.device).type != "cpu"
    return contextlib.nullcontext() if on_gpu else interpreter.corrected(tf32=True)
