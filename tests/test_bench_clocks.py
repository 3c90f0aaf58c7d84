"""Times of a GPU that is slowed down are marked, and where nobody knows, nothing fails."""

from __future__ import annotations

import copy
import sys
import time
import types

import pytest
import torch

from tritorch.bench import clocks, compare, reports, rows, timing, told
from tritorch.bench.cases import workloads
from tritorch.bench.environment import environment
from tritorch.bench.rows import Bench

pytestmark = pytest.mark.reference

CUDA = torch.device("cuda")
# two GPUs, and a driver that knows the mask by one of its names
SMI = """#!{python}
import sys, time
query = next(a for a in sys.argv if a.startswith("--query-gpu=")).partition("=")[2].split(",")
known = {{"uuid": None, {mask!r}: None, "clocks.sm": "{mhz}", "temperature.gpu": "84",
    "power.draw": "612.31", "driver_version": "580.65.06", "power.limit": "700.00",
    "clocks.max.sm": "1980", "ecc.mode.current": "Enabled", "mig.mode.current": "[N/A]",
    "persistence_mode": "Enabled"}}
for name in query:
    if name not in known:
        print(f'Field "{{name}}" is not a valid field to query.')
        sys.exit(2)
def tell():
    for uuid, mask in (("GPU-other", "0x80"), ("GPU-1b2c", {value!r})):
        cells = known | {{"uuid": uuid, {mask!r}: mask}}
        print(", ".join(cells[name] for name in query), flush=True)
tell()
while any(a.startswith("--loop-ms") for a in sys.argv):
    time.sleep(0.02)
    tell()
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a `nvidia-smi` on the path, and a GPU into torch."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(
        name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=1, uuid="1b2c"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    clocks._settings.cache_clear()

    def put(value, mask="clocks_event_reasons.active", mhz=1200):
        file = tmp_path / "nvidia-smi"
        text = SMI.format(python=sys.executable, mask=mask, value=value, mhz=mhz)
        file.write_text(text)
        file.chmod(0o755)
        return properties

    yield put
    clocks._settings.cache_clear()


def states(watch, count=3):
    found, until = [], time.monotonic() + 20
    while len(found) < count and time.monotonic() < until:
        found += watch.seen()
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("mask", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_a_hot_gpu_is_seen_and_another_one_is_not(smi, mask):
    smi("0x0000000000000044", mask)
    watch = clocks.watch(CUDA)
    found = states(watch)
    assert {state.mask for state in found} == {0x44}
    assert watch.latest.row() == {
        "reasons": ["power cap", "hardware thermal slowdown"],
        "mhz": 1200.0,
        "celsius": 84.0,
        "watts": 612.31,
    }
    assert clocks.summary(found) == {
        "throttled": ["hardware thermal slowdown"],
        "power_capped": True,
        "clock_mhz": [1200.0, 1200.0],
        "celsius": 84.0,
    }


def test_a_gpu_at_its_power_cap_is_not_throttled(smi):
    smi("0x0000000000000004")
    assert clocks.summary(states(clocks.watch(CUDA)))["throttled"] == []


def test_it_ends_with_the_watch(smi):
    smi("0x0")
    watch = clocks.watch(CUDA)
    process = watch._process
    assert process.poll() is None
    del watch
    assert process.poll() is not None


UNKNOWN = {"throttled": None, "power_capped": None, "clock_mhz": None, "celsius": None}


def test_without_nvidia_smi_nobody_knows(smi):
    watch = clocks.watch(CUDA)
    assert (watch.seen(), watch.latest) == ([], None)
    assert clocks.summary([]) == UNKNOWN
    assert set(clocks.settings().values()) == {None}


def test_which_of_many_gpus_it_is_must_be_known(smi):
    properties = smi("0x0")
    properties.uuid = "something else"
    assert isinstance(clocks.watch(CUDA), clocks.Blind)
    assert clocks.settings()["driver"] is None


@pytest.mark.parametrize("script", ["exit 9", "sleep 30", "echo no devices were found"])
def test_an_nvidia_smi_that_says_nothing_is_no_error(smi, tmp_path, monkeypatch, script):
    monkeypatch.setattr(clocks, "_PATIENCE", 0.2)
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    file.chmod(0o755)
    assert states(clocks.watch(CUDA), 0) == []
    assert clocks.summary(clocks.watch(CUDA).seen()) == UNKNOWN
    assert clocks.settings()["driver"] is None


def test_the_environment_says_what_the_owner_has_set(smi, monkeypatch):
    smi("0x0")
    # a build for CUDA would ask the devices that there are not
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    found = environment()
    assert found["driver"] == "580.65.06"
    assert found["power_limit_watts"] == 700.0
    assert found["highest_clock_mhz"] == 1980.0
    assert (found["ecc"], found["mig"]) == ("Enabled", None)


class Hot:
    """Sees a slowed GPU, but not before the second look."""

    latest = clocks.State(0x40)

    def __init__(self):
        self.looks = 0

    def seen(self):
        self.looks += 1
        return [clocks.State(0x40, 900.0)] if self.looks % 2 == 0 else [clocks.State(0x80)]


def test_a_row_says_that_it_was_measured_while_the_gpu_was_throttled(monkeypatch):
    case = next(workloads(["relu"], small=True))
    bench = Bench(torch.device("cpu"), timing.Plan(seconds=0.01, least=3), watch=Hot())
    slots = bench.slots(case)
    (row, _) = bench.rows(case, "forward", slots)
    assert "throttled" not in row
    # what is not about the GPU itself runs on the CPU
    device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(bench, "device", device)
    (row, baseline) = bench.rows(case, "forward", slots)
    assert row["throttled"] == baseline["throttled"] == ["hardware thermal slowdown"]
    assert row["clock_mhz"] == [900.0, 900.0]
    assert "GPU throttled: hardware thermal slowdown" in reports.line(row)[-1]
    assert "THROTTLED: hardware thermal slowdown" in told.line(row)


class Cooling:
    """Sees a slowed GPU while it measures for the first time, and a healthy one afterwards."""

    latest = None

    def __init__(self, hot):
        self.masks = [0, 0x40] * hot

    def seen(self):
        return [clocks.State(self.masks.pop(0) if self.masks else 0)]


@pytest.mark.parametrize(
    ("hot", "throttled", "pauses"), [(0, 0, 0), (1, 0, 1), (2, 1, 1), (99, 3, 2)]
)
def test_what_was_measured_while_throttled_is_measured_again(monkeypatch, hot, throttled, pauses):
    slept = []
    monkeypatch.setattr(rows.time, "sleep", slept.append)
    case = next(workloads(["relu"], small=True))
    plan = timing.Plan(seconds=0.001, least=3)
    bench = Bench(torch.device("cpu"), plan, watch=Cooling(hot))
    bench.retries = 2
    slots = bench.slots(case)
    monkeypatch.setattr(bench, "device", types.SimpleNamespace(type="cuda"))
    found = [bench.rows(case, "forward", slots)[0] for _ in range(3)]
    assert sum(bool(row["throttled"]) for row in found) == throttled
    # a hot machine is not waited for again and again
    assert len(slept) == pauses
    assert all(row["verified"] for row in found)


def test_a_slower_row_of_a_throttled_gpu_is_unsure():
    row = {
        "op": "relu", "shape": [8], "pass": "forward", "implementation": "tritorch",
        "median_us": 10.0, "verified": True, "interval_us": [9.99, 10.01], "throttled": [],
    }  # fmt: skip
    slower = {**copy.deepcopy(row), "median_us": 20.0, "interval_us": [19.99, 20.01]}
    old, new = ({"rows": [one]} for one in (row, slower))
    assert compare.compare(old, new).count("SLOWER") == 1
    slower["throttled"] = ["hardware power brake"]
    (found,) = compare.compare(old, new).rows
    assert (found.verdict, found.why) == ("UNSURE", "the GPU was throttled: new")
