"""The properties that an op must have, each a function from a subject and a case to findings: none
is good.

The tests of tritorch's own ops are calls of these functions, and so is a check of a user's.  A
property that can watch the kernels takes `order`, in which their programs run; None leaves them
alone.  Each calls the op before the reference, whose results it could find in memory otherwise, and
on copies of the arguments.  Each raises `cases.Refused` where the reference does not take the case,
or the op declines its layout: then the case says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tritorch import launch
from tritorch.registry import Subject
from tritorch.testing import calls, cases, errors
from tritorch.testing.cases import Outcome
from tritorch.testing.findings import Finding
from tritorch.testing.trials import (
    Case,
    different,
    for_exception,
    judged,
    outcome,
    same_bits,
)

SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0)


def values(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Outputs and gradients are the float64 truth but for rounding; with `order`, watched."""
    if case.integers:
        return exactness(subject, case, order=order)
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, order=order)
    if actual is None:
        return findings
    return findings + judged(subject, case, arguments, actual)


def exactness(
    subject: Subject, case: Case, *, order: Any = None, fractions: bool = False
) -> list[Finding]:
    """Integers have exact sums and products: one wrong index is a wrong number.

    A truth that is no integer, of an average say, is rounded once, and an op may do so twice: it is
    judged by the rule of rounding, or with `fractions` exactly too.
    """
    case = replace(case, integers=True)
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, order=order)
    if actual is None:
        return findings
    make_grad = case.gradient(subject)
    truth = cases.reference(
        subject,
        cases.on_cpu(arguments),
        lambda like: make_grad(like.to(case.dtype)).double(),
        dtype=torch.float64,
    )
    ours, theirs = dict(actual.named()), dict(truth.named())
    if ours.keys() != theirs.keys() or any(ours[w].shape != theirs[w].shape for w in ours):
        return findings + judged(subject, case, arguments, actual)
    whole = all(bool((true == true.round()).all()) for true in theirs.values())
    if not whole and not fractions:
        return findings + judged(subject, case, arguments, actual)
    for what, value in ours.items():
        expected = theirs[what].to(value.dtype)
        if not torch.equal(value.cpu(), expected):
            findings.append(different("exactness", what, value.cpu(), expected, case))
    return findings


def equal_numbers(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Of small integers many are equal: an index is that of the one which the reference takes.

    A gradient has more than one right value there, and is not asked for.
    """
    subject, case = replace(subject, gradients=()), replace(case, integers=True)
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, order=order)
    if actual is None:
        return findings
    return findings + [
        replace(finding, message=f"among equal numbers, {finding.message}")
        for finding in judged(subject, case, arguments, actual)
    ]


def special_values(
    subject: Subject, case: Case, *, order: Any = None, strict: bool = False
) -> list[Finding]:
    """NaN, infinities and signed zero go where the reference sends them.

    Gradients at an infinity are formulas' own, NaN in one and infinite in another that is as right:
    with `strict` they are the reference's too.
    """
    assert case.special is not None
    if math.isinf(case.special[1]) and not strict:
        subject = replace(subject, gradients=())
    found = values(subject, case, order=order)
    if any(finding.kind in ("values", "gradients") for finding in found):
        plain = values(subject, replace(case, special=None, special_at=None))
        found = _beyond(plain, found)
    return [
        replace(finding, kind="special values")
        if finding.kind in ("values", "gradients")
        else finding
        for finding in found
    ]


def scaled(subject: Subject, case: Case, *, order: Any = None) -> list[Finding]:
    """Results stay right for tiny and large arguments, where the reference's own do.

    It is no yardstick where it overflows itself, as a sum of exponentials does.
    """
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, order=order)
    if actual is None:
        return findings
    wrong = judged(subject, case, arguments, actual)
    if wrong:
        torchs = cases.reference(subject, arguments, case.gradient(subject))
        wrong = _beyond(judged(subject, case, arguments, torchs), wrong)
    return findings + wrong


def _beyond(known: list[Finding], findings: list[Finding]) -> list[Finding]:
    """The findings that are not about what is known to be wrong anyway."""
    told = {(finding.kind, finding.argument) for finding in known}
    return [finding for finding in findings if (finding.kind, finding.argument) not in told]


def each_gradient_alone(subject: Subject, case: Case, *, launches: bool = False) -> list[Finding]:
    """A gradient that is not wanted changes no bit of the others; with `launches`, it costs none.

    `launches` counts those that `tritorch.launch` makes.
    """
    arguments = case.arguments(subject)

    def run(*wanted: str) -> tuple[Outcome, list[str]]:
        with launch.recorded() as names:
            found, findings = outcome(subject, case, arguments, wanted=wanted)
        if found is None:
            raise _Found(findings)
        return found, names

    expected = {
        n
        for n in subject.gradients
        if isinstance(value := arguments.get(n), Tensor) and value.is_floating_point()
    }
    try:
        everything, all_names = run(*subject.gradients)
        findings, counts = [], []
        if missing := sorted(expected - everything.grads.keys()):
            message = f"there is no gradient of {', '.join(missing)}"
            findings.append(Finding("gradients", message, case=str(case)))
        for wanted in everything.grads:
            alone, names = run(wanted)
            counts.append(len(names))
            if list(alone.grads) != [wanted]:
                message = f"asked for the gradient of {wanted}, received {list(alone.grads)}"
                findings.append(Finding("gradients", message, case=str(case)))
                continue
            pair = alone.grads[wanted], everything.grads[wanted]
            if not cases.bitwise_equal(*pair):
                what = f"gradient of {wanted} alone"
                findings.append(different("gradients", what, *pair, case))
        nothing, names = run()
    except _Found as found:
        return found.findings
    if nothing.grads:
        findings.append(Finding("gradients", "a gradient that nobody wants", case=str(case)))
    findings += same_bits("gradients", "without gradients", nothing, everything, case, partly=True)
    # one gradient may be made of the very sums that are the others, and then it costs them all
    if launches and (
        names != all_names[: len(names)]
        or (len(counts) > 1 and not min(counts) < len(all_names) >= max(counts))
    ):
        message = (
            f"launches {len(all_names)} kernels for all gradients, {counts} for one each, "
            f"{len(names)} for none"
        )
        findings.append(Finding("gradients", message, case=str(case)))
    return findings


class _Found(Exception):
    """A call had no outcome: says why."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__()
        self.findings = findings


def repeatability(
    subject: Subject, case: Case, *, repeats: int = 2, bitwise: bool = True
) -> list[Finding]:
    """The same call gives the same bits, or where `bitwise` is false a result that is as right.

    Sums by atomics, or under a lock, have no fixed order on a GPU.
    """
    arguments = case.arguments(subject)
    first, findings = outcome(subject, case, arguments)
    for _ in range(repeats - 1):
        if first is None:
            break
        again, findings = outcome(subject, case, arguments)
        if again is not None:
            changed = same_bits("repeatability", "repeated", again, first, case)
            if changed and (bitwise or judged(subject, case, arguments, again)):
                findings += changed
        if findings:
            break
    return findings


def history_of(subject: Subject, case: Case, others: Sequence[str] = ()) -> list[Case]:
    """A sequence for `history`: other numbers, memory, dtypes, and the samples `others`."""
    tensors = [
        name
        for name, value in case.arguments(subject).items()
        if isinstance(value, Tensor) and value.dim()
    ]
    return [
        case,
        replace(case, seed=case.seed + 1),
        *(replace(case, layout=(name, "misaligned")) for name in tensors),
        *(replace(case, sample=name) for name in others if name != case.sample),
        *(replace(case, dtype=dtype) for dtype in subject.dtypes if dtype != case.dtype),
    ]


def history(subject: Subject, sequence: Sequence[Case], *, bitwise: bool = True) -> list[Finding]:
    """A call gives the same result whatever was called before, to the bit or within rounding.

    The first call of the sequence is repeated after every few of the others, for its bits; one that
    differs in its numbers alone must be right, where the first was.
    """
    first = sequence[0]
    before, findings = outcome(subject, first, first.arguments(subject))
    if before is None or judged(subject, first, first.arguments(subject), before):
        # another property's finding
        return []
    since: list[Case] = []
    for number, other in enumerate(sequence[1:], 1):
        since.append(other)
        arguments = other.arguments(subject)
        try:
            found, _ = outcome(subject, other, arguments)
            if found is not None and replace(other, seed=first.seed) == first:
                wrong = judged(subject, other, arguments, found)
                said = "where the same call with other numbers came before"
                findings += [
                    replace(finding, kind="history", message=f"{said}, {finding.message}")
                    for finding in wrong
                ]
        except cases.Refused:
            # it has been called, which is all that matters
            pass
        if number % 3 and number < len(sequence) - 1 and not findings:
            continue
        said = "; ".join(map(str, since))
        since.clear()
        again, raised_again = outcome(subject, first, first.arguments(subject))
        if again is None:
            why = raised_again[0].message if raised_again else ""
            message = f"after {said} it raises, before it did not: {why}"
            findings.append(Finding("history", message, case=str(first)))
        else:
            changed = same_bits("history", f"after {said}", again, before, first)
            if changed and (bitwise or judged(subject, first, first.arguments(subject), again)):
                findings += changed
        if findings:
            break
    return findings


def orders(subject: Subject, case: Case, *, seeds: Sequence[int] = (1,)) -> list[Finding]:
    """Programs may run in any order: the result is right backwards and shuffled as well."""
    arguments = case.arguments(subject)
    forward, findings = outcome(subject, case, arguments, order="forward")
    for order in ("reverse", *seeds):
        if forward is None or findings:
            break
        other, findings = outcome(subject, case, arguments, order=order)
        if other is None or not same_bits("program order", "", other, forward, case):
            continue
        # sums in another order may round otherwise
        known = judged(subject, case, arguments, forward)
        findings += [
            replace(
                finding,
                kind="program order",
                message=f"with the programs' order {order}, {finding.message}",
            )
            for finding in _beyond(known, judged(subject, case, arguments, other))
        ]
    return findings


def masked_lanes(subject: Subject, case: Case) -> list[Finding]:
    """No lane that is masked off without `other` changes the result."""
    from tritorch.testing import detectors

    arguments, make_grad = case.arguments(subject), case.gradient(subject)

    def run() -> list[Tensor]:
        found = cases.run(subject.op, subject, arguments, grad_outputs=make_grad)
        return [tensor for _, tensor in found.named()]

    try:
        return [replace(f, case=str(case)) for f in detectors.masked_lane_findings(run)]
    except Exception as error:
        return for_exception(subject, case, error)


def offsets(
    subject: Subject, case: Case, argument: str | None, *, every: bool = False
) -> list[Finding]:
    """An argument whose elements lie 2^31 apart is read and written where they are.

    In both passes; without an argument it is the gradient of the output whose elements do.  With
    `every`, along each of its dimensions in turn.
    """
    from tritorch.testing import detectors

    given = case.arguments(subject)
    make_grad = case.gradient(subject)
    if argument is None:
        like = calls.outputs_of(calls.call(subject.op, given), subject.name)[0]
    else:
        like = given[argument]  # type: ignore[assignment]
    findings: list[Finding] = []
    for strides in _far_apart(like, every):
        arguments = case.arguments(subject)

        def far(tensor: Tensor, strides: tuple[int, ...] = strides) -> Tensor:
            found = detectors.virtual_tensor(tensor.shape, strides, tensor.dtype)
            return found.copy_(tensor)

        if argument is not None:
            arguments[argument] = far(like)
        for name in subject.gradients:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.is_floating_point():
                arguments[name] = value.detach().requires_grad_()

        def grad(output: Tensor, far: Callable[[Tensor], Tensor] = far) -> Tensor:
            made = make_grad(output)
            return far(made) if argument is None else made

        with detectors.detecting(virtual=True) as detector:
            try:
                outputs = calls.outputs_of(calls.call(subject.op, arguments), subject.name)
                cases.differentiate(outputs, arguments, grad)
            except Exception as error:
                # not every function takes every stride
                errors.must_be_the_users(error)
        what = "the gradient" if argument is None else argument
        findings += [
            replace(finding, case=f"{case}, {what} of strides {strides}")
            for finding in detector.findings
            if finding.kind == "int32 overflow" or finding.kind.startswith("out-of-bounds")
        ]
    return findings


def _far_apart(tensor: Tensor, every: bool) -> Iterator[tuple[int, ...]]:
    """Strides with offsets beyond 2^31 elements: along the first dimension, and the longest."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    if not dims or tensor.numel() == 0:
        return
    longest = max(dims, key=lambda dim: tensor.shape[dim])
    for dim in dict.fromkeys((dims[0], longest, *(dims if every else ()))):
        size = tensor.shape[dim]
        strides = list(tensor.contiguous().stride())
        # for half of the elements, since an index may choose which ones are read; and where it can
        # be a stride that is itself below 2^31, so that only products pass it
        farthest = max(size // 2, min(size - 1, 2))
        strides[dim] = max(2**31 // farthest + 64, strides[dim])
        strides[dim] += -strides[dim] % 16
        yield tuple(strides)
