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


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last"])
def test_split_sum_adds_a_residual_of_any_strides(layout, device):
    shape = (2, 3, 10, 9)
    partial = torch.randint(-4, 5, (3, 540), device=device).float()
    residual = torch.arange(540.0, device=device).view(shape)
    output = torch.full(shape, float("nan"), device=device)
    if layout == "transposed":
        residual = residual.mT.contiguous().mT
    elif layout == "sliced":
        residual = torch.cat([residual, residual], dim=3)[..., ::2]
    elif layout == "expanded":
        residual = residual[:1].expand(shape)
    else:
        output = output.contiguous(memory_format=torch.channels_last)
    reduce.split_sum(partial, output, residual=residual)
    # in the order of the output's memory
    total = partial.sum(0)
    if layout == "channels_last":
        total = total.view(2, 10, 9, 3).permute(0, 3, 1, 2)
    assert torch.equal(output, total.reshape(shape) + residual)
