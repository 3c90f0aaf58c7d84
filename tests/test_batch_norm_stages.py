"""Batch norm in stages: parts of a batch, with reductions between them, are the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import ops
from tritorch.ops import batch_norm_stages as stages
from tritorch.ops import batch_norm_stats as statistics

pytestmark = pytest.mark.interpret

# images of each part of the batch
PARTS = {"two": (2, 3), "empty": (4, 0, 1)}
WHOLE = (5, 6, 3, 5)


def on_every_part(inputs, residuals, grads, given, activation):
    """What two devices would do, each loop one stage, each stack or sum one reduction."""
    weight, bias, eps = given["weight"], given["bias"], 1e-5
    moments = torch.stack([statistics.batch_norm_moments(x) for x in inputs])
    mean, var = statistics.batch_norm_gather_stats(
        moments, given["running_mean"], given["running_var"], 0.1
    )
    outputs = [
        stages.batch_norm_elemt(x, r, mean, var, weight, bias, eps, activation) if x.numel() else x
        for x, r in zip(inputs, residuals, strict=True)
    ]
    counts = moments[:, 2].sum(0)
    own, masked = zip(
        *[
            stages.batch_norm_backward_reduce(g, y, x, mean, var, weight, bias, eps, activation)
            if x.numel()
            else (torch.zeros_like(moments[0, :2]), x)
            for g, y, x in zip(grads, outputs, inputs, strict=True)
        ],
        strict=True,
    )
    total = torch.stack(own).sum(0)
    # the count of all as one device knows it, and as none does
    known = [(total, int(counts[0])), (total / counts, 1)]
    grad_inputs = [
        [
            stages.batch_norm_backward_elemt(
                g, x, mean, var, weight, bias, sums, count, x.stride(), eps, None
            )
            if x.numel()
            else x
            for g, x in zip(masked, inputs, strict=True)
        ]
        for sums, count in known
    ]
    return outputs, [*map(torch.cat, grad_inputs)], torch.cat(masked), total


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_parts_of_a_batch_make_the_whole(parts, memory_format, device):
    torch.manual_seed(0)
    x, residual, grad = (
        torch.randn(WHOLE, dtype=torch.float64).contiguous(memory_format=memory_format).to(device)
        for _ in range(3)
    )
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = torch.rand(4, WHOLE[1], dtype=torch.float64).add_(0.5).to(device)
    given = dict(zip(names, vectors, strict=True))

    whole = {name: value.clone() for name, value in given.items()}
    leaves = [x.clone(), whole["weight"], whole["bias"], residual.clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = ops.batch_norm(leaves[0], **whole, training=True, activation="relu", residual=leaves[3])
    expected = torch.autograd.grad(y, leaves, grad)

    split = (tensor.split(parts) for tensor in (x, residual, grad))
    outputs, grad_inputs, grad_residual, sums = on_every_part(*split, given, "relu")
    assert_close(torch.cat(outputs), y)
    for grad_input in grad_inputs:
        assert_close(grad_input, expected[0])
    assert_close(sums[1], expected[1])
    assert_close(sums[0], expected[2])
    assert_close(grad_residual, expected[3])
    for name in ("running_mean", "running_var"):
        assert not torch.equal(given[name], given["weight"])
        assert_close(given[name], whole[name].detach())


def test_moments_are_float32_of_far_halves(device):
    """Mean and deviations of a part where float16's own would be lost, merged in any number."""
    torch.manual_seed(0)
    x = (torch.randn(40, 3) * 0.5 + 1000).half().to(device)
    moments = torch.stack([statistics.batch_norm_moments(part) for part in x.split(7)])
    mean, var = statistics.batch_norm_gather_stats(moments, None, None, 0.0)
    assert mean.dtype == torch.float32
    assert_close(moments[:, 2, 0], torch.tensor([7.0] * 5 + [5.0], device=device))
    expected = torch.var_mean(x.double(), 0, correction=0)
    assert_close(var.double(), expected[0], rtol=1e-5, atol=0.0)
    assert_close(mean.double(), expected[1], rtol=1e-6, atol=0.0)


def test_stages_pass_opcheck(device):
    x, vector = torch.randn(4, 3, 2, device=device), torch.rand(3, device=device) + 0.5
    ours = torch.ops.tritorch
    torch.library.opcheck(ours.batch_norm_moments.default, (x,))
    moments = statistics.batch_norm_moments(x)[None]
    torch.library.opcheck(ours.batch_norm_gather_stats.default, (moments, vector, vector + 1, 0.1))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_variances_near_the_end_of_float32(order, device):
    """The square of the sum of deviations passes it, the sum of their squares does not."""
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e18
    x = x.to(device).contiguous(memory_format=order)
    y = ops.batch_norm(x, None, None, training=True)
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
