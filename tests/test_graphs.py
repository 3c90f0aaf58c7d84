"""CUDA graphs of our layers, by torch's own means."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tritorch
from tritorch import ops

pytestmark = pytest.mark.cuda

LAST = torch.channels_last


def network(fused):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    model = tritorch.convert(model.to("cuda", memory_format=LAST))
    return tritorch.fuse(model) if fused else model


def batches(count):
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(count):
        images = torch.randn(32, 16, 8, 8, device="cuda", generator=generator)
        yield images.contiguous(memory_format=LAST), torch.arange(32, device="cuda") % 10


def trained(model, parameters):
    optimizer = tritorch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for images, target in batches(4):
        loss = ops.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# torch's graphed backward runs on another stream than the one that its leaves were made on
@pytest.mark.filterwarnings("ignore:.*AccumulateGrad")
@pytest.mark.parametrize("fused", [False, True], ids=["as written", "fused"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_graphed_model_learns_what_the_model_does(fused, autocast):
    model = network(fused)
    twin = copy.deepcopy(model)
    [(images, _)] = batches(1)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(model, (images,))
        losses = trained(graphed, model.parameters())
        expected = trained(twin, twin.parameters())
    # the order of every sum is that of shapes and strides alone
    assert torch.equal(losses, expected)
    assert losses[0] != losses[-1]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
