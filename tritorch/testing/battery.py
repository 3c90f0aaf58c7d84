"""The properties that an op must have, each a function from a subject and a case to findings.

The tests of tritorch's own ops are calls of these functions, and so is a check of a user's.  A
property that can watch the kernels takes `order`, in which their programs run; None leaves them
alone.  Each calls the op before the reference, whose results it could find in memory otherwise, and
on copies of the arguments.  Each raises `cases.Refused` where the reference does not take the case,
or the op declines its layout: then the case says nothing.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tritorch import launch
from tritorch.registry import Argument, Maker, Sample, Subject
from tritorch.testing import cases, hints
from tritorch.testing.cases import Judgement, Outcome
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
    outputs.  `special`: an argument and the value that a few of its elements get, or with
    `special_at` the one element there.  `integers`: every number is one in [-2, 2].  `scale`
    multiplies floating-point arguments.  `unit_in`: the unit roundoff to which products may shorten
    their operands.
    """

    sample: str
    dtype: torch.dtype
    device: str = "cpu"
    layout: tuple[str, str] | None = None
    grad_layout: str | None = None
    special: tuple[str, float] | None = None
    special_at: tuple[int, ...] | None = None
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
            where = "" if self.special_at is None else f" at {self.special_at}"
            parts.append(f"{self.special[1]} in {self.special[0]}{where}")
        return ", ".join(parts)

    @property
    def id(self) -> str:
        """Four letters that name the case on a command line."""
        return f"{zlib.crc32(f'{self} {self.seed}'.encode()) & 0xFFFF:04x}"

    def arguments(self, subject: Subject) -> dict[str, Argument]:
        """The arguments of the call, as fresh tensors."""
        if self.given is None:
            make = Maker(self.dtype, self.device, self._seed(subject), integers=self.integers)
            found = dict(cases.sample_of(subject, self.sample, make).arguments)
        else:
            found = {n: cases.map_tensors(v, torch.clone) for n, v in self.given.items()}
        if self.scale != 1.0:
            for name, value in found.items():
                found[name] = cases.map_tensors(
                    value, lambda t: t * self.scale if t.is_floating_point() else t
                )
        if self.special is not None:
            name, number = self.special
            found[name] = with_special(_tensor(found[name]), number, self.special_at)
        if self.layout is not None:
            name, layout = self.layout
            found[name] = cases.relayout(_tensor(found[name]), layout)
        return found

    def gradient(self, subject: Subject) -> Callable[[Tensor], Tensor]:
        """Makes the gradients of outputs."""
        seed = self._seed(subject, "/gradient")
        if self.integers:
            return cases.integer_gradient(seed)
        return cases.random_gradient(seed, self.grad_layout)

    def _seed(self, subject: Subject, end: str = "") -> str:
        return f"{subject.name}/{self.sample}{end}" + (f"/{self.seed}" if self.seed else "")


def _tensor(value: Argument) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"Case: expects a tensor to change, received {type(value).__name__}")
    return value


def with_special(tensor: Tensor, number: float, at: tuple[int, ...] | None = None) -> Tensor:
    """A copy in which the element there, or every third of the way through, is `number`."""
    found = tensor.clone()
    if at is not None:
        found[at] = number
    else:
        flat = found.view(-1)
        flat[:: max(flat.numel() // 3, 1)] = number
    return found


def corners(shape: Sequence[int], tiles: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Where a mask goes wrong: the last element, the first, and those about the edge of a tile."""
    if 0 in shape:
        return []
    found = [tuple(size - 1 for size in shape), (0,) * len(shape)]
    for tile in tiles:
        if any(size > tile for size in shape):
            found.append(tuple(min(tile, size - 1) for size in shape))
            found.append(tuple(min(tile, size) - 1 for size in shape))
    return list(dict.fromkeys(found))


def with_each_layout(subject: Subject, case: Case, layout: str) -> Iterator[Case]:
    """The case with that layout of one tensor after the other."""
    for name, value in case.arguments(subject).items():
        # an expanded tensor cannot be written to
        written = layout == "expanded" and name in subject.mutates
        if isinstance(value, Tensor) and value.dim() and not written:
            yield replace(case, layout=(name, layout))


# every function below: no findings is good

Property = Callable[[Subject, Case], list[Finding]]


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
    findings += same_bits("gradients", "without gradients", nothing, everything, case)
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


def repeatability(subject: Subject, case: Case, *, repeats: int = 2) -> list[Finding]:
    """The same call gives the same bits."""
    arguments = case.arguments(subject)
    first, findings = outcome(subject, case, arguments)
    for _ in range(repeats - 1):
        if first is None:
            break
        again, findings = outcome(subject, case, arguments)
        if again is not None:
            findings += same_bits("repeatability", "repeated", again, first, case)
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


def history(subject: Subject, sequence: Sequence[Case]) -> list[Finding]:
    """A call gives the same result whatever was called before.

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
            findings += same_bits("history", f"after {said}", again, before, first)
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
        return _for_exception(subject, case, error)


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
        cases.call(subject.op, arguments | {argument: far})
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


# what the properties are made of


def outcome(
    subject: Subject,
    case: Case,
    arguments: Mapping[str, Argument],
    *,
    order: Any = None,
    function: Callable[..., Any] | None = None,
    wanted: Sequence[str] | None = None,
) -> tuple[Outcome | None, list[Finding]]:
    """What the op, or `function` in its place, gives, or None; and what was found meanwhile.

    With `order`, every access is watched.  Raises Refused where the reference raises too, or where
    host code declines the layout of an argument.
    """
    with contextlib.ExitStack() as stack:
        detector: Any = None
        if order is not None:
            from tritorch.testing import detectors

            detector = stack.enter_context(detectors.detecting(order=order))
        actual, findings = None, []
        try:
            actual = cases.run(
                function or subject.op,
                subject,
                dict(arguments),
                wanted=wanted,
                grad_outputs=case.gradient(subject),
            )
            if detector is not None:
                detector.check_written(dict(actual.named()))
        except Exception as error:
            if detector is None or detector.gave_up is None:
                findings = _for_exception(subject, case, error)
    if detector is not None:
        findings = [replace(f, case=str(case)) for f in detector.findings] + findings
    return actual, findings


def _for_exception(subject: Subject, case: Case, error: Exception) -> list[Finding]:
    if isinstance(error, cases.Mutated):
        return [Finding("mutation", str(error), argument=error.argument, case=str(case))]
    if refused(subject, case):
        raise cases.Refused(f"{subject.name}: neither it nor the reference takes {case}") from error
    if case.layout is not None and not _in_kernel(error):
        raise cases.Refused(f"{subject.name} declines {' '.join(case.layout)}: {error}") from error
    return [raised(error, case)]


def _in_kernel(error: BaseException) -> bool:
    """Whether a kernel raised, not the code that launches it."""
    return type(error).__name__ in ("InterpreterError", "CompilationError")


def refused(subject: Subject, case: Case) -> bool:
    """Whether the reference does not take the case either."""
    try:
        cases.reference(subject, case.arguments(subject), case.gradient(subject))
    except cases.Refused:
        return True
    return False


def raised(error: BaseException, case: Case) -> Finding:
    """The finding for what a call raised."""
    return hints.of_exception(error, str(case))


def judged(
    subject: Subject,
    case: Case,
    arguments: Mapping[str, Argument],
    actual: Outcome,
    *,
    wanted: Sequence[str] | None = None,
) -> list[Finding]:
    """What of an outcome is not the truth."""
    found = cases.judge(
        subject,
        dict(arguments),
        actual,
        case.gradient(subject),
        unit_in=case.unit_in,
        wanted=wanted,
    )
    return [_wrong(one, case) for one in found if not one.verdict.accepted]


def _wrong(one: Judgement, case: Case) -> Finding:
    verdict, message = one.verdict, f"{one.what}: {one.verdict.failure}"
    kind = "gradients" if one.what.startswith("gradient of") else "values"
    lanes: tuple[tuple[int, ...], ...] = () if verdict.index is None else (verdict.index,)
    count = 1 if lanes else 0
    if verdict.failure.startswith(("shape", "dtype", "number", "missing")):
        kind = kind if verdict.failure.startswith("missing") else "shape"
    elif one.actual is not None and one.truth is not None:
        if verdict.wrong is not None:
            lanes, count = _first(verdict.wrong), int(verdict.wrong.sum())
        if hint := hints.of_values(one.actual, one.truth, verdict.ratio, verdict.wrong):
            message += f"; {hint}"
    return Finding(kind, message, argument=one.what, lanes=lanes, count=count, case=str(case))


def _first(wrong: Tensor) -> tuple[tuple[int, ...], ...]:
    """The indices of the first four."""
    return tuple(tuple(int(i) for i in place) for place in wrong.nonzero()[:4])


def same_bits(
    kind: str, when: str, actual: Outcome, expected: Outcome, case: Case
) -> list[Finding]:
    """Where two outcomes have not the same bits, of the tensors that both have."""
    others = dict(expected.named())
    return [
        different(kind, f"{what} {when}".strip(), value, others[what], case)
        for what, value in actual.named()
        if what in others and not cases.bitwise_equal(value, others[what])
    ]


def different(kind: str, what: str, actual: Tensor, expected: Tensor, case: Case) -> Finding:
    """The finding for a tensor that should be equal to another."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        shown = " where ".join(f"{tuple(t.shape)} {t.dtype}" for t in (actual, expected))
        return Finding(kind, f"{what}: {shown} is right", argument=what, case=str(case))
    wrong = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if not wrong.any():
        message = f"{what} differs in bits that compare equal"
        return Finding(kind, message, argument=what, case=str(case))
    lanes = _first(wrong)
    message = (
        f"{what}: {int(wrong.sum())} of {actual.numel()} elements differ, first at {lanes[0]}: "
        f"{actual[lanes[0]].item():g} where {expected[lanes[0]].item():g} is right"
    )
    if hint := hints.of_values(actual, expected, None, wrong):
        message += f"; {hint}"
    return Finding(
        kind, message, argument=what, lanes=lanes, count=int(wrong.sum()), case=str(case)
    )


def samples_of(subject: Subject, dtype: torch.dtype) -> Iterator[Sample]:
    """The subject's samples without memory: their names and what they are marked for."""
    return iter(subject.samples(Maker(dtype, "meta")))
