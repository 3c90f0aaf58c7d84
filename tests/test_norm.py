"""Batch norm beyond one call of one sample: what is rounded, what moves, what is aligned."""

import pytest
import torch

from tritorch import ops
from tritorch.ops import norm_stages, strided
from tritorch.ops.strided import Layout

pytestmark = pytest.mark.interpret


def arguments(device, channels=3, dtype=torch.float32):
    torch.manual_seed(0)
    names = ("running_mean", "running_var", "weight", "bias")
    return {name: torch.rand(channels, dtype=dtype).add_(0.5).to(device) for name in names}


def test_output_is_rounded_once(device):
    """The residual takes away what rounding to float16 would leave of the rest."""
    x = torch.tensor([[3e-4], [7e-4], [1.1e-3]], dtype=torch.float16, device=device)
    vector = torch.ones(1, device=device)
    y = ops.batch_norm(x, 0 * vector, vector, vector, vector, residual=-torch.ones_like(x), eps=0.0)
    torch.testing.assert_close(y.double(), x.double(), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("residual", [False, True])
def test_no_gradient_passes_where_the_output_underflows(residual, device):
    """ReLU's mask is that of the output as it is stored: 1e-9 is 0 in float16."""
    x = torch.ones(2, 1, dtype=torch.float16, device=device)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    bias = zero.clone().requires_grad_()
    y = ops.batch_norm(
        x, zero, one, 1e-9 * one, bias, activation="relu", residual=0 * x if residual else None
    )
    assert torch.equal(y, torch.zeros_like(x))
    (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert grad.item() == 0.0


def test_autograd_sees_that_running_statistics_move(device):
    given = arguments(device)
    x = torch.randn(4, 3, device=device)
    before = given["running_mean"]._version, given["running_var"]._version
    ops.batch_norm(x, **given, training=True)
    assert given["running_mean"]._version > before[0]
    assert given["running_var"]._version > before[1]


def test_a_training_step_between_leaves_the_gradient_of_evaluation(device):
    given = arguments(device)
    x = torch.randn(4, 3, device=device).requires_grad_()
    kept = {name: value.clone() for name, value in given.items()}
    y = ops.batch_norm(x, **given, activation="relu")
    ops.batch_norm(torch.randn(4, 3, device=device), **given, training=True)
    assert not torch.equal(given["running_mean"], kept["running_mean"])
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = ops.batch_norm(x, **kept, activation="relu")
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("kept", [8, 12, 20, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_vectors_are_aligned(kept, dtype):
    """The compiler is promised that every row of channels starts on a multiple of the vector."""
    images = torch.empty(2, kept + 4, 3, 5, dtype=dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)[:, :kept]
    nest = strided.nest("batch_norm", images.select(1, 0))
    rows, channels = norm_stages._vector([Layout.of(images)], nest)
    assert rows == 1
    assert channels * dtype.itemsize <= 16
    assert kept % channels == 0
    assert all(stride % channels == 0 for stride in (images.stride(0), *images.stride()[2:]))
