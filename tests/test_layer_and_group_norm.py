"""Layer and group norms of values that their tests of samples do not have."""

import pytest
import torch
import torch.nn.functional as F

from tritorch import ops

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    ("norm", "shape", "given", "step"),
    [
        ("layer_norm", (2, 16384), ([16384],), 4096),
        ("group_norm", (256, 1, 4096), (1,), 1024),
    ],
)
def test_variances_near_the_end_of_float32(norm, shape, given, step, device):
    """The square of the sum of deviations passes it, the sum of their squares does not."""
    x = torch.zeros(shape, device=device)
    # a program takes its deviations from the mean of its first tile
    x.view(shape[0], -1, step)[:, 1::2] = 1e17
    y = getattr(ops, norm)(x, *given)
    expected = getattr(F, norm)(x.double(), *given)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
