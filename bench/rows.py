"""Measures one pass of a case: verified, timed in turns with its baselines, verified again.

A row of a result file for each implementation: its times, its baseline's, the speed-up, and what
the guards say.  There is no speed-up where a guard spoke or a value was wrong.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tritorch import backend
from tritorch.bench import clocks, details, fatal, guards, intervals, timing
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import OURS, TORCH, Case, Slot
from tritorch.bench.ceilings import Ceilings
from tritorch.bench.passes import Prepared, ring
from tritorch.testing import cases as running
from tritorch.testing import tolerances

Row = dict[str, Any]

# of a GPU's memory that a ring may take
_MEMORY = 0.5
_NEW_NUMBERS = 1_000_003
# times that a throttled GPU is waited for, and seconds of one
_RETRIES, _COOLING = 10, 2.0


@dataclass
class Bench:
    """Where and how cases are measured.

    `extras`: names of `details.MEASURES`, measured besides the time on the device.  `watch` sees
    whether the GPU is slowed down meanwhile.
    """

    device: torch.device
    plan: timing.Plan = field(default_factory=timing.Plan)
    ceilings: Ceilings | None = None
    extras: frozenset[str] = frozenset()
    seed: int = 0
    watch: clocks.Watch = field(default_factory=clocks.Blind)

    def __post_init__(self) -> None:
        self.clock = timing.clock(self.device)
        self.first: dict[str, float] = {}
        self.retries = _RETRIES

    def memory(self) -> int:
        if self.device.type != "cuda":
            return 1 << 30
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(_MEMORY * free)

    def case(self, case: Case) -> Iterator[Row]:
        """The rows of all passes of a case."""
        slots = self.slots(case)
        for which in case.passes:
            yield from self.rows(case, which, slots)

    def slots(self, case: Case) -> list[Slot]:
        count = ring(case, self.clock.cache(), self.memory())
        return [Slot.of(case, self.device, self.seed + number) for number in range(count)]

    def rows(self, case: Case, which: str, slots: list[Slot]) -> list[Row]:
        """The rows of one pass, the first implementation's first.

        What was measured while the GPU was throttled is discarded and measured again, once, and not
        more often than a hot machine has time for.
        """
        found = self._rows(case, which, slots)
        if self.retries > 0 and any(row.get("throttled") for row in found):
            self.retries -= 1
            time.sleep(_COOLING)
            # what is compiled by now is not compiled again
            first = dict(self.first)
            found = self._rows(case, which, slots)
            for row in found:
                if "first_seconds" in row:
                    row["first_seconds"] = first.get(row["implementation"])
        return found

    def _rows(self, case: Case, which: str, slots: list[Slot]) -> list[Row]:
        prepared = Prepared(case, which, slots)
        backend.reset()
        judge = guards.Judge(prepared)
        failures, verdicts = self._prepare(prepared, judge)
        self.watch.seen()
        timed, kept = self._timed(prepared)
        slowed = clocks.summary(self.watch.seen())
        # while what was differentiated is still what lies in memory
        extras = {name: self.details(prepared, name, self.extras)[0] for name in timed}
        self._judge(judge, timed, kept, failures, verdicts)
        baseline = timed.get(TORCH)
        found = []
        for name in case.implementations:
            row = head(case, which, name)
            if name in timed:
                row |= self._times(case, which, timed[name])
                row |= extras[name]
                if self.device.type == "cuda":
                    row |= slowed
                row["first_seconds"] = self.first.get(name)
            verdict = verdicts.get(name)
            row["verified"] = not failures.get(name) and (verdict is None or verdict.accepted)
            row["failure"] = failures.get(name, "")
            row["headroom"] = None if verdict is None else min(verdict.headroom, 1e9)
            if name == OURS:
                # calls that the kernels did not take are torch's speed, not ours
                row["fallbacks"] = backend.explain()
            if name != TORCH and name in timed and baseline is not None:
                row |= _beside(row, timed[name], baseline)
            found.append(row)
        return found

    def details(
        self, prepared: Prepared, name: str, wanted: Iterable[str]
    ) -> tuple[Row, dict[str, float]]:
        """Fields of a row that need no times of others beside them, and what each took."""
        seconds = self.plan.seconds / len(prepared.case.implementations)
        subject = details.Subject(prepared, name, self.clock, seconds)
        return details.of(subject, wanted, self.device)

    def _prepare(
        self, prepared: Prepared, judge: guards.Judge
    ) -> tuple[dict[str, str], dict[str, tolerances.Verdict]]:
        """Makes the calls of every implementation and verifies them, the reference's last."""
        failures: dict[str, str] = {}
        verdicts: dict[str, tolerances.Verdict] = {}
        for name in prepared.case.implementations:
            if name == TORCH:
                prepared.prepare(name)
                continue
            # of a backward pass the forward one may change them, which runs once
            before = [(n, t.detach().clone()) for n, t in prepared.slots[0].tensors()]
            results: dict[str, Any] = {}
            try:
                first, *_ = prepared.prepare(name)
                self.first[name] = self._seconds(prepared, first)
                results = _first_results(prepared, name)
                failures[name] = guards.lazy(results)
            except Exception as error:
                fatal.reraise(error)
                failures[name] = f"raises {type(error).__name__}: {error}"[:500]
                prepared.calls[name].clear()
            if changed := _changed(before, prepared.slots[0]):
                failures[name] = failures[name] or f"mutated input: {changed} has changed"
                # not timed: it would spoil what the others are timed and judged on
                prepared.calls[name].clear()
                self._restore(prepared)
                judge.forget()
            if not failures[name]:
                verdicts[name] = judge.verdict(results, 0)
                failures[name] = verdicts[name].failure
        return failures, verdicts

    def _seconds(self, prepared: Prepared, call: timing.Call) -> float:
        """What a first call takes: compiling, loading, searching for algorithms."""
        with torch.set_grad_enabled(bool(prepared.wanted)):
            return timing.finished(call, self.clock)

    def _restore(self, prepared: Prepared) -> None:
        """New numbers in all slots, and the calls that there are made again."""
        for number in range(len(prepared.slots)):
            prepared.refill(number, self.seed + number)
        for name in [name for name, calls in prepared.calls.items() if calls]:
            prepared.prepare(name)

    def _timed(self, prepared: Prepared) -> tuple[dict[str, timing.Timing], _Kept]:
        """Times what could be called; keeps some of what it returned meanwhile."""
        sides = {
            name: calls
            for name, calls in prepared.calls.items()
            # what is wrong is timed all the same, so that its row says how long it takes
            if calls
        }
        before, kept = guards.fingerprints(prepared.slots), _Kept()
        flush = len(prepared.slots) * prepared.case.size < 2 * self.clock.cache()
        with _quiet(), torch.set_grad_enabled(bool(prepared.wanted)):
            timed = timing.measure(
                sides, self.clock, self.plan, flush=flush, witness=kept.see, seed=self.seed
            )
            for name in (name for name in timed if name != TORCH):
                left = self.clock.unfinished(sides[name][0])
                kept.elsewhere[name] = guards.elsewhere(left, timed[name].median.value)
        kept.caught = guards.mutated(before, prepared.slots) or guards.patched()
        return timed, kept

    def _judge(
        self,
        judge: guards.Judge,
        timed: Mapping[str, timing.Timing],
        kept: _Kept,
        failures: dict[str, str],
        verdicts: dict[str, tolerances.Verdict],
    ) -> None:
        """What was returned while timed, and what is returned afterwards."""
        prepared = judge.prepared
        candidates = [name for name in timed if name != TORCH and not failures.get(name)]
        for name in candidates:
            failures[name] = (
                kept.caught or kept.elsewhere[name] or kept.judged(name, prepared, judge)
            )
        # other numbers in the same memory
        prepared.refill(0, self.seed + _NEW_NUMBERS)
        judge.forget()
        for name in candidates:
            if not failures[name]:
                failures[name] = self._afterwards(prepared, name, judge, verdicts)
            if not failures[name]:
                floor = self.floor(prepared.case, prepared.which)
                failures[name] = guards.impossible(timed[name].median.value, floor)

    def _afterwards(
        self,
        prepared: Prepared,
        name: str,
        judge: guards.Judge,
        verdicts: dict[str, tolerances.Verdict],
    ) -> str:
        """Whether it is still right."""
        results = _results(prepared, name, prepared.call(name, 0))
        verdict = judge.verdict(results, 0)
        if verdict.headroom > verdicts[name].headroom:
            verdicts[name] = verdict
        return f"after timing: {verdict.failure}" if verdict.failure else ""

    def floor(self, case: Case, which: str) -> float | None:
        """The least time of the pass by this run's ceilings, in microseconds."""
        if self.ceilings is None:
            return None
        return self.ceilings.floor_us(case.cost.get(which), case.dtype)

    def _times(self, case: Case, which: str, timed: timing.Timing) -> Row:
        us, cost = timed.median.value, case.cost.get(which)
        low, high = intervals.quartiles(timed.samples)
        floor = self.floor(case, which)
        return {
            "median_us": us,
            "interval_us": list(timed.median[1:]),
            "quartiles_us": [low, high],
            "samples_us": [[round(sample, 3) for sample in one] for one in timed.rounds],
            "host_bound": timed.host_bound,
            "tflops": cost.flops / us / 1e6 if cost else None,
            "gbps": cost.bytes / us / 1e3 if cost else None,
            "roofline": floor / us if floor else None,
        }


class _Kept:
    """What one timed call of each side returned: the last that was seen on the first slot.

    `caught`: what was wrong with inputs or clocks afterwards; `elsewhere`: of each side, what it
    left on other streams.
    """

    def __init__(self) -> None:
        self.caught = ""
        self.elsewhere: dict[str, str] = {}
        self._seen: dict[str, tuple[int, object]] = {}

    def see(self, side: str, slot: int, result: object) -> None:
        if side != TORCH and (slot == 0 or side not in self._seen):
            self._seen[side] = slot, result

    def judged(self, name: str, prepared: Prepared, judge: guards.Judge) -> str:
        if name not in self._seen or prepared.case.mutates:
            return ""
        slot, result = self._seen.pop(name)
        results = prepared.named(result)
        said = guards.lazy(results) or judge.verdict(results, slot).failure
        return f"while timed: {said}" if said else ""


def _first_results(prepared: Prepared, name: str) -> dict[str, Any]:
    """What a side gives for the first slot, looked at after a call on the second one.

    It runs before its reference does, in memory that holds NaN: it cannot find its result there.
    """
    calls = prepared.calls[name]
    grad = bool(prepared.wanted)
    # what torch.compile made refuses other settings than it was made under
    poisoned = contextlib.nullcontext() if name == COMPILED else running.poisoned_memory()
    with torch.set_grad_enabled(grad), poisoned:
        results = _results(prepared, name, calls[0])
        calls[1]()
    return results


def _changed(before: list[tuple[str, torch.Tensor]], slot: Slot) -> str:
    """Names an argument that is not what it was, "" for none."""
    for (name, then), (_, now) in zip(before, slot.tensors(), strict=True):
        if not running.bitwise_equal(now, then):
            return name
    return ""


def _results(prepared: Prepared, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    if prepared.case.mutates:
        # what it writes must be compared with what it was
        return prepared.outcome(prepared.case.implementations[name], 0)
    with torch.set_grad_enabled(bool(prepared.wanted)):
        return prepared.named(call())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No collection of garbage in the middle of a call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def head(case: Case, which: str, implementation: str) -> Row:
    """A row that says what it is of, and nothing yet of what was measured."""
    return {
        "op": case.op,
        "name": case.name,
        "count": case.count,
        "shape": case.shape,
        "arguments": case.text(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "pass": which,
        "implementation": implementation,
        "baseline": "" if implementation == TORCH else TORCH,
        "median_us": None,
        "speedup": None,
        "verified": False,
    }


def _beside(row: Row, timed: timing.Timing, baseline: timing.Timing) -> Row:
    found: Row = {
        "baseline_us": baseline.median.value,
        "baseline_interval_us": list(baseline.median[1:]),
    }
    if row["verified"]:
        found["speedup"] = baseline.median.value / timed.median.value
        # cautious: both at the wrong end
        found["speedup_interval"] = [
            baseline.median.low / timed.median.high,
            baseline.median.high / timed.median.low,
        ]
    return found


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is of: the same in two results, if it is to be compared.

    The shape is the first tensor's; the arguments say the others', where a row has them.
    """
    names = ("op", "name", "shape", "arguments", "dtype", "layout", "pass", "implementation")
    return tuple(str(row.get(name)) for name in names)
