"""What a call is timed on while it is tuned: numbers that it takes, and a cache that is cold."""

from __future__ import annotations

import pytest
import torch

from tritorch import ops
from tritorch.bench import candidates, timing, tune

pytestmark = pytest.mark.interpret

PLAN = timing.Plan(seconds=0.01)


@pytest.fixture
def measured(monkeypatch):
    """The sides and options of what is measured, which takes no time."""
    found = []

    def measure(sides, clock, plan, **options):
        found.append((sides, options))
        made = timing.intervals.median([1.0])
        return {name: timing.Timing(((1.0,),), made) for name in sides}

    monkeypatch.setattr(timing, "measure", measure)
    return found


def batch_norm(device):
    x = torch.randn(2, 4, 3, 3, device=device, requires_grad=True)
    return lambda: ops.batch_norm(x, None, None, training=True).sum().backward()


def test_no_candidate_is_refused_for_the_numbers(device, measured, monkeypatch):
    """Those of a batch norm, whose variance must be none below zero."""
    every = candidates.candidates
    monkeypatch.setattr(candidates, "candidates", lambda *given: every(*given)[:2])
    asked = tune.asked_by([batch_norm(device)])
    assert {str(task.op) for tasks in asked.values() for task in tasks} >= {
        "tritorch.batch_norm_elemt.default",
        "tritorch.batch_norm_backward_reduce.default",
        "tritorch.batch_norm_backward_elemt.default",
    }
    for question, tasks in asked.items():
        found = tune.answer(*question, tasks, torch.device(device), PLAN)
        assert found.refused == ()
        assert found.candidates > 1


def test_what_has_no_finite_result_is_said(device, measured, monkeypatch):
    made = tune._made

    def too_large(argument, *rest):
        one = made(argument, *rest)
        return one.fill_(1e38) if torch.is_tensor(one) else one

    monkeypatch.setattr(tune, "_made", too_large)
    a = torch.randn(33, 33, device=device)
    [(question, tasks)] = tune.asked_by([lambda: ops.matmul(a, a)]).items()
    found = tune.answer(*question, tasks, torch.device(device), PLAN)
    said = "all: matmul(33x33, 33x33) is not finite by the kernel's own choice"
    assert found.refused == (said,)
    [(sides, _)] = measured
    assert list(sides) == ["own"]
    assert found.candidates == 1


@pytest.mark.parametrize(
    ("cache", "sets", "flush"),
    [
        (0, 1, False),
        # the whole ring is twice the cache, or as many sets as there may be are less
        (8 * 33 * 33, 3, False),
        (8 * 33 * 33 * 16, 8, True),
    ],
)
def test_the_cache_is_emptied_where_the_ring_does_not(
    device, measured, monkeypatch, cache, sets, flush
):
    monkeypatch.setattr(timing.CpuClock, "cache", lambda self: cache)
    monkeypatch.setattr(timing, "clock", lambda device: timing.CpuClock())
    a, b = (torch.randn(33, 33, device=device) for _ in range(2))
    [(question, tasks)] = tune.asked_by([lambda: ops.matmul(a, b)]).items()
    tune.answer(*question, tasks, torch.device(device), PLAN)
    [(sides, options)] = measured
    assert ({len(ring) for ring in sides.values()}, options) == ({sets}, {"flush": flush})
