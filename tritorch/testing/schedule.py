"""Which property of a subject is tried on which case, in which order.

What is cheap and telling comes first.  The same subject, level and seed give the same cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tritorch.registry import OpSpec, Subject
from tritorch.testing import (
    battery,
    battery_gpu,
    battery_gradients,
    battery_torch,
    calls,
    cases,
    hosting,
    input_sizes,
    trials,
)
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs
from tritorch.testing.trials import Case

Level: TypeAlias = Literal["quick", "full", "soak"]
LEVELS: tuple[Level, ...] = ("quick", "full", "soak")

# a race may need many tries
_GPU_REPEATS = 20
# of a subject that brings its own, at level quick
_MOST_SAMPLES = 8


@dataclass(frozen=True)
class Step:
    """One property of one case."""

    section: str
    case: Case
    run: Callable[[], list[Finding]]


class Schedule:
    """The steps of one check, as far as its tiles, configurations and kernels are known.

    inputs: the text of sizes, where the subject's samples were made from one; without it the
    subject's own samples are what there is.
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
    ) -> None:
        self.subject, self.inputs, self.level, self.seed = subject, inputs, level, seed
        self.device, self.unit_in = device, unit_in
        self.tiles: tuple[int, ...] = ()
        self.configurations: dict[str, list[Any]] = {}
        # the sample of sizes that no other call has
        self._fresh = ""
        # samples for some steps alone; of each configuration, the samples for its own tiles
        self._aside: set[str] = set()
        self._configured_names: dict[int, list[str]] = {}
        # names of the sizes of `input_sizes.third_tiles`
        self._third_tiles: list[tuple[str, str, str]] = []
        # the most programs of a launch with each sample
        self._programs: dict[str, int] = {}
        # those that each sample launches, where nothing else has watched it
        self._kernels: dict[str, set[str]] = {}

    def _steps(self) -> Iterator[Step]:
        subject = self.subject
        names = [sample.name for sample in trials.samples_of(subject, subject.dtypes[0])]
        empty = []
        if self.inputs is not None:
            empty = [self.inputs.name(sizes) for sizes in input_sizes.empties(self.inputs)]
            names = [name for name in names if name not in {*empty, self._fresh, *self._aside}]
        # beyond a tile in every direction, small in every direction
        marked = [s.name for s in trials.samples_of(subject, subject.dtypes[0]) if s.layouts]
        typical = marked[0] if marked else names[1 % len(names)]
        main = subject.dtypes[0]
        if self.inputs is None and self.level == "quick":
            # a subject's own samples may be many
            names = list(dict.fromkeys([typical, *names]))[:_MOST_SAMPLES]

        def case(name: str = typical, dtype: torch.dtype = main, **options: Any) -> Case:
            return Case(name, dtype, self.device, seed=self.seed, unit_in=self.unit_in, **options)

        # before anything else has left its traces
        yield from self._repeats(names, case)
        yield from self._values(names, case)
        yield from self._layouts(case())
        yield from self._orders(names, case)
        yield from self._masked(names, case)
        yield from self._specials(case)
        yield from self._configurations(names, case)
        for name in empty:
            one = case(name)
            yield Step("empty tensors", one, partial(battery.values, subject, one))
        yield from self._offsets(names, case)
        yield from self._library(case())

    @property
    def watch(self) -> Any:
        """The order in which programs are watched; None on a GPU."""
        return "forward" if self.device == "cpu" else None

    def _values(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        subject, order = self.subject, self.watch
        # integers in which sums are exact, or ties are many
        exact = subject.accuracy in ("multilinear", "exact")
        others = names if self.level != "quick" else names[:3]
        if exact:
            for name in itertools.chain(names, self._beyond_two_tiles()):
                one = case(name, integers=True)
                run = partial(battery.exactness, subject, one, order=order)
                yield Step("exact integers", one, run)
        for dtype in subject.dtypes:
            first = dtype == subject.dtypes[0]
            # a sample may be one of some dtypes alone
            there = {sample.name for sample in trials.samples_of(subject, dtype)}
            whole = itertools.chain(names, self._beyond_two_tiles())
            for name in whole if first and not exact else others:
                if name not in there:
                    continue
                one = case(name, dtype)
                watched = order if first and not exact else None
                yield Step("rounding", one, partial(battery.values, subject, one, order=watched))
        if not exact and self._gives_indices(case()):
            for name in others:
                one = case(name, integers=True)
                run = partial(battery.equal_numbers, subject, one, order=order)
                yield Step("equal numbers", one, run)
        for scale in (1e-3, 1e3) if self.level != "quick" else ():
            one = case(scale=scale)
            yield Step("rounding", one, partial(battery.scaled, subject, one))
        if subject.gradients:
            one = case()
            for check in (battery.each_gradient_alone, battery_gradients.views):
                yield Step("gradients", one, partial(check, subject, one))
            yield from self._second_gradients(case)

    def _gives_indices(self, one: Case) -> bool:
        """Whether some result is of integers: of 32 bits at least, others are rounded numbers."""
        try:
            found = cases.reference(self.subject, one.arguments(self.subject))
        except cases.Refused:
            return False
        return any(output.dtype in (torch.int64, torch.int32) for output in found.outputs)

    def _beyond_two_tiles(self) -> Iterator[str]:
        """Samples in which a loop has a third turn, as far as they take few programs.

        To be asked when the others have run.
        """
        for small, edge, name in self._third_tiles:
            # a program for each number is no loop, and slow
            if self._programs.get(edge, 0) <= 2 * self._programs.get(small, 1):
                yield name

    def _second_gradients(self, case: Callable[..., Case]) -> Iterator[Step]:
        subject, chosen = self.subject, [case()]
        if subject.double_backward:
            # by finite differences: of small samples, in float64
            samples = trials.samples_of(subject, subject.dtypes[0])
            small = [sample.name for sample in samples if sample.gradcheck]
            if torch.float64 not in subject.dtypes:
                return
            small = small[:1] if self.level == "quick" else small
            chosen = [case(name, torch.float64) for name in small]
        for one in chosen:
            run = partial(battery_gradients.second_gradient, subject, one)
            yield Step("gradients", one, run)

    def _layouts(self, typical: Case) -> Iterator[Step]:
        subject, order = self.subject, self.watch
        for name, value in typical.arguments(subject).items():
            tensors = calls.tensors_of(value)
            if not tensors or tensors[0].dim() == 0:
                continue
            for layout in cases.LAYOUTS:
                # an expanded tensor cannot be written to
                if layout == "expanded" and name in subject.mutates:
                    continue
                if layout == "channels_last" and tensors[0].dim() not in (4, 5):
                    continue
                one = replace(typical, layout=(name, layout))
                yield Step("layouts", one, partial(battery.values, subject, one, order=order))
        # torch's own strides are asked of tritorch's ops alone
        for channels_last in (False, True) if isinstance(subject, OpSpec) else ():
            check = partial(battery_torch.layout_of_results, channels_last=channels_last)
            yield Step("layouts", typical, partial(check, subject, typical))
        for name, value in typical.arguments(subject).items():
            kept = isinstance(subject, OpSpec) and subject.keeps_format
            if kept and isinstance(value, Tensor) and value.dim() == 4:
                run = partial(battery_torch.format_of_outputs, subject, typical, name)
                yield Step("layouts", typical, run)
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
        subject, tiles = self.subject, self.tiles if self.level != "quick" else ()
        given = case().arguments(subject)
        for name in subject.non_finite:
            value = given[name]
            shape = value.shape if isinstance(value, Tensor) else ()
            for number in battery.SPECIAL:
                for at in (None, *trials.corners(shape, tiles)):
                    one = case(special=(name, number), special_at=at)
                    run = partial(battery.special_values, subject, one)
                    yield Step("special values", one, run)

    def _configurations(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        """Each configuration of each autotuned kernel, on its own."""
        count = max((len(configs) for configs in self.configurations.values()), default=0)
        exact = self.subject.accuracy == "multilinear"
        few = 1 if self.level == "quick" else 4
        for index in range(count if count > 1 else 0):
            # its tiles may be others than those for which the samples were chosen
            own = self._configured_names.get(index, names[1:2])
            for name in dict.fromkeys([*names[:few], *own]):
                one = case(name, integers=exact)
                yield Step("configurations", one, partial(self._configured, index, one))
        if count > 1:
            one = case()
            yield Step("configurations", one, partial(self._tuned, one))

    def _configured(self, index: int, one: Case) -> list[Finding]:
        with hosting.hosted(config=index):
            found = battery.values(self.subject, one, order=self.watch)
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
        fresh = case(self._fresh) if self._fresh else one
        sequence = battery.history_of(subject, fresh, names[:4])
        # atomics have no fixed order on a GPU, and in the interpreter always the same
        on_gpu = self.device != "cpu"
        run = partial(battery.history, subject, sequence, bitwise=not on_gpu)
        yield Step("repeated calls", fresh, run)
        if isinstance(subject, OpSpec) and subject.mutates:
            # what a user's kernel writes torch cannot know
            yield Step("repeated calls", one, partial(battery_torch.counts_writes, subject, one))
        repeats = _GPU_REPEATS if on_gpu else 2
        run = partial(battery.repeatability, subject, one, repeats=repeats, bitwise=not on_gpu)
        yield Step("repeated calls", one, run)
        if on_gpu:
            yield Step("guard bands", one, partial(battery_gpu.guard_bands, subject, one))
            yield Step("side streams", one, partial(battery_gpu.side_stream, subject, one))
            yield Step("CUDA graphs", one, partial(battery_gpu.cuda_graph, subject, one))

    def _offsets(self, names: list[str], case: Callable[..., Case]) -> Iterator[Step]:
        if self.device != "cpu":
            return
        quick = self.level == "quick"
        for one in (case(),) if quick else (case(name) for name in self._telling(names, case())):
            arguments = [
                name
                for name, value in one.arguments(self.subject).items()
                if isinstance(value, Tensor) and value.dim() and value.is_floating_point()
            ]
            for name in (*arguments, *((None,) if self.subject.gradients else ())):
                run = partial(battery.offsets, self.subject, one, name, every=not quick)
                yield Step("offsets", one, run)

    def _telling(self, names: list[str], typical: Case) -> list[str]:
        """The samples marked as typical, and those that launch a kernel which none before does."""
        subject = self.subject
        marked = [s.name for s in trials.samples_of(subject, subject.dtypes[0]) if s.layouts]
        telling = list(dict.fromkeys([typical.sample, *marked]))
        known = {kernel for name in telling for kernel in self._kernels.get(name, ())}
        for name in names:
            launched = self._kernels.get(name, set())
            if not launched <= known:
                telling.append(name)
                known |= launched
        return telling

    def _library(self, one: Case) -> Iterator[Step]:
        yield Step("torch.library", one, partial(battery_torch.library, self.subject, one))
