"""One case of a subject: its arguments, what the call gives, and what is wrong with that.

The properties of `battery.py` and its neighbours are made of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample, Subject
from tritorch.testing import calls, cases, errors, hints
from tritorch.testing.cases import Judgement, Outcome
from tritorch.testing.findings import Finding

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

    def arguments(self, subject: Subject) -> dict[str, Argument]:
        """The arguments of the call, as fresh tensors."""
        if self.given is None:
            make = Maker(self.dtype, self.device, self._seed(subject), integers=self.integers)
            found = dict(cases.sample_of(subject, self.sample, make).arguments)
        else:
            found = {n: calls.map_tensors(v, torch.clone) for n, v in self.given.items()}
        if self.scale != 1.0:
            for name, value in found.items():
                found[name] = calls.map_tensors(
                    value, lambda t: t * self.scale if t.is_floating_point() else t
                )
        if self.special is not None:
            name, number = self.special
            found[name] = with_special(_tensor(found[name]), number, self.special_at)
        if self.layout is not None:
            name, layout = self.layout
            found[name] = calls.map_tensors(found[name], partial(cases.relayout, layout=layout))
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
        if any(index >= size for index, size in zip(at, tensor.shape, strict=True)):
            raise cases.Refused(f"Case: there is no element {at} in shape {tuple(tensor.shape)}")
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


class Declined(cases.Refused):
    """The subject does not take the layout of an argument that the reference takes."""


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
    host code declines the layout of an argument and its kernels have done nothing wrong before.
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
            try:
                if detector is None or detector.gave_up is None:
                    findings = for_exception(subject, case, error)
            except Declined:
                # the reference takes the call, so that its kernels may do no wrong in it
                if detector is None or not detector.findings:
                    raise
    if detector is not None:
        findings = [replace(f, case=str(case)) for f in detector.findings] + findings
    return actual, findings


def for_exception(subject: Subject, case: Case, error: Exception) -> list[Finding]:
    """What it means that the op raised; may raise Refused, as `outcome`."""
    if isinstance(error, cases.Mutated):
        return [replace(error.finding, case=str(case))]
    errors.must_be_the_users(error)
    if refused(subject, case):
        raise cases.Refused(f"{subject.name}: neither it nor the reference takes {case}") from error
    if case.layout is not None and not _in_kernel(error):
        raise Declined(f"{subject.name} declines {' '.join(case.layout)}: {error}") from error
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
    """The finding for what a call raised; InternalError where the checks themselves did."""
    errors.must_be_the_users(error)
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
    kind: str, when: str, actual: Outcome, expected: Outcome, case: Case, *, partly: bool = False
) -> list[Finding]:
    """Where two outcomes differ in bits, or in what they have, unless `partly` is enough."""
    ours, theirs = dict(actual.named()), dict(expected.named())
    found = [
        Finding(kind, f"{what} {when}: one of two calls has it", argument=what, case=str(case))
        for what in sorted(ours.keys() ^ theirs.keys())
        if not partly
    ]
    return found + [
        different(kind, f"{what} {when}".strip(), value, theirs[what], case)
        for what, value in ours.items()
        if what in theirs and not cases.bitwise_equal(value, theirs[what])
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
