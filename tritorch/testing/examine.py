"""Runs the battery over one subject: finds its tiles, then watches every step."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from tritorch.registry import Maker, Sample, Subject
from tritorch.testing import (
    battery_gpu,
    cases,
    describe,
    hosting,
    input_sizes,
    places,
    promises,
    trials,
)
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Sizes
from tritorch.testing.report import MEMORY
from tritorch.testing.schedule import Schedule, Step
from tritorch.testing.trials import Case

# sections of a report in which the detectors' findings appear, whatever was run
MEMORY_KINDS = frozenset(
    (
        "out-of-bounds read",
        "out-of-bounds write",
        "out-of-bounds atomic",
        "unwritten output",
        "uninitialised read",
        "int32 overflow",
        "race",
        "tile",
        "promise",
    )
)

# kinds of findings about what a call gives
_RESULTS = frozenset(("values", "gradients", "exactness", "special values", "repeatability"))


@dataclass(frozen=True)
class Outcome:
    """What a step found, and how long it took.

    declined: the function or its reference does not take the case, which therefore says nothing.
    """

    step: Step
    findings: list[Finding]
    seconds: float
    declined: bool = False


class Examination(Schedule):
    """The steps of one check, made as it goes: what the first launches use decides the sizes.

    options: those of `Schedule`.
    """

    def __init__(self, subject: Subject, **options: Any) -> None:
        super().__init__(subject, **options)
        self.notes: list[str] = []
        self._declined = False
        self._host = hosting.Host()

    def run(
        self,
        on_step: Callable[[Step], None] = lambda step: None,
        on_plan: Callable[[dict[str, int]], None] = lambda cases: None,
    ) -> Iterator[Outcome]:
        """Runs every step; `on_step` is called with each before it starts.

        `on_plan` is called with the number of steps of each section, as far as known at the start.
        """
        with hosting.hosted() as self._host:
            # filled by the launches
            self.configurations = self._host.configurations
            self._probe(on_step)
            # whether these are run the others decide
            third = {name for *_, name in self._third_tiles}
            # samples that raise late do it again below, behind what is found before
            with contextlib.suppress(Exception):
                planned = (step for step in self._steps() if step.case.sample not in third)
                on_plan(Counter(step.section for step in planned))
            for step in self._steps():
                on_step(step)
                start = time.perf_counter()
                self._declined = False
                found = self.watched(step)
                yield Outcome(step, found, time.perf_counter() - start, self._declined)

    def watched(self, step: Step) -> list[Finding]:
        """Runs a step with every access watched: one out of bounds could end the process."""
        self._host.programs = 0
        with contextlib.ExitStack() as stack:
            detector = None
            if self.device == "cpu":
                from tritorch.testing import detectors

                detector = stack.enter_context(detectors.detecting())
            try:
                found = self._kept_promises(step) if self.device == "cpu" else step.run()
            except battery_gpu.NotCaptured as why:
                self.notes.append(str(why))
                found, self._declined = [], True
            except cases.Refused:
                # a case that the reference does not take says nothing
                found, self._declined = [], True
            except (Exception, SystemExit) as error:
                found = [trials.raised(error, step.case)]
        seen = [] if detector is None else detector.findings
        kernels = self._kernels.setdefault(step.case.sample, set())
        kernels |= set() if detector is None else {one.kernel for one in detector.launches}
        if most := self._host.programs:
            # some steps call other samples too
            self._programs[step.case.sample] = min(most, self._programs.get(step.case.sample, most))
        return found + [replace(finding, case=str(step.case)) for finding in seen]

    def _kept_promises(self, step: Step) -> list[Finding]:
        """Runs a step; a promise to the compiler that is not kept changes no result."""
        with promises.watching() as watched:
            found = step.run()
        if not watched.broken:
            return found
        from tritorch.testing import detectors

        # a GPU reads what lies there: only results tell whether it matters
        with promises.believed(), detectors.detecting():
            believed = step.run()
        known = {finding.key for finding in found}
        wrong = [f for f in believed if f.kind in _RESULTS and f.key not in known]
        if not wrong:
            return found
        # what it looks like has another reason than the usual one
        message = wrong[0].message.partition("; ")[0]
        return found + [
            Finding(
                "promise",
                f"{said}; a GPU that relies on it gives {message}",
                file=place.file,
                line=place.line,
                source=places.statement(place),
                case=str(step.case),
            )
            for place, said in watched.broken.items()
        ]

    def section_of(self, finding: Finding, step: Step) -> str:
        """Where a report shows a finding."""
        return MEMORY if finding.kind in MEMORY_KINDS else step.section

    def _probe(self, on_step: Callable[[Step], None]) -> None:
        """Calls until one returns: finds out the tiles, and whether the function has gradients."""
        subject = self.subject
        dtype = subject.dtypes[0]
        tried: list[Sizes] = []
        launches: list[Any] = []
        returned, gives = False, True
        for one, sizes in self._first_calls():
            tried.append(sizes)
            name = next(trials.samples_of(one, dtype)).name
            case = Case(name, dtype, self.device, seed=self.seed)
            on_step(Step("first call", case, list))
            seen: list[Any] = []
            with contextlib.ExitStack() as stack, contextlib.suppress(Exception, SystemExit):
                # what it raises is found by the steps
                if self.device == "cpu":
                    from tritorch.testing import detectors

                    seen = stack.enter_context(detectors.detecting()).launches
                one.op(**case.arguments(one))
                returned = True
                gives = describe.gives_gradients(one, dtype, self.device)
            launches += seen
            if returned:
                break
        if self.device == "cpu" and returned and not launches:
            self.notes.append("no Triton kernel was launched: what is checked is plain PyTorch")
        self.tiles = input_sizes.tile_sizes(launches)
        if subject.gradients and returned and not gives:
            self.notes.append("its result requires no gradient: gradients are not checked")
            self.subject = replace(subject, gradients=())
        if self.inputs is not None:
            chosen: list[Sizes] = []
            chosen += input_sizes.choices(self.inputs, self.tiles, self.level, self.seed)
            chosen += input_sizes.empties(self.inputs)
            if self.inputs.letters:
                chosen += self._set_aside(chosen)
                fresh = input_sizes.apart(self.inputs, [*chosen, *tried])
                self._fresh = self.inputs.name(fresh)
                chosen.append(fresh)
            self.subject = self._sized(chosen)

    def _set_aside(self, chosen: Iterable[Sizes]) -> list[Sizes]:
        """The sizes that some steps alone are for, without those that are chosen for all."""
        assert self.inputs is not None
        found: list[Sizes] = []
        if self.level == "quick":
            for three in input_sizes.third_tiles(self.inputs, self.tiles):
                small, edge, name = map(self.inputs.name, three)
                self._third_tiles.append((small, edge, name))
                found.append(three[-1])
        tiles = self._tiles_of_configurations()
        known = {tile for own in tiles for tile in own}
        for index, own in enumerate(tiles):
            # a host may be written for the tile of the first, or for the least
            others = (max(tiles[0]), min(known)) if self.level == "quick" else sorted(known)
            sizes = input_sizes.of_configuration(self.inputs, own, others)
            self._configured_names[index] = [self.inputs.name(one) for one in sizes]
            found += sizes
        taken = list(chosen)
        found = [one for one in found if one not in taken]
        self._aside = {self.inputs.name(one) for one in found}
        return found

    def _tiles_of_configurations(self) -> list[tuple[int, ...]]:
        """The tiles of each configuration, where there are several."""
        count = max((len(configs) for configs in self.configurations.values()), default=0)
        found = []
        for index in range(count if count > 1 else 0):
            kernels = self.configurations.values()
            chosen = [configs[min(index, len(configs) - 1)] for configs in kernels]
            launches = [SimpleNamespace(constants=config.kwargs) for config in chosen]
            found.append(input_sizes.tile_sizes(launches) or self.tiles or (16,))
        return found

    def _first_calls(self) -> Iterator[tuple[Subject, Sizes]]:
        """The subject with one sample alone, and its sizes, in the order in which to call it."""
        if self.inputs is not None:
            chosen = input_sizes.choices(self.inputs, (), "quick", self.seed)
            for sizes in [*chosen, *input_sizes.empties(self.inputs)]:
                yield self._sized([sizes]), sizes
            return
        for sample in trials.samples_of(self.subject, self.subject.dtypes[0]):
            alone = partial(_only, self.subject, sample.name)
            yield replace(self.subject, samples=alone), {}

    def _sized(self, sizes: Iterable[Sizes]) -> Subject:
        assert self.inputs is not None
        return replace(self.subject, samples=self.inputs.samples(sizes))


def _only(subject: Subject, name: str, make: Maker) -> list[Sample]:
    return [cases.sample_of(subject, name, make)]
