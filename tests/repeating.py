"""How the tests of repeated calls call often, and see which calls were repeated."""

import itertools
from unittest import mock

import pytest
import torch

from tritorch import backend, repeats, watched

# the whole op, the forward pass of its Function and its library ops: each is tried on its own
LEVELS = 3


@pytest.fixture(autouse=True)
def kernels_only():
    # the second call is watched
    with backend.use("triton"), backend.strict(), mock.patch.object(repeats, "_WATCHED", 2):
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
