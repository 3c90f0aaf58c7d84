"""What a row has besides its time, asked for as a GPU would be, on calls that are no GPU's."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from tritorch.bench import details, launches, timing
from tritorch.bench.cases import OURS, TORCH, Slot, workloads
from tritorch.bench.intervals import Interval
from tritorch.bench.passes import Prepared

pytestmark = pytest.mark.reference

GPU = types.SimpleNamespace(type="cuda")


class Clock(timing.CpuClock):
    def __init__(self, cache):
        self._cache = cache

    def cache(self):
        return self._cache


@pytest.fixture
def subject(monkeypatch):
    """Ours or torch's ReLU on two slots, on a device with a cache of so many bytes."""
    asked = []

    def graph_time(make, plan):
        calls = make()
        asked.append([call() for call in calls])
        return Interval(7.0, 6.0, 8.0)

    held = [100]
    monkeypatch.setattr(timing, "graph_time", graph_time)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 4196)
    monkeypatch.setattr(launches, "resources", lambda call: [{"kernel": "k", "result": call()}])

    def make(name, which="forward", cache=0):
        case = next(workloads(["relu"], torch.float32, small=True))
        slots = [Slot.of(case, "cpu", number) for number in range(2)]
        return details.Subject(Prepared(case, which, slots), name, Clock(cache)), asked

    return make


def test_what_is_asked_for_is_measured_and_timed(subject):
    ours, asked = subject(OURS)
    found, seconds = details.of(ours, ("graph", "memory", "kernels"), GPU)
    assert (found["graph_us"], found["graph_cold"], found["peak_bytes"]) == (7.0, True, 4096)
    assert found["kernels"][0]["kernel"] == "k"
    assert seconds.keys() == {"graph", "memory", "kernels"}
    # the whole ring, each call on its own slot
    ((first, second),) = asked
    assert torch.equal(first, ours.prepared.slots[0].arguments["input"].relu())
    assert torch.equal(second, ours.prepared.slots[1].arguments["input"].relu())


def test_a_graph_of_a_ring_that_the_cache_holds_is_not_cold(subject):
    ours, _ = subject(OURS, cache=1 << 20)
    assert details.of(ours, ("graph",), GPU)[0]["graph_cold"] is False


def test_a_gradient_is_computed_on_the_graph_s_own_calls(subject):
    ours, asked = subject(OURS, "backward")
    details.of(ours, ("graph",), GPU)
    ((first, _),) = asked
    (gradient,) = first
    assert gradient.shape == ours.prepared.slots[0].arguments["input"].shape


def test_torch_s_kernels_are_not_triton_s(subject):
    torchs, _ = subject(TORCH)
    assert details.of(torchs, ("kernels", "memory"), GPU)[0] == {"peak_bytes": 4096}


def test_without_a_gpu_the_host_alone_is_timed(subject):
    ours, _ = subject(OURS)
    ours.prepared.prepare(OURS)
    found, seconds = details.of(ours, details.MEASURES, torch.device("cpu"))
    assert found.keys() == {"host_us", "host_interval_us"}
    assert seconds.keys() == {"host"}
    low, high = found["host_interval_us"]
    assert 0 < low <= found["host_us"] <= high


def test_the_host_s_time_of_a_long_call_is_left_out(subject, monkeypatch):
    asked = []

    def host_time(call, clock, *, seconds):
        asked.append(seconds)
        raise ValueError("too long")

    monkeypatch.setattr(timing, "host_time", host_time)
    ours, _ = subject(OURS)
    found, _ = details.of(dataclasses.replace(ours, seconds=0.5), ("host",), GPU)
    assert (found, asked) == ({"host_failure": "ValueError: too long"}, [0.5])


def test_an_error_of_the_gpu_is_not_kept_quiet(subject, monkeypatch):
    def fails(call):
        raise RuntimeError(said)

    monkeypatch.setattr(launches, "resources", fails)
    ours, _ = subject(OURS)
    said = "no registers"
    found, _ = details.of(ours, ("kernels", "memory"), GPU)
    assert found == {"kernels_failure": "RuntimeError: no registers", "peak_bytes": 4096}
    said = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        details.of(ours, ("kernels",), GPU)
