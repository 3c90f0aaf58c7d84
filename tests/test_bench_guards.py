"""Seven ways to look fast without being it, each of which the guards catch; and honest functions,
which they let pass.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from tritorch.bench import fatal, guards, timing
from tritorch.bench.cases import Case, Planner
from tritorch.bench.rows import Bench
from tritorch.registry import Cost

pytestmark = pytest.mark.reference


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def measured(function, passes=None, cost=None, ceilings=None):
    """The row of a function that claims to be a matrix product."""
    make = Planner(torch.float32)
    case = Case(
        op="product",
        name="",
        dtype=torch.float32,
        arguments={"a": make(24, 16), "b": make(16, 8)},
        implementations={"candidate": function, "torch": product},
        reference=product,
        passes=passes or {"forward": ()},
        cost=cost or {},
    )
    plan = timing.Plan(seconds=0.02, least=3)
    bench = Bench(torch.device("cpu"), plan, ceilings=ceilings)
    row, baseline = bench.case(case)
    assert baseline["verified"]
    assert baseline["median_us"] > 0
    return row


def refused(row, what):
    assert what in row["failure"]
    assert not row["verified"]
    assert row["speedup"] is None
    # the time is told all the same
    assert row["median_us"] > 0


@pytest.mark.parametrize("which", [{"forward": ()}, {"backward": ("a", "b")}, {"both": ("a",)}])
def test_an_honest_function_is_verified(which):
    row = measured(lambda a, b: (b.T @ a.T).T, which)
    assert row["verified"]
    assert row["failure"] == ""
    assert row["speedup"] == pytest.approx(row["baseline_us"] / row["median_us"])
    low, high = row["speedup_interval"]
    assert low <= row["speedup"] <= high
    assert row["headroom"] < 1


def test_cached_output_is_caught():
    """The same memory is taken for the same numbers."""
    known: dict[tuple[int, int], Tensor] = {}

    def cached(a: Tensor, b: Tensor) -> Tensor:
        key = (a.data_ptr(), b.data_ptr())
        if key not in known:
            known[key] = a @ b
        return known[key].clone()

    refused(measured(cached), "after timing: output 0: C1")


@pytest.mark.parametrize("which", [{"forward": ()}, {"backward": ("a",)}])
def test_the_first_call_is_one_call(monkeypatch, which):
    """Without the forward calls of a backward pass, and without the next one."""
    calls = []

    def counts(a: Tensor, b: Tensor) -> Tensor:
        calls.append(None)
        return a @ b

    monkeypatch.setattr(timing, "now", lambda: time.perf_counter() + 1000 * len(calls))
    row = measured(counts, which)
    assert row["verified"]
    assert int(row["first_seconds"]) // 1000 == ("forward" in which)


def test_zeros_are_caught():
    refused(measured(lambda a, b: torch.zeros(a.shape[0], b.shape[1])), "output 0: C1")


def test_mutated_input_is_caught():
    def spoils(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        a[0, 0] += 1
        return c

    row = measured(spoils)
    assert (row["failure"], row["verified"]) == ("mutated input: a has changed", False)
    # its time would be one of the inputs that it makes of them
    assert (row["median_us"], row["speedup"]) == (None, None)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_who_mutates_an_input_spoils_his_own_row_alone(which):
    """Whoever was called before him or will be after, in a pass whose graph was made before too."""

    def spoils(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            a.fill_(0.0)
        return a @ b

    make = Planner(torch.float32)
    functions = {"first": product, "spoils": spoils, "last": lambda a, b: (b.T @ a.T).T}
    case = Case(
        op="product",
        name="",
        dtype=torch.float32,
        arguments={"a": make(24, 16), "b": make(16, 8)},
        implementations={**functions, "torch": product},
        reference=product,
        passes={which: () if which == "forward" else ("b",)},
    )
    bench = Bench(torch.device("cpu"), timing.Plan(seconds=0.02, least=3))
    slots = bench.slots(case)
    found = {row["implementation"]: row for row in bench.rows(case, which, slots)}
    assert {name: row["failure"] for name, row in found.items()} == {
        "first": "",
        "spoils": "mutated input: a has changed",
        "last": "",
        "torch": "",
    }
    assert found["first"]["speedup"]
    assert found["last"]["speedup"]
    assert all(bool(slot.arguments["a"].count_nonzero()) for slot in slots)


def test_input_mutated_later_is_caught():
    calls = []

    def spoils(a: Tensor, b: Tensor) -> Tensor:
        calls.append(None)
        c = a @ b
        if len(calls) > 4:
            b.mul_(0)
        return c

    refused(measured(spoils), "mutated input: b of slot 0 has changed")


def test_reused_memory_is_caught():
    """Every call returns the same tensor, which the next call overwrites."""
    kept = torch.empty(24, 8)
    refused(measured(lambda a, b: torch.mm(a, b, out=kept)), "output 0: C1")


def test_memory_that_nobody_wrote_is_caught():
    """Where the reference's own result may lie, if it ran first."""
    refused(measured(lambda a, b: a.new_empty(24, 8)), "output 0: C0 NaN and infinity")


class Later(torch.Tensor):
    """Computes itself when it is looked at."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            now = [arg.made() if isinstance(arg, Later) else arg for arg in args]
        return function(*now, **(kwargs or {}))


def test_lazy_output_is_caught():
    def later(a: Tensor, b: Tensor) -> Tensor:
        result = torch.empty(24, 8).as_subclass(Later)
        result.made = lambda: a @ b
        return result

    refused(measured(later), "lazy output: output 0 is a Later, not a tensor")


def test_warm_up_detection_is_caught():
    """Right while it is verified, before and after; called again and again it only looks busy."""
    streak, last = 0, 0.0

    def detects(a: Tensor, b: Tensor) -> Tensor:
        nonlocal streak, last
        now = time.perf_counter()
        streak, last = (streak + 1 if now - last < 2e-4 else 0), now
        return a @ b if streak < 4 else torch.ones(24, 8)

    refused(measured(detects), "while timed: output 0: C1")


def test_patched_timer_is_caught(monkeypatch):
    begun = time.perf_counter()

    def patches(a: Tensor, b: Tensor) -> Tensor:
        monkeypatch.setattr(time, "perf_counter", lambda: begun)
        return a @ b

    row = measured(patches)
    refused(row, "patched timer: time.perf_counter was replaced")
    # and was of no use
    assert row["median_us"] > 0.1


@pytest.mark.parametrize("name", ["record", "elapsed_time"])
def test_patched_event_is_caught(monkeypatch, name):
    def patches(a: Tensor, b: Tensor) -> Tensor:
        monkeypatch.setattr(torch.cuda.Event, name, lambda *_: 1e-3)
        return a @ b

    refused(measured(patches), f"patched timer: Event.{name} was replaced")


def test_impossible_time_is_caught():
    from tritorch.bench.ceilings import Ceilings

    ceilings = Ceilings(1e9, {"float32": 1e9})
    row = measured(product, cost={"forward": Cost(10**9, 1)}, ceilings=ceilings)
    refused(row, "impossible: ")
    assert row["roofline"] > 2


def test_work_on_another_stream_is_caught(monkeypatch):
    monkeypatch.setattr(timing.CpuClock, "unfinished", lambda self, call: 800.0)
    refused(measured(product), "work on another stream: the GPU is busy for 800 us after")
    # what a question takes, and what a long call may leave
    monkeypatch.setattr(timing.CpuClock, "unfinished", lambda self, call: 40.0)
    assert measured(product)["verified"]
    assert guards.elsewhere(150.0, 1000.0) == ""
    assert guards.elsewhere(250.0, 1000.0)


def test_what_raises_has_a_row_without_a_time():
    def raises(a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError("only for 8 x 8")

    row = measured(raises)
    assert row["failure"] == "raises NotImplementedError: only for 8 x 8"
    assert row["median_us"] is None
    assert row["speedup"] is None


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA out of memory. Tried to allocate 20 GiB", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("operation failed due to a previous error during capture", False),
        ("no kernel of that name", False),
    ],
)
def test_errors_that_end_a_process_are_told_from_others(text, ends):
    try:
        fatal.reraise(RuntimeError(text))
    except RuntimeError:
        assert ends
    else:
        assert not ends


def test_wrong_gradient_is_caught():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad @ b.T, 1.01 * (a.T @ grad)

    refused(measured(Wrong.apply, {"backward": ("a", "b")}), "gradient of b: C1")
    assert measured(Wrong.apply, {"backward": ("a",)})["verified"]


def test_a_call_that_the_kernels_do_not_take_is_told(monkeypatch):
    from tritorch import backend
    from tritorch.bench.cases import workloads

    case = next(workloads(["relu"], small=True))
    bench = Bench(torch.device("cpu"), timing.Plan(seconds=0.01, least=3))
    (row, _) = bench.rows(case, "forward", bench.slots(case))
    assert row["fallbacks"] == {}
    monkeypatch.setattr(backend, "_choice", "triton")
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    (row, baseline) = bench.rows(case, "forward", bench.slots(case))
    assert row["fallbacks"]["relu"].keys() == {"triton is not installed"}
    assert "fallbacks" not in baseline
