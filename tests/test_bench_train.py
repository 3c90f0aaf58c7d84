"""Rows of whole train steps."""

from unittest import mock

import pytest
import torch

import tritorch
from tritorch.bench import timing, train_steps
from tritorch.bench.cases import OURS, TORCH
from tritorch.bench.train_steps import EAGER, FUSED, GRAPH, Trainer

PLAN = timing.Plan(0.05, least=3, ahead=False)


def rows(device, *names, batch=2):
    trainer = Trainer(torch.device(device), batch, blocks=(1, 1), size=32)
    clock = timing.clock(torch.device(device))
    return [row for found in trainer.rows(names, PLAN, clock) for row in found]


@pytest.mark.reference
def test_a_row_for_each_implementation_with_torchs_time_beside_it():
    ours, fused, torchs = rows("cpu", OURS, FUSED, TORCH)
    assert [row["op"] for row in (ours, fused, torchs)] == [
        "resnet50",
        "resnet50_fused",
        "resnet50",
    ]
    assert [row["implementation"] for row in (ours, fused, torchs)] == [OURS, OURS, TORCH]
    for row in (ours, fused):
        assert row["verified"], row["failure"]
        assert row["baseline_us"] == torchs["median_us"]
        assert row["speedup"] == row["baseline_us"] / row["median_us"]
        assert row["first_loss"] == pytest.approx(torchs["first_loss"], rel=2**-6)
    assert torchs["speedup"] is None
    assert {row["pass"] for row in (ours, fused, torchs)} == {EAGER}


@pytest.mark.reference
def test_another_first_loss_has_no_speedup(monkeypatch):
    monkeypatch.setattr(train_steps.ops, "cross_entropy", lambda x, target: x.float().pow(2).mean())
    ours, _ = rows("cpu", OURS, TORCH)
    assert not ours["verified"]
    assert ours["speedup"] is None
    assert "first loss" in ours["failure"]


@pytest.mark.reference
def test_a_step_that_learns_nothing_or_something_else_has_no_speedup(monkeypatch):
    sgd = tritorch.optim.SGD
    for wrong in (lambda p: p.grad.zero_(), lambda p: p.grad.neg_(), lambda p: p.grad.mul_(2)):

        class Wrong(sgd):
            def step(self, closure=None, wrong=wrong):
                for group in self.param_groups:
                    for parameter in group["params"]:
                        wrong(parameter)
                return super().step(closure)

        monkeypatch.setattr(tritorch.optim, "SGD", Wrong)
        ours, torchs = rows("cpu", OURS, TORCH)
        assert torchs["verified"]
        assert not ours["verified"]
        assert ours["speedup"] is None
        assert "first update" in ours["failure"]


@pytest.mark.reference
@pytest.mark.parametrize("name", ["bn1.weight", "stages.1.0.bn3.bias", "fc.bias"])
def test_one_layer_that_learns_something_else_is_named(name, monkeypatch):
    update = train_steps.Step.update

    def wrong(step):
        loss, moved = update(step)
        # that of ours is asked first
        if not seen:
            moved[name] = moved[name].roll(1)
        seen.append(step)
        return loss, moved

    seen = []
    monkeypatch.setattr(train_steps.Step, "update", wrong)
    ours, torchs = rows("cpu", OURS, TORCH)
    assert torchs["verified"]
    assert f"first update of {name} of length" in ours["failure"]


@pytest.mark.reference
def test_what_rounding_does_to_a_step_is_no_difference():
    """Of a network with all its blocks, at a size that a CPU has time for."""
    trainer = Trainer(torch.device("cpu"), 8, size=64)
    _, rounded = trainer.step(TORCH).update()
    expected = exact_update(trainer)
    assert train_steps._differs(rounded, expected) == ""
    upside_down = {name: one.flip(0) for name, one in rounded.items()}
    assert "of all parameters" in train_steps._differs(upside_down, expected)
    fewer = dict(list(rounded.items())[1:])
    assert "other parameters" in train_steps._differs(fewer, expected)


def exact_update(trainer):
    """The same step without autocast."""
    autocast = torch.autocast
    with mock.patch.object(torch, "autocast", lambda *a: autocast(*a, enabled=False)):
        return trainer.step(TORCH).update()[1]


@pytest.mark.reference
def test_a_step_that_raises_is_a_row_without_a_time(monkeypatch):
    def fails(x, target):
        raise ValueError("no such loss")

    monkeypatch.setattr(train_steps.ops, "cross_entropy", fails)
    ours, torchs = rows("cpu", OURS, TORCH)
    assert ours["failure"] == "raises ValueError: no such loss"
    assert (ours["median_us"], ours["speedup"], ours["verified"]) == (None, None, False)
    assert torchs["median_us"] > 0


@pytest.mark.cuda
def test_steps_are_timed_as_graphs_too():
    found = rows("cuda", OURS, FUSED, TORCH, batch=4)
    assert [row["pass"] for row in found] == [EAGER] * 3 + [GRAPH] * 3
    for row in found:
        assert row["verified"], row["failure"]
        assert row["median_us"] > 0
        assert ("peak_bytes" in row) == (row["pass"] == EAGER)


@pytest.mark.cuda
def test_a_step_that_stands_still_is_no_graph_of_one():
    loss = torch.ones((), device="cuda")
    step = train_steps.Step(lambda: loss * 1.0, {})
    with pytest.raises(RuntimeError, match="graph of a step"):
        train_steps._captured(step, torch.cuda.graph_pool_handle())
