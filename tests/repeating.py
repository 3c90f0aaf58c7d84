"""How the tests of repeated calls call often, and see which calls were repeated."""

import itertools
from unittest import mock

import pytest
import torch

from tritorch import backend
from tritorch.repeats import composed, nodes, seen, watched

# the whole op, the forward pass of its Function and its library ops: each is tried on its own
LEVELS = 3


@pytest.fixture(autouse=True)
def kernels_only():
    # the second call is watched, whatever the environment says
    repeating = mock.patch.object(backend, "REPEATING", True)
    second = mock.patch.object(seen, "_WATCHED", 2)
    with backend.use("triton"), backend.strict(), repeating, second:
        yield


@pytest.fixture
def repeated():
    """Results of the calls that were repeated."""
    found = []
    original = watched.Repeat.__call__

    def repeat(self, arguments):
        found.append(original(self, arguments))
        return found[-1]

    with mock.patch.object(watched.Repeat, "__call__", repeat):
        yield found


def often(call, times=2 * LEVELS):
    """The result of the last of that many calls."""
    with torch.no_grad():
        for _ in range(times):
            result = call()
    return result


_widths = itertools.count(4)


@pytest.fixture
def images(device):
    """Images of a size that no test before has seen."""
    return torch.randn(2, 3, 4, next(_widths), device=device)


# calls until a node is repeated, and the backward pass of a repeated one
ENOUGH = 5


@pytest.fixture
def again():
    """What was repeated with a gradient: "node" for each node, "call" for each whole call."""
    found = []
    forward, call = nodes.Node.forward, composed.Composition.__call__

    def of_node(self, ctx, arguments):
        found.append("node")
        return forward(self, ctx, arguments)

    def of_call(self, arguments):
        found.append("call")
        return call(self, arguments)

    with (
        mock.patch.object(nodes.Node, "forward", of_node),
        mock.patch.object(composed.Composition, "__call__", of_call),
    ):
        yield found


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def trained(call, times=ENOUGH):
    """The result of the last of that many calls."""
    for _ in range(times):
        result = call()
    return result


def gradient(function, tensor):
    """Of the sum of what torch's function makes of a tensor."""
    x = leaf(tensor)
    return torch.autograd.grad(function(x).sum(), x)[0]


def backward(y, x):
    x.grad = None
    y.sum().backward()
    return x.grad
