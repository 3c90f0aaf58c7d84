"""The battery over one subject: which property is tried on which case, in which order.

What is cheap and telling comes first.  The same subject, level and seed give the same cases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch.registry import Maker, Subject
from tritorch.testing import battery, cases, describe, hosting, inputs
from tritorch.testing.battery import Case
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs

Level: TypeAlias = Literal["quick", "full", "soak"]
LEVELS: tuple[Level, ...] = ("quick", "full", "soak")

# sections of a report in which the detectors' findings appear, whatever was run
_MEMORY = frozenset(
    (
        "out-of-bounds read",
        "out-of-bounds write",
        "out-of-bounds atomic",
        "unwritten output",
        "uninitialised read",
        "int32 overflow",
        "race",
        "tile",
    )
)


@dataclass(frozen=True)
class Step:
    """One property of one case."""

    section: str
    case: Case
    run: Callable[[], list[Finding]]

    @property
    def id(self) -> str:
        return self.case.id


@dataclass(frozen=True)
class Outcome:
    """What a step found, and how long it took."""

    step: Step
    findings: list[Finding]
    seconds: float


class Examination:
    """The steps of one check, made as it goes: what the first launches use decides the sizes.

    inputs: the text of sizes, where the subject's samples were made from one; without it the
    subject's own samples are what there is.  only: the id of the one case to run.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        inputs: Inputs | None = None,
        level: Level = "quick",
        seed: int = 0,
        device: str = "cpu",
        unit_in: float = 0.0,
        only: str = "",
    ) -> None:
        self.subject, self.inputs, self.level, self.seed = subject, inputs, level, seed
        self.device, self.unit_in, self.only = device, unit_in, only
        self.notes: list[str] = []
        self.tiles: tuple[int, ...] = ()
        self.configurations: dict[str, list[Any]] = {}

    def run(self, on_step: Callable[[Step], None] = lambda step: None) -> Iterator[Outcome]:
        """Runs every step; `on_step` hears of each before it starts."""
        with hosting.hosted() as host:
            self._probe()
            self.configurations = host.configurations
            for step in self._steps():
                if self.only and step.id != self.only:
                    continue
                on_step(step)
                start = time.perf_counter()
                try:
                    findings = step.run()
                except Exception as error:
                    findings = [battery.raised(error, step.case)]
                yield Outcome(step, findings, time.perf_counter() - start)

    def section_of(self, finding: Finding, step: Step) -> str:
        """Where a report shows a finding."""
        return "memory" if finding.kind in _MEMORY else step.section

    def _probe(self) -> None:
        """One call that finds out the tiles, and whether the function has gradients."""
        subject = self.subject
        dtype = subject.dtypes[0]
        if self.inputs is not None:
            first = inputs.choices(self.inputs, (), "quick", self.seed)[0]
            self.subject = subject = self._sized([first])
        name = next(battery.samples_of(subject, dtype)).name
        case = Case(name, dtype, self.device, seed=self.seed)
        launches: list[Any] = []
        with contextlib.suppress(Exception):
            # what it raises is found by the first step
            if self.device == "cpu":
                from tritorch.testing import detectors

                with detectors.detecting() as detector:
                    subject.op(**case.arguments(subject))
                launches = detector.launches
        if self.device == "cpu" and not launches:
            self.notes.append("no Triton kernel was launched: what is checked is plain PyTorch")
        self.tiles = inputs.tile_sizes(launches)
        if subject.gradients:
            gives = False
            with contextlib.suppress(Exception):
                gives = describe.gives_gradients(subject, dtype, self.device)
            if not gives:
                self.notes.append("its result requires no gradient: gradients are not checked")
                self.subject = replace(subject, gradients=())
        if self.inputs is not None:
            chosen = inputs.choices(self.inputs, self.tiles, self.level, self.seed)
            self.subject = self._sized([*chosen, *inputs.empties(self.inputs)])

    def _sized(self, sizes: Iterable[inputs.Sizes]) -> Subject:
        assert self.inputs is not None
        return replace(self.subject, samples=self.inputs.samples(sizes))

    def _steps(self) -> Iterator[Step]:
        subject = self.subject
        names = [sample.name for sample in battery.samples_of(subject, subject.dtypes[0])]
        empty = []
        if self.inputs is not None:
            empty = [self.inputs.name(sizes) for sizes in inputs.empties(self.inputs)]
            names = [name for name in names if name not in empty]
        # beyond a tile in every direction, small in every direction
        typical = names[1 % len(names)]
        main = subject.dtypes[0]

        def case(name: str = typical, dtype: torch.dtype = main, **options: Any) -> Case:
            return Case(name, dtype, self.device, seed=self.seed, unit_in=self.unit_in, **options)

        yield from self._values(names, case)
        yield from self._layouts(case())
        yield from self._orders(names, case)
        yield from self._masked(names, case)
        yield from self._specials(case)
        yield from self._configurations(names, case)
        yield from self._repeats(names, case)
        for name in empty:
            one = case(name)
            yield Step("empty tensors", one, partial(battery.values, subject, one))
        yield from self._offsets(case)
        yield from self._library(case())

    def _watch(self) -> Any:
        return "forward" if self.device == "cpu" else None

    def _values(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        subject, order = self.subject, self._watch()
        exact = subject.accuracy == "multilinear"
        others = names if self.level != "quick" else names[:3]
        if exact:
            for name in names:
                one = case(name, integers=True)
                run = partial(battery.exactness, subject, one, order=order)
                yield Step("exact integers", one, run)
        for dtype in subject.dtypes:
            first = dtype == subject.dtypes[0]
            for name in names if first and not exact else others:
                one = case(name, dtype)
                watched = order if first and not exact else None
                yield Step("rounding", one, partial(battery.values, subject, one, order=watched))
        for scale in (1e-3, 1e3) if self.level != "quick" else ():
            one = case(scale=scale)
            yield Step("rounding", one, partial(battery.values, subject, one))
        if subject.gradients:
            one = case()
            yield Step("gradients", one, partial(battery.each_gradient_alone, subject, one))

    def _layouts(self, typical: Case) -> Iterator[Step]:
        subject, order = self.subject, self._watch()
        for name, value in typical.arguments(subject).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            for layout in cases.LAYOUTS:
                # an expanded tensor cannot be written to
                if layout == "expanded" and name in subject.mutates:
                    continue
                if layout == "channels_last" and value.dim() not in (4, 5):
                    continue
                one = replace(typical, layout=(name, layout))
                yield Step("layouts", one, partial(battery.values, subject, one, order=order))
        for layout in cases.GRAD_LAYOUTS if subject.gradients else ():
            one = replace(typical, grad_layout=layout)
            yield Step("gradients", one, partial(battery.values, subject, one, order=order))

    def _orders(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        if self.device != "cpu":
            return
        exact = self.subject.accuracy == "multilinear"
        seeds = (1,) if self.level == "quick" else (1, 2, 3)
        for name in names[1:3] if self.level == "quick" else names[1:12]:
            one = case(name, integers=exact)
            yield Step(
                "program order", one, partial(battery.orders, self.subject, one, seeds=seeds)
            )

    def _masked(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        if self.device != "cpu":
            return
        for name in names[:2] if self.level == "quick" else names[:8]:
            one = case(name)
            yield Step("masked lanes", one, partial(battery.masked_lanes, self.subject, one))

    def _specials(self, case: Callable[..., Case]) -> Iterator[Step]:
        for name in self.subject.non_finite:
            for number in battery.SPECIAL:
                one = case(special=(name, number))
                run = partial(battery.special_values, self.subject, one)
                yield Step("special values", one, run)

    def _configurations(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        """Each configuration of each autotuned kernel, on its own."""
        count = max((len(configs) for configs in self.configurations.values()), default=0)
        exact = self.subject.accuracy == "multilinear"
        for index in range(count if count > 1 else 0):
            for name in names[:2] if self.level == "quick" else names[:4]:
                one = case(name, integers=exact)
                yield Step("configurations", one, partial(self._configured, index, one))
        if count > 1:
            one = case()
            yield Step("configurations", one, partial(self._tuned, one))

    def _configured(self, index: int, one: Case) -> list[Finding]:
        with hosting.hosted(config=index):
            found = battery.values(self.subject, one, order=self._watch())
        shown = "; ".join(
            f"{kernel} {configs[min(index, len(configs) - 1)]}"
            for kernel, configs in self.configurations.items()
        )
        return [
            replace(finding, kind="configuration", message=f"with {shown}: {finding.message}")
            if finding.kind in ("values", "gradients", "exactness")
            else finding
            for finding in found
        ]

    def _tuned(self, one: Case) -> list[Finding]:
        """As autotune runs a first call: every configuration once before the chosen one."""
        with hosting.hosted(tune=True):
            found = battery.values(self.subject, one)
        return [
            replace(
                finding,
                kind="configuration",
                message=f"after autotune has tried its configurations: {finding.message}",
            )
            for finding in found
        ]

    def _repeats(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        subject = self.subject
        one = case()
        yield Step("repeated calls", one, partial(battery.repeatability, subject, one))
        others = [case(name) for name in names[:4] if name != one.sample]
        others += [case(one.sample, dtype) for dtype in subject.dtypes[1:2]]
        sequence = [one, *others]
        yield Step("repeated calls", one, partial(battery.history, subject, sequence))

    def _offsets(self, case: Callable[..., Case]) -> Iterator[Step]:
        if self.device != "cpu":
            return
        one = case()
        for name, value in one.arguments(self.subject).items():
            if isinstance(value, Tensor) and value.dim() and value.is_floating_point():
                yield Step("offsets", one, partial(battery.offsets, self.subject, one, name))

    def _library(self, one: Case) -> Iterator[Step]:
        with contextlib.suppress(Exception), _Recorded() as recorded:
            self.subject.op(**one.arguments(self.subject))
        for function, args, kwargs in {call[0]: call for call in recorded.calls}.values():
            run = partial(opcheck, function, args, kwargs, one)
            yield Step("torch.library", one, run)


def opcheck(function: Any, args: Any, kwargs: Any, one: Case) -> list[Finding]:
    """torch.library's own checks of an op that the call ran."""
    try:
        torch.library.opcheck(function, args, kwargs)
    except Exception as error:
        text = str(error).strip().splitlines()
        return [Finding("library", f"{function}: {text[0] if text else error!r}", case=str(one))]
    return []


# namespaces of torch's own ops
_TORCHS = frozenset(("aten", "prim", "prims", "profiler", "inductor", "debugprims", "triton"))


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


def shrink(
    examination: Examination, step: Step, finding: Finding, *, most: int = 24
) -> tuple[inputs.Sizes, Finding] | None:
    """Smaller sizes with which the same property still has the same kind of finding.

    None where the sizes are not a text's, or none smaller shows it.
    """
    text = examination.inputs
    if text is None or step.section in ("empty tensors", "torch.library", "repeated calls"):
        return None
    sizes = _sizes(text, step.case.sample)
    if sizes is None:
        return None
    best: tuple[inputs.Sizes, Finding] | None = None
    tried = 0
    for letter in text.letters:
        for size in _smaller(sizes[letter]):
            smaller = sizes | {letter: text.allowed(letter, size)}
            if smaller == sizes or tried >= most:
                continue
            tried += 1
            again = _again(examination, step, text, smaller, finding)
            if again is not None:
                best, sizes = (smaller, again), smaller
                break
    return best


def _again(
    examination: Examination, step: Step, text: Inputs, sizes: inputs.Sizes, finding: Finding
) -> Finding | None:
    original, name = examination.subject, text.name(sizes)
    one = replace(step.case, sample=name)
    function = step.run
    assert isinstance(function, partial)
    subject = replace(original, samples=text.samples([sizes]))
    arguments = [
        subject if value is original else one if value == step.case else value
        for value in function.args
    ]
    examination.subject = subject
    try:
        found = function.func(*arguments, **function.keywords)
    except Exception:
        return None
    finally:
        examination.subject = original
    return next((f for f in found if (f.kind, f.line) == (finding.kind, finding.line)), None)


def _smaller(size: int) -> Iterator[int]:
    for candidate in (1, 2, 3, size // 4, size // 2, size - 1):
        if 0 < candidate < size:
            yield candidate


def _sizes(text: Inputs, name: str) -> dict[str, int] | None:
    """The sizes that a sample's name tells."""
    try:
        found = {k: int(v) for k, v in (part.split("=") for part in name.split())}
    except ValueError:
        return None
    return found if set(found) == set(text.letters) else None


def first_arguments(subject: Subject, seed: int = 0) -> dict[str, Any]:
    """The arguments of the subject's first sample, to call it with."""
    dtype = subject.dtypes[0]
    name = next(iter(subject.samples(Maker(dtype, "meta")))).name
    return Case(name, dtype, seed=seed).arguments(subject)
