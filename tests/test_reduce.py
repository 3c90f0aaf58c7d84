"""The last step of a split sum, over outputs of several programs."""

import pytest
import torch

from tritorch.ops import reduce

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("columns", [512, 750])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_split_sum_writes_every_block(activation, columns, device):
    partial = torch.randint(-4, 5, (3, 2 * columns), device=device).float()
    bias = torch.arange(-2.0, columns - 2, device=device)
    output = torch.full((2, columns), float("nan"), device=device)
    reduce.split_sum(partial, output, bias, activation)
    expected = partial.sum(0).view(2, columns) + bias
    assert torch.equal(output, expected.relu() if activation else expected)
