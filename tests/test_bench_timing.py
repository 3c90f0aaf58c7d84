"""The timer: who is called when, when it stops, and what a GPU's clock makes of a slow host."""

from __future__ import annotations

import contextlib
import random
import time
import types

import pytest
import torch

from tritorch.bench import intervals, timing
from tritorch.bench.timing import CpuClock, GpuClock, Plan, measure

pytestmark = pytest.mark.reference


class Fake:
    """A clock that tells what it is asked and that times by a list."""

    host_bound = False

    def __init__(self, us):
        self.us, self.asked = us, []

    def times(self, calls, *, flush=False, ahead=True, keep=-1):
        results = [call() for call in calls]
        self.asked.append((results, flush, ahead))
        return [self.us(name) for name, _ in results], results[keep] if keep >= 0 else None

    def finish(self):
        pass

    def cache(self):
        return 0


def ring(name, count=3):
    return [lambda i=i: (name, i) for i in range(count)]


def test_sides_take_turns_and_the_ring_goes_round():
    clock = Fake(lambda name: 10.0)
    timed = measure({"a": ring("a"), "b": ring("b")}, clock, Plan(seconds=0.0005), flush=True)
    # after one call of each that says how long a round is
    rounds = [results for results, flush, _ in clock.asked[2:] if flush]
    names = ["".join(name for name, _ in results) for results in rounds]
    order = [name[0] for name in names]
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    called = [slot for results in rounds for name, slot in results if name == "a"]
    assert called == [i % 3 for i in range(len(called))]
    assert len(timed["a"].rounds) == len(timed["b"].rounds)
    assert timed["a"].median.value == 10.0


def test_it_stops_when_the_medians_are_known():
    draw = random.Random(0)
    plan = Plan(seconds=5.0, precision=0.01, least=20)
    quiet = measure({"a": ring("a")}, Fake(lambda name: 100 * draw.gauss(1, 0.001)), plan)["a"]
    noisy = measure({"a": ring("a")}, Fake(lambda name: 100 * draw.gauss(1, 0.08)), plan)["a"]
    assert len(quiet.rounds) == 12
    assert noisy.median.precision <= 0.01
    assert len(noisy.samples) > 1.5 * len(quiet.samples)


def test_it_stops_after_its_time_and_at_its_most():
    draw = random.Random(0)
    clock = Fake(lambda name: 100 * draw.lognormvariate(0, 1))
    begun = time.perf_counter()
    slow = {"a": [lambda: time.sleep(0.001) or ("a", 0)]}
    measure(slow, clock, Plan(seconds=0.05))
    assert time.perf_counter() - begun < 1
    timed = measure({"a": ring("a")}, clock, Plan(seconds=100, most=200))
    assert 200 <= len(timed["a"].samples) < 250


def test_a_witness_sees_one_result_of_each_round():
    seen = []
    clock = Fake(lambda name: 10.0)
    sides = {"a": ring("a"), "b": ring("b")}
    timed = measure(sides, clock, Plan(), witness=lambda *found: seen.append(found))
    assert len(seen) == 2 * len(timed["a"].rounds)
    assert all(result == (side, slot) for side, slot, result in seen)
    # which one is drawn
    assert len({slot for _, slot, _ in seen}) > 1


def test_the_cpu_s_clock_times_calls():
    timed = measure({"a": [lambda: time.sleep(0.002)]}, CpuClock(), Plan(seconds=0.1))["a"]
    assert 2000 <= timed.median.low <= timed.median.value <= timed.median.high < 20_000


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: it spins for as long as it is told to, from when it is told.

    Its time, and the host's, is what is spent of it: `spend`.
    """
    state = types.SimpleNamespace(spun=[], until=0.0, time=0.0)

    def spend(seconds):
        state.time += seconds

    state.spend = spend

    class Event:
        def __init__(self, enable_timing=False):
            self.at = 0.0

        def record(self):
            self.at = state.time
            self.until = state.until

        def query(self):
            return state.time > self.until

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    def sleep(cycles):
        state.spun.append(cycles / timing._CYCLES)
        state.until = state.time + cycles / timing._CYCLES / 1e6

    ones = torch.ones
    properties = types.SimpleNamespace(L2_cache_size=1 << 12)
    monkeypatch.setattr(timing, "now", lambda: state.time)
    monkeypatch.setattr(timing, "Event", Event)
    monkeypatch.setattr(timing, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch, "ones", lambda size, device, dtype: ones(size, dtype=dtype))
    return state


def test_the_gpu_spins_until_the_host_is_ahead(gpu):
    clock = GpuClock()
    calls = [lambda: gpu.spend(0.001)] * 5
    found, _ = clock.times(calls)
    assert not clock.host_bound
    # too short at first, and long enough at the second try
    assert len(gpu.spun) == 2
    assert gpu.spun[1] > 5000
    assert len(found) == 5
    clock.times(calls)
    assert len(gpu.spun) == 3


def test_calls_that_wait_for_the_gpu_are_host_bound(gpu):
    clock = GpuClock()

    def waits():
        gpu.spend(max(0.0, gpu.until - gpu.time) + 1e-4)

    clock.times([waits] * 3)
    assert clock.host_bound
    assert len(gpu.spun) == 2


def test_the_gpu_s_cache_is_emptied_and_the_host_may_count(gpu):
    clock = GpuClock()
    assert clock.cache() == 1 << 12
    result = object()
    _, kept = clock.times([lambda: result] * 2, flush=True, ahead=False, keep=1)
    assert kept is result
    assert not gpu.spun
    assert clock._lines is not None
    assert clock._lines.numel() * 4 == 2 * clock.cache()


def test_the_interval_of_a_median_holds_it_95_times_of_100():
    draw = random.Random(0)
    inside = 0
    for _ in range(1000):
        found = intervals.median([draw.lognormvariate(0, 0.5) for _ in range(40)])
        inside += found.low <= 1.0 <= found.high
    assert 930 <= inside <= 985


def test_the_geometric_mean_is_that_of_the_ratios():
    mean = intervals.geometric_mean([2.0, 0.5, 4.0])
    assert mean.value == pytest.approx(4 ** (1 / 3))
    assert mean.low < mean.value < mean.high


def test_work_that_no_event_has_seen_is_found(gpu, monkeypatch):
    """A call that ends on its own stream at once, and half a millisecond later elsewhere."""
    busy = 0.0

    def elsewhere():
        nonlocal busy
        busy = max(busy, gpu.time) + 5e-4

    def waits():
        gpu.spend(max(0.0, busy - gpu.time) + 5e-6)

    monkeypatch.setattr(timing, "synchronize", waits)
    gpu.spend(1.0)
    clock = GpuClock()
    # four calls, which the host makes in no time
    assert clock.unfinished(elsewhere) == pytest.approx(2005)
    assert clock.unfinished(lambda: None) == pytest.approx(5)
    assert CpuClock().unfinished(elsewhere) == 0


@pytest.mark.parametrize(("us", "count"), [(10.0, 503), (1000.0, 53), (9000.0, 8)])
def test_the_host_is_timed_within_its_seconds(monkeypatch, us, count):
    """Three calls that say how many there may be, and five rounds."""
    calls = []
    monkeypatch.setattr(timing, "now", lambda: 1e-6 * us * len(calls))
    found = timing.host_time(lambda: calls.append(None), CpuClock(), seconds=0.05)
    assert found.value == pytest.approx(us)
    assert len(calls) == count


def test_what_takes_longer_is_not_the_host_s_time(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "now", lambda: 0.02 * len(calls))
    with pytest.raises(ValueError, match="a call takes 20000 us: too long to be the host's time"):
        timing.host_time(lambda: calls.append(None), CpuClock(), seconds=0.05)
    assert len(calls) == 3


@pytest.fixture
def graphs(gpu, monkeypatch):
    """CUDA graphs that keep a diary; a replay takes a millisecond."""
    diary: list[str] = []

    class Graph:
        def capture_begin(self):
            diary.append("begin")

        def capture_end(self):
            diary.append("end")

        def replay(self):
            gpu.spend(1e-3)

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: contextlib.nullcontext())
    return diary


def test_a_graph_holds_the_whole_ring_and_is_timed_by_the_call(graphs):
    def make():
        graphs.append("make")
        return [lambda i=i: graphs.append(f"call {i}") for i in range(4)]

    found = timing.graph_time(make, Plan(seconds=0.01, least=6, most=12))
    calls = [f"call {i}" for i in range(4)]
    # on the stream that is captured, and each once before that
    assert graphs == ["make", *calls, "begin", *calls, "end"]
    assert found.value == pytest.approx(250)


def test_what_cannot_be_captured_ends_the_capture(graphs):
    def refuses():
        if "begin" in graphs:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        timing.graph_time(lambda: [refuses])
    assert graphs == ["begin", "end"]
