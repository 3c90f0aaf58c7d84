"""Times callables in turns, on a GPU each call with a cold L2 cache, until medians are known.

A side of a measurement is a ring of calls: the same function on different tensors.  Sides take
turns in rounds, so that what changes meanwhile (clocks, temperature, other programs) changes all of
them.  On a GPU a call is timed between two events while the host is ahead, so that what is
measured is the GPU's time; on a CPU it is wall time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tritorch.bench import intervals
from tritorch.bench.intervals import Interval

Call = Callable[[], object]

# taken before any code that is timed can replace them; `guards` holds them against what is there
now = time.perf_counter
Event: Any = torch.cuda.Event
synchronize = torch.cuda.synchronize

# cycles that a GPU makes in a microsecond, at most
_CYCLES = 2000
# microseconds that it spins at least and at most
_SPIN = 300, 50_000
# calls of one round; a launch queue takes about a thousand entries
_ROUND = 16
# rounds at least: where time is short, and else, because samples of one round resemble each other
_ROUNDS = 3, 12
# times that it is looked for work on other streams, and calls of one look
_TRIES, _TOGETHER = 3, 4
# rounds of the host's time, and calls of one, at most as many as the queue has room for
_HOST_ROUNDS, _HOST_CALLS = 5, 100
# that much more than the L2 cache is read to empty it
_COLD = 2


class Clock(Protocol):
    """Times calls: `flush` empties the caches before each, `ahead` keeps the host ahead of a GPU.

    `keep`: the number of a call whose result is given back with the times, in microseconds.
    `host_bound` says of the last calls that the host did not stay ahead, because they wait for
    their own results, say.
    """

    host_bound: bool

    def times(
        self, calls: Sequence[Call], *, flush: bool = False, ahead: bool = True, keep: int = -1
    ) -> tuple[list[float], object]: ...

    def finish(self) -> None:
        """Waits until everything has run."""

    def unfinished(self, call: Call) -> float:
        """Microseconds that the device works on after all that the call has put on its stream."""

    def cache(self) -> int:
        """Bytes of the cache that must be cold."""


class CpuClock:
    """Wall time; nothing keeps caches cold."""

    host_bound = False

    def times(
        self, calls: Sequence[Call], *, flush: bool = False, ahead: bool = True, keep: int = -1
    ) -> tuple[list[float], object]:
        found, kept = [], None
        for number, call in enumerate(calls):
            start = now()
            result = call()
            found.append((now() - start) * 1e6)
            if number == keep:
                kept = result
        return found, kept

    def finish(self) -> None:
        pass

    def unfinished(self, call: Call) -> float:
        return 0.0

    def cache(self) -> int:
        return 0


class GpuClock:
    """CUDA events around every call.

    Before the first call the GPU spins, until the host has queued all of them: the time of a launch
    by Python would otherwise be counted wherever a kernel is shorter than that.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._cache = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self._lines: torch.Tensor | None = None
        self._spin = 3 * _SPIN[0]
        self._events: list[tuple[Any, Any]] = []
        self.host_bound = False

    def cache(self) -> int:
        return self._cache

    def finish(self) -> None:
        synchronize()

    def unfinished(self, call: Call) -> float:
        least = float("inf")
        # the shortest of some: the host is held up now and then
        for _ in range(_TRIES):
            end = Event()
            synchronize()
            # work elsewhere adds up while the host is faster than it
            for _ in range(_TOGETHER):
                call()
            end.record()
            while not end.query():
                pass
            begun = now()
            synchronize()
            least = min(least, now() - begun)
        return 1e6 * least

    def times(
        self, calls: Sequence[Call], *, flush: bool = False, ahead: bool = True, keep: int = -1
    ) -> tuple[list[float], object]:
        while len(self._events) < len(calls):
            self._events.append((Event(enable_timing=True), Event(enable_timing=True)))
        for last in (False, True):
            begun, kept = self._queue(calls, flush, ahead, keep)
            # that long it takes here, and so it will next time
            least, most = _SPIN
            self._spin = int(min(most, max(least, 1.5e6 * (now() - begun))))
            synchronize()
            # calls that wait for the GPU stay behind however long it spins
            if last or not self.host_bound:
                break
        pairs = self._events[: len(calls)]
        return [start.elapsed_time(end) * 1e3 for start, end in pairs], kept

    def _queue(
        self, calls: Sequence[Call], flush: bool, ahead: bool, keep: int
    ) -> tuple[float, object]:
        """Queues the calls; the time when it began, and the result that is to be kept."""
        kept, released = None, Event()
        if ahead:
            torch.cuda._sleep(self._spin * _CYCLES)
        released.record()
        begun = now()
        for number, (call, (start, end)) in enumerate(zip(calls, self._events, strict=False)):
            if flush:
                self._flush()
            start.record()
            result = call()
            end.record()
            if number == keep:
                kept = result
            del result
        self.host_bound = ahead and released.query()
        return begun, kept

    def _flush(self) -> None:
        # read, not written: lines that were written must be stored while the next kernel runs
        if self._lines is None:
            size = _COLD * self._cache // 4
            self._lines = torch.ones(size, device="cuda", dtype=torch.float32)
        self._lines.amax()


def clock(device: torch.device | str) -> Clock:
    """The clock of a device."""
    return GpuClock() if torch.device(device).type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """What one side took: microseconds per call, by rounds; `median` with its interval."""

    rounds: tuple[tuple[float, ...], ...]
    median: Interval = field(compare=False)
    host_bound: bool = False

    @property
    def samples(self) -> list[float]:
        return [sample for one in self.rounds for sample in one]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Until every side's median is known to `precision` (half of its 95 % interval, as a fraction) and
    has `least` samples in twelve rounds, or it has `most`, or until `seconds` have gone by, but for
    three rounds at least.
    """

    seconds: float = 1.0
    precision: float = 0.01
    least: int = 20
    most: int = 1000
    ahead: bool = True


# told of each round: the side, the number of the call in its ring, what it returned
Witness = Callable[[str, int, object], None]


def measure(
    sides: Mapping[str, Sequence[Call]],
    clock: Clock,
    plan: Plan = Plan(),
    *,
    flush: bool = False,
    witness: Witness | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Times the sides in turns.

    `sides`: each a ring of calls, of the same length.  `flush`: whether the ring alone does not
    suffice to make caches cold.  `witness` sees the result of one call of each round, which one is
    drawn at random.
    """
    draw = random.Random(seed)
    rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    bound = dict.fromkeys(sides, False)
    count, ring = {}, dict.fromkeys(sides, 0)
    share = plan.seconds / len(sides) / _ROUNDS[1]
    for name, calls in sides.items():
        # the first call compiles, searches, allocates; the second tells how long a round is
        calls[0]()
        clock.finish()
        [once], _ = clock.times(calls[:1], ahead=plan.ahead)
        count[name] = max(1, min(_ROUND, int(share * 1e6 / max(once, 1e-3))))
    deadline = now() + plan.seconds
    order = list(sides)
    while True:
        for name in order:
            calls = sides[name]
            turn = [calls[(ring[name] + i) % len(calls)] for i in range(count[name])]
            watched = draw.randrange(len(turn)) if witness is not None else -1
            found, kept = clock.times(turn, flush=flush, ahead=plan.ahead, keep=watched)
            if witness is not None:
                witness(name, (ring[name] + watched) % len(calls), kept)
            del kept
            ring[name] += len(turn)
            rounds[name].append(tuple(found))
            bound[name] |= clock.host_bound
        order.reverse()
        done = len(rounds[order[0]])
        if (done >= _ROUNDS[0] and now() > deadline) or (
            done >= _ROUNDS[1] and _known(rounds, plan)
        ):
            break
    return {
        name: Timing(tuple(found), intervals.median(_flat(found)), bound[name])
        for name, found in rounds.items()
    }


def _flat(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [sample for one in rounds for sample in one]


def _known(rounds: Mapping[str, Sequence[Sequence[float]]], plan: Plan) -> bool:
    flat = [_flat(found) for found in rounds.values()]
    return all(
        len(samples) >= plan.most
        or (len(samples) >= plan.least and intervals.median(samples).precision <= plan.precision)
        for samples in flat
    )


def host_time(call: Call, clock: Clock, *, seconds: float) -> Interval:
    """What the host takes for one call, in microseconds, while no result is waited for.

    Of calls whose work a GPU finishes sooner: otherwise the queue fills and the host waits.  Raises
    ValueError for a call so long that five do not fit in `seconds`.
    """
    # the shortest of some: one of them may be held up
    once = min(finished(call, clock) for _ in range(_TRIES))
    calls = min(_HOST_CALLS, int(seconds / _HOST_ROUNDS / max(once, 1e-9)))
    if not calls:
        raise ValueError(f"a call takes {1e6 * once:.0f} us: too long to be the host's time")
    found = []
    for _ in range(_HOST_ROUNDS):
        clock.finish()
        start = now()
        for _ in range(calls):
            call()
        found.append((now() - start) / calls * 1e6)
    clock.finish()
    return intervals.median(found)


def finished(call: Call, clock: Clock) -> float:
    """Seconds until a call's work is done, but for what was to be done before."""
    clock.finish()
    start = now()
    call()
    clock.finish()
    return now() - start


def graph_time(make: Callable[[], Sequence[Call]], plan: Plan = Plan()) -> Interval:
    """Microseconds of a call in a CUDA graph that makes the whole ring's calls, one after another.

    `make` makes the ring, on the stream that is captured: a gradient is computed on the stream of
    what it is the gradient of.  There is no gap between launches in a graph, and the ring must be
    large enough for a cold cache.  Raises what the capture raises: some calls cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # not `torch.cuda.graph`, which gives all memory back that the next measurement needs again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        calls = make()
        # each once: what is made for a tensor when it is first seen cannot be captured
        for call in calls:
            call()
        synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    timed = measure({"graph": [graph.replay]}, GpuClock(), plan)
    return Interval(*(value / len(calls) for value in timed["graph"].median))
