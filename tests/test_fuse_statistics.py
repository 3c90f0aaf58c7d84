"""Convolutions whose batch norm takes its statistics from them, in one call."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests.fusing import Model, check_same, fused_of, images, pair
from tritorch import ops

pytestmark = pytest.mark.reference


class Convolved(Model):
    """A convolution without bias, and what is computed with it and the norm."""

    def __init__(self, compute, activation=None, **more):
        conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        super().__init__(compute, activation, **{"conv": conv, **more})


# how a norm follows a convolution, and whether the two are one call in training
STATISTICS = {
    "alone": (lambda m, x: m.bn(m.conv(x)), True),
    "relu": (lambda m, x: F.relu(m.bn(m.conv(x))), True),
    "added": (lambda m, x: F.relu(m.bn(m.conv(x)) + x), True),
    "+=": (lambda m, x: F.relu(operator.iadd(m.bn(m.conv(x)), x)), True),
    "broadcast": (lambda m, x: F.relu(m.bn(m.conv(x)) + x[:1]), False),
    "used twice": (lambda m, x: (y := m.conv(x)) + m.bn(y), False),
    "between": (lambda m, x: m.bn(m.conv(x) * 2), False),
    "moved": (lambda m, x: (y := m.conv(x), z := x + 1) and F.relu(m.bn(y) + z), False),
    "written": (
        lambda m, x: (
            (w := m.conv.weight, y := m.conv(m.first(x)), w.data.mul_(0.5))
            and F.relu(m.bn(y) + w.mean())
        ),
        False,
    ),
    "fresh": (lambda m, x: (y := m.conv(m.first(x)), z := x + 1) and F.relu(m.bn(y) + z), True),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_come_from_the_convolution(name, monkeypatch):
    compute, together = STATISTICS[name]
    model = Convolved(compute, first=nn.Conv2d(3, 3, 1))
    if name == "used twice":
        assert fused_of(pair(model)[1]) == {}
        return
    calls = []
    monkeypatch.setattr(
        ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm), raising=True
    )
    check_same(model)
    # of three steps of training; in evaluation one kernel has nothing to tell the other
    assert len(calls) == 3 * together


def noting(calls, op):
    def call(*args, **kwargs):
        calls.append(kwargs["activation"])
        return op(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 3, padding=1, bias=False, padding_mode="circular"),
        nn.Conv2d(3, 3, 3, padding="same", bias=False),
        nn.Conv2d(3, 3, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(3, 3, 3, bias=False, groups=3),
    ],
    ids=["bias", "circular", "same", "odd", "groups"],
)
@pytest.mark.parametrize("kind", ["alone", "relu", "+="])
def test_convolutions_in_front_of_a_norm(conv, kind):
    compute, _ = STATISTICS[kind]
    if kind == "+=":
        model = Convolved(
            lambda m, x: F.relu(m.bn(m.conv(x)) + m.side(x)), conv=conv, side=copy.deepcopy(conv)
        )
    else:
        model = Convolved(compute, conv=conv)
    check_same(model)


def test_hooks_of_a_convolution_see_what_they_would_have_seen():
    _, fused = pair(Convolved(STATISTICS["relu"][0]))
    assert fused_of(fused) == {"conv": "statistics of bn", "bn": "relu"}
    seen = []
    fused.conv.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    x = images()
    fused(x)
    assert_close(seen, [F.conv2d(x, fused.conv.weight, padding=1)])


def test_a_norm_of_running_statistics_alone_is_not_asked_for_any(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm))
    _, fused = pair(Convolved(STATISTICS["relu"][0]))
    fused.bn.eval()
    fused(images())
    assert calls == []


@pytest.mark.parametrize("enabled", [False, True])
def test_statistics_under_autocast(enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm))
    converted, fused = pair(Convolved(STATISTICS["added"][0]))
    x = images().float()
    found = []
    for model in (converted.float(), fused.float()):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model(x))
    # what is added is float32, the convolution is not
    assert len(calls) == (not enabled)
    assert_close(found[1], found[0])
