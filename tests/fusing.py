"""Models to fuse, and how the tests of fusing compare them: by their training in float64."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tritorch
from tritorch import ops


class Model(nn.Module):
    """A convolution and a batch norm, and what is computed with them."""

    def __init__(self, compute, activation=None, **more):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        for name, value in more.items():
            setattr(self, name, value)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def images(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (4, 3, 5, 6), generator=generator, dtype=torch.float64).to(device)


def pair(model, device="cpu"):
    """Converted and fused, of the same values."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5)
    converted = tritorch.convert(model.to(device, torch.float64), inplace=True)
    return converted, tritorch.fuse(copy.deepcopy(converted), inplace=True)


def trained(model, *inputs, steps=3):
    """Results, gradients and state of some steps of training, then a result in evaluation."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        leaves = [one.clone().requires_grad_() for one in inputs]
        # what it changes in place is no leaf
        y = model.train()(*[leaf * 1 for leaf in leaves])
        optimizer.zero_grad()
        y.square().mean().backward()
        found += [y.detach(), *(leaf.grad for leaf in leaves)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        found += [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        found.append(model.eval()(*[one.clone() for one in inputs]))
    model.train()
    return found


def check_same(model, *inputs, device="cpu"):
    converted, fused = pair(model, device)
    inputs = inputs or (images(device=device),)
    assert_close(trained(fused, *inputs), trained(converted, *inputs))
    return fused


def fused_of(model):
    return dict(tritorch.fusion_report(model).fused)


def activations_of(model):
    return {k: v for k, v in fused_of(model).items() if not v.startswith("statistics")}


def kept_of(model):
    """The reasons without their places."""
    kept = tritorch.fusion_report(model).kept
    return {name: re.sub(r" \(\w+\.py:\d+\)$", "", reason) for name, reason in kept.items()}


def place_of(written, text):
    """Of the line that has this text in a class or function, as a report names it."""
    lines, first = inspect.getsourcelines(written)
    (number,) = (number for number, line in enumerate(lines, first) if text in line)
    return f"{Path(inspect.getsourcefile(written)).name}:{number}"


@pytest.fixture
def epilogues(monkeypatch):
    """What layers ask their ops for beyond torch's arguments: the op, activation, a residual."""
    found = []

    def watched(name, op):
        def call(*args, **kwargs):
            # of linear and conv2d it is the last argument
            last = args[-1] if name in ("linear", "conv2d") else None
            activation = kwargs.get("activation", last)
            if isinstance(activation, str):
                found.append((name, activation, kwargs.get("residual") is not None))
            return op(*args, **kwargs)

        return call

    for name in ("batch_norm", "linear", "conv2d", "conv2d_batch_norm"):
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    return found


def activate(m, y):
    return m.act(y)


def behind_a_norm(how):
    """A model with that activation, a function or a module."""
    step, module = (activate, how) if isinstance(how, nn.Module) else (how, None)
    return Model(lambda m, x: step(m, m.bn(m.conv(x))), module)


def iadd(a, b):
    a += b
    return a


def patched(layer):
    layer.forward = lambda input: input * 2
    return layer
