"""Max pooling where no value is above another."""

import pytest
import torch
import torch.nn.functional as F

from tritorch import ops

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_windows_of_minus_infinity_have_their_first_pixel(dilation, stride, device):
    """Of the image: what lies in the padding before it has no index and takes no gradient."""
    given = {"kernel_size": 3, "stride": stride, "padding": 1, "dilation": dilation}
    found = []
    for function in (ops.max_pool2d, F.max_pool2d):
        x = torch.full((1, 2, 8, 9), float("-inf"), device=device, requires_grad=True)
        y, indices = function(x, **given, return_indices=True)
        grad = torch.arange(1.0, 1 + y.numel(), device=device).view(y.shape)
        found.append((y.detach(), indices, torch.autograd.grad(y, x, grad)[0]))
    for value, expected in zip(*found, strict=True):
        assert torch.equal(value, expected)
