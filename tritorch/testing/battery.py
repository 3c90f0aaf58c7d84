"""The properties that an op must have, each a function from a subject and a case to findings.

The tests of tritorch's own ops are calls of these functions, and so is a check of a user's.  A
property that needs the kernels watched takes `order`; None leaves them alone.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample, Subject
from tritorch.testing import cases, hints, tolerances
from tritorch.testing.cases import Outcome
from tritorch.testing.findings import Finding

SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0)
_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


@dataclass(frozen=True)
class Case:
    """One call: a sample of the subject, its tensors made anew each time, always the same.

    `layout`: an argument and the memory layout it gets.  `grad_layout`: that of the gradients of
    outputs.  `special`: an argument and the value that a few of its elements get.  `integers`:
    every number is one in [-2, 2].  `scale` multiplies floating-point arguments.  `unit_in`: the
    unit roundoff to which products may shorten their operands.
    """

    sample: str
    dtype: torch.dtype
    device: str = "cpu"
    layout: tuple[str, str] | None = None
    grad_layout: str | None = None
    special: tuple[str, float] | None = None
    integers: bool = False
    scale: float = 1.0
    seed: int = 0
    unit_in: float = 0.0
    # arguments instead of the sample's own making
    given: Mapping[str, Argument] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        parts = [self.sample, _NAMES.get(self.dtype, str(self.dtype))]
        if self.integers:
            parts.append("integers")
        if self.scale != 1.0:
            parts.append(f"times {self.scale:g}")
        if self.layout is not None:
            parts.append(" ".join(self.layout))
        if self.grad_layout is not None:
            parts.append(f"gradient {self.grad_layout}")
        if self.special is not None:
            parts.append(f"{self.special[1]} in {self.special[0]}")
        return ", ".join(parts)

    @property
    def id(self) -> str:
        """Four letters that name the case on a command line."""
        return f"{zlib.crc32(f'{self} {self.seed}'.encode()) & 0xFFFF:04x}"

    def arguments(self, subject: Subject) -> dict[str, Argument]:
        """The arguments of the call, as fresh tensors."""
        seed = f"{subject.name}/{self.sample}" + (f"/{self.seed}" if self.seed else "")
        make = Maker(self.dtype, self.device, seed, integers=self.integers)
        found = dict(cases.sample_of(subject, self.sample, make).arguments)
        if self.scale != 1.0:
            for name, value in found.items():
                found[name] = cases.map_tensors(
                    value, lambda t: t * self.scale if t.is_floating_point() else t
                )
        if self.special is not None:
            name, number = self.special
            tensor = found[name]
            assert isinstance(tensor, Tensor)
            found[name] = with_special(tensor, number)
        if self.layout is not None:
            name, layout = self.layout
            value = found[name]
            assert isinstance(value, Tensor)
            found[name] = cases.relayout(value, layout)
        return found

    def gradient(self, subject: Subject) -> Callable[[Tensor], Tensor]:
        """Makes the gradients of outputs."""
        seed = f"{subject.name}/{self.sample}/gradient" + (f"/{self.seed}" if self.seed else "")
        if self.integers:
            return cases.integer_gradient(seed)
        return cases.random_gradient(seed, self.grad_layout)


def with_special(tensor: Tensor, number: float) -> Tensor:
    """A copy in which the first, the last and a few elements between are `number`."""
    found = tensor.clone()
    flat = found.view(-1)
    flat[:: max(flat.numel() // 3, 1)] = number
    return found


# every function below: no findings is good

Property = Callable[[Subject, Case], list[Finding]]


def values(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Outputs and gradients are the float64 truth but for rounding; with `order`, watched."""
    if case.integers:
        return exactness(subject, case, order=order)
    arguments = case.arguments(subject)
    actual, findings = _outcome(subject, case, arguments, order)
    if actual is None:
        return findings
    return findings + _judged(subject, case, arguments, actual)


def exactness(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Integers have exact sums and products: one wrong index is a wrong number."""
    case = replace(case, integers=True)
    arguments = case.arguments(subject)
    actual, findings = _outcome(subject, case, arguments, order)
    if actual is None:
        return findings
    make_grad = case.gradient(subject)
    truth = cases.run(
        subject.reference,
        subject,
        _on_cpu(arguments),
        grad_outputs=lambda like: make_grad(like.to(case.dtype)).double(),
        dtype=torch.float64,
    )
    if mismatch := _shapes(case, actual, truth, dtypes=False):
        return findings + mismatch
    for (what, value), (_, true) in zip(actual.named(), truth.named(), strict=True):
        expected = true.to(value.dtype)
        if not torch.equal(value.cpu(), expected):
            findings.append(_different("exactness", what, value.cpu(), expected, case))
    return findings


def special_values(subject: Subject, case: Case) -> list[Finding]:
    """NaN, infinities and signed zero go where the reference sends them."""
    assert case.special is not None
    return [
        replace(finding, kind="special values")
        if finding.kind in ("values", "gradients")
        else finding
        for finding in values(subject, case)
    ]


def each_gradient_alone(subject: Subject, case: Case) -> list[Finding]:
    """A gradient that is not wanted changes no bit of the others."""
    arguments = case.arguments(subject)
    make_grad = case.gradient(subject)
    everything = cases.run(subject.op, subject, arguments, grad_outputs=make_grad)
    expected = {
        n
        for n in subject.gradients
        if isinstance(value := arguments[n], Tensor) and value.is_floating_point()
    }
    findings = []
    if missing := sorted(expected - everything.grads.keys()):
        message = f"there is no gradient of {', '.join(missing)}"
        findings.append(Finding("gradients", message, case=str(case)))
    for wanted in everything.grads:
        alone = cases.run(subject.op, subject, arguments, grad_outputs=make_grad, wanted=[wanted])
        if list(alone.grads) != [wanted]:
            message = f"asked for the gradient of {wanted}, received {list(alone.grads)}"
            findings.append(Finding("gradients", message, case=str(case)))
        elif not torch.equal(alone.grads[wanted], everything.grads[wanted]):
            what = f"gradient of {wanted} alone"
            pair = alone.grads[wanted], everything.grads[wanted]
            findings.append(_different("gradients", what, *pair, case))
    nothing = cases.run(subject.op, subject, arguments, grad_outputs=make_grad, wanted=[])
    if nothing.grads:
        findings.append(Finding("gradients", "a gradient that nobody wants", case=str(case)))
    return findings + _same_bits("gradients", "without gradients", nothing, everything, case)


def repeatability(subject: Subject, case: Case, *, repeats: int = 2) -> list[Finding]:
    """The same call gives the same bits."""
    arguments, make_grad = case.arguments(subject), case.gradient(subject)
    first = cases.run(subject.op, subject, arguments, grad_outputs=make_grad)
    for _ in range(repeats - 1):
        again = cases.run(subject.op, subject, arguments, grad_outputs=make_grad)
        if findings := _same_bits("repeatability", "repeated", again, first, case):
            return findings
    return []


def history(subject: Subject, sequence: Sequence[Case]) -> list[Finding]:
    """The first call of a sequence gives the same result after the others as before them."""
    first = sequence[0]

    def outcome(case: Case) -> Outcome | None:
        with contextlib.suppress(Exception):
            # what it raises is another property's finding
            arguments = case.arguments(subject)
            return cases.run(subject.op, subject, arguments, grad_outputs=case.gradient(subject))
        return None

    before = outcome(first)
    if before is None:
        return []
    for other in sequence[1:]:
        outcome(other)
        again = outcome(first)
        what = f"after {other}"
        if again is None:
            return [Finding("history", f"{what} it raises, before it did not", case=str(first))]
        if findings := _same_bits("history", what, again, before, first):
            return findings
    return []


def orders(subject: Subject, case: Case, *, seeds: Sequence[int] = (1,)) -> list[Finding]:
    """Programs may run in any order: the result is right backwards and shuffled as well."""
    findings: list[Finding] = []
    for order in ("reverse", *seeds):
        for finding in values(subject, case, order=order):
            if finding.kind in ("values", "gradients", "exactness"):
                message = f"with the programs' order {order}, {finding.message}"
                finding = replace(finding, kind="program order", message=message)
            findings.append(finding)
        if findings:
            break
    return findings


def masked_lanes(subject: Subject, case: Case) -> list[Finding]:
    """No lane that is masked off without `other` changes the result."""
    from tritorch.testing import detectors

    arguments, make_grad = case.arguments(subject), case.gradient(subject)

    def run() -> list[Tensor]:
        outcome = cases.run(subject.op, subject, arguments, grad_outputs=make_grad)
        return [tensor for _, tensor in outcome.named()]

    try:
        return [replace(f, case=str(case)) for f in detectors.masked_lane_findings(run)]
    except Exception as error:
        return [raised(error, case)]


def offsets(subject: Subject, case: Case, argument: str) -> list[Finding]:
    """An argument whose elements lie 2^31 apart is read and written where they are."""
    from tritorch.testing import detectors

    arguments = case.arguments(subject)
    given = arguments[argument]
    assert isinstance(given, Tensor)
    strides = _far_apart(given)
    if strides is None:
        return []
    far = detectors.virtual_tensor(given.shape, strides, given.dtype)
    far.copy_(given)
    findings: list[Finding] = []
    with detectors.detecting(virtual=True) as detector, contextlib.suppress(Exception):
        # not every function takes every stride
        subject.op(**arguments | {argument: far})
    for finding in detector.findings:
        if finding.kind == "int32 overflow" or finding.kind.startswith("out-of-bounds"):
            findings.append(replace(finding, case=f"{case}, {argument} of strides {strides}"))
    return findings


def _far_apart(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides, as large as host code is likely to take, with an offset beyond 2^31 elements."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    if not dims or tensor.numel() == 0:
        return None
    first = dims[0]
    strides = list(tensor.contiguous().stride())
    strides[first] = max(2**31 // (tensor.shape[first] - 1) + 64, strides[first])
    strides[first] += -strides[first] % 16
    return tuple(strides)


def layout_of_results(subject: Subject, case: Case) -> list[Finding]:
    """Outputs and gradients have the strides that torch gives them."""
    arguments, make_grad = case.arguments(subject), case.gradient(subject)
    actual, expected = (
        cases.run(function, subject, arguments, grad_outputs=make_grad)
        for function in (subject.op, subject.reference)
    )
    findings = []
    for (what, value), (_, other) in zip(actual.named(), expected.named(), strict=True):
        # an expanded gradient costs no memory; torch may or may not write it out
        if 0 in value.stride():
            continue
        received, wanted = (
            tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
            for t in (value, other)
        )
        if received != wanted:
            message = f"{what} has strides {received}, torch's {wanted}"
            findings.append(Finding("shape", message, case=str(case)))
    return findings


def watched(
    subject: Subject, case: Case, arguments: dict[str, Argument], order: Any
) -> tuple[Outcome, list[Finding]]:
    """Runs the op with every access watched; what the detectors found."""
    from tritorch.testing import detectors

    with detectors.detecting(order=order) as detector:
        actual = cases.run(subject.op, subject, arguments, grad_outputs=case.gradient(subject))
        detector.check_written(dict(actual.named()))
    return actual, [replace(finding, case=str(case)) for finding in detector.findings]


def _outcome(
    subject: Subject, case: Case, arguments: dict[str, Argument], order: Any
) -> tuple[Outcome | None, list[Finding]]:
    """The op's outcome, or None and why there is none."""
    try:
        if order is not None:
            return watched(subject, case, arguments, order)
        run = cases.run(subject.op, subject, arguments, grad_outputs=case.gradient(subject))
        return run, []
    except cases.Mutated as error:
        return None, [Finding("mutation", str(error), case=str(case))]
    except Exception as error:
        if refused(subject, case):
            return None, []
        return None, [raised(error, case)]


def refused(subject: Subject, case: Case) -> bool:
    """Whether the reference does not take the case either."""
    try:
        cases.run(
            subject.reference,
            subject,
            case.arguments(subject),
            grad_outputs=case.gradient(subject),
        )
    except Exception:
        return True
    return False


def raised(error: BaseException, case: Case) -> Finding:
    """The finding for what a call raised."""
    return hints.of_exception(error, str(case))


def _judged(
    subject: Subject, case: Case, arguments: dict[str, Argument], actual: Outcome
) -> list[Finding]:
    make_grad = case.gradient(subject)
    plain = cases.run(subject.reference, subject, _on_cpu(arguments), grad_outputs=_on(make_grad))
    if mismatch := _shapes(case, actual, plain):
        return mismatch
    found = cases.judge(subject, arguments, actual, make_grad, unit_in=case.unit_in)
    outcomes = dict(actual.named())
    expected = dict(plain.named())
    return [
        _verdict(what, verdict, outcomes[what], expected[what], case)
        for what, verdict in found
        if not verdict.accepted
    ]


def _verdict(
    what: str, verdict: tolerances.Verdict, actual: Tensor, expected: Tensor, case: Case
) -> Finding:
    hint = hints.of_values(actual, expected, verdict.ratio)
    return Finding(
        "gradients" if what.startswith("gradient") else "values",
        f"{what}: {verdict.failure}" + (f"; {hint}" if hint else ""),
        argument=what.removeprefix("gradient of "),
        lanes=() if verdict.index is None else (verdict.index,),
        case=str(case),
    )


def _shapes(
    case: Case, actual: Outcome, expected: Outcome, *, dtypes: bool = True
) -> list[Finding]:
    """What of the results has another number, shape or dtype than the reference's."""
    ours, theirs = dict(actual.named()), dict(expected.named())
    if missing := [name for name in theirs if name not in ours]:
        return [Finding("shape", f"there is no {missing[0]}", case=str(case))]
    if extra := [name for name in ours if name not in theirs]:
        return [Finding("shape", f"the reference has no {extra[0]}", case=str(case))]
    for name, value in ours.items():
        other = theirs[name]
        if value.shape != other.shape:
            message = f"{name} has shape {tuple(value.shape)}, expected {tuple(other.shape)}"
            return [Finding("shape", message, case=str(case))]
        if dtypes and value.dtype != other.dtype:
            message = f"{name} is {value.dtype}, expected {other.dtype}"
            return [Finding("shape", message, case=str(case))]
    return []


def _same_bits(
    kind: str, when: str, actual: Outcome, expected: Outcome, case: Case
) -> list[Finding]:
    others = dict(expected.named())
    return [
        _different(kind, f"{what} {when}", value, others[what], case)
        for what, value in actual.named()
        if what in others and not cases.bitwise_equal(value, others[what])
    ]


def _different(kind: str, what: str, actual: Tensor, expected: Tensor, case: Case) -> Finding:
    wrong = (actual != expected) & ~((actual != actual) & (expected != expected))
    places = wrong.nonzero()
    if len(places) == 0:
        # signs of zero, payloads of NaN
        return Finding(kind, f"{what} differs in bits that compare equal", case=str(case))
    first = tuple(int(i) for i in places[0])
    message = (
        f"{what}: {len(places)} of {actual.numel()} elements differ, first at {first}: "
        f"{actual[first].item():g} where {expected[first].item():g} is right"
    )
    hint = hints.of_values(actual, expected, None)
    return Finding(
        kind,
        message + (f"; {hint}" if hint else ""),
        argument=what.removeprefix("gradient of "),
        lanes=tuple(tuple(int(i) for i in place) for place in places[:4]),
        count=len(places),
        case=str(case),
    )


def _on_cpu(arguments: Mapping[str, Argument]) -> dict[str, Argument]:
    return {name: cases.map_tensors(value, Tensor.cpu) for name, value in arguments.items()}


def _on(make_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda like: make_grad(like).to(like.device)


def samples_of(subject: Subject, dtype: torch.dtype) -> Iterator[Sample]:
    """The subject's samples without memory: their names and what they are marked for."""
    return iter(subject.samples(Maker(dtype, "meta")))
