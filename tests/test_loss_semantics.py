"""What torch's losses mean, by formulas written out, and where other libraries' losses go wrong.

A test named after a peer's defect reproduces the call that shows it there.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.losses import kernels_only as kernels_only
from tritorch import ops

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

INF = float("inf")


def logits(*shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def pairs(device):
    """Logits of six rows, classes of which some are 2, weights, and log-probabilities."""
    x, y = logits(6, 4, device=device), torch.tensor([0, 1, 2, 3, 2, 1], device=device)
    w = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64, device=device)
    return x, y, w, x.log_softmax(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_of_classes_divides_by_the_weights_of_those_that_count(weighted, device):
    x, y, w, log_p = pairs(device)
    kept = [0, 1, 3, 5]
    w = w if weighted else None
    factors = w[y[kept]] if weighted else torch.ones(4, dtype=torch.float64, device=device)
    each = -factors * log_p[kept, y[kept]]
    assert_close(ops.cross_entropy(x, y, w, ignore_index=2), each.sum() / factors.sum())
    assert_close(ops.nll_loss(log_p, y, w, ignore_index=2), each.sum() / factors.sum())
    for op, input in ((ops.cross_entropy, x), (ops.nll_loss, log_p)):
        losses = op(input, y, w, ignore_index=2, reduction="none")
        assert losses[[2, 4]].tolist() == [0.0, 0.0]
        assert_close(losses[kept], each)


def test_where_all_are_ignored(device):
    x, y, _, log_p = pairs(device)
    for op, input in ((ops.cross_entropy, x), (ops.nll_loss, log_p)):
        leaf = input.clone().requires_grad_()
        loss = op(leaf, torch.full_like(y, -100))
        loss.backward()
        assert math.isnan(loss.item())
        assert leaf.grad.tolist() == [[0.0] * 4] * 6
        assert op(input, torch.full_like(y, -100), reduction="sum").item() == 0


def test_smoothing_of_weighted_classes_shares_their_denominator(device):
    x, y, w, log_p = pairs(device)
    a, count = 0.3, 4
    nll = -(w[y] * log_p[torch.arange(6), y]).sum()
    smooth = -(w * log_p).sum()
    expected = ((1 - a) * nll + a / count * smooth) / w[y].sum()
    assert_close(ops.cross_entropy(x, y, w, label_smoothing=a), expected)


def test_probabilities_divide_by_the_number_of_rows(device):
    x, _, w, log_p = pairs(device)
    p, a = logits(6, 4, device=device, seed=1).softmax(1), 0.3
    expected = -(w * ((1 - a) * p + a / 4) * log_p).sum() / 6
    assert_close(ops.cross_entropy(x, p, w, label_smoothing=a), expected)
    images, targets = x.view(2, 3, 4).mT, p.view(2, 3, 4).mT
    # of every place
    found = ops.cross_entropy(images, targets, w, label_smoothing=a)
    assert_close(found, expected)


def test_an_empty_batch(device):
    for op in (ops.cross_entropy, ops.nll_loss):
        x, y = torch.ones(0, 3, device=device), torch.ones(0, dtype=torch.int64, device=device)
        assert math.isnan(op(x, y).item())
        assert op(x, y, reduction="sum").item() == 0
        assert op(x, y, reduction="none").shape == (0,)


def test_logits_of_minus_infinity(device):
    y = torch.tensor([0], device=device)
    rows = {"target": [-INF, 0.0], "all": [-INF, -INF], "other": [0.0, -INF]}
    x = {name: torch.tensor([row], device=device) for name, row in rows.items()}
    assert ops.cross_entropy(x["target"], y).item() == INF
    assert math.isnan(ops.cross_entropy(x["all"], y).item())
    assert ops.cross_entropy(x["other"], y).item() == 0
    assert ops.cross_entropy(x["other"], y, label_smoothing=0.1).item() == INF


@pytest.mark.parametrize("shift", [-1024.0, 4096.0])
def test_cross_entropy_does_not_depend_on_where_logits_lie(shift, device):
    # quarters, which float32 holds there too
    x = torch.randint(-8, 9, (5, 33), device=device).float() / 4
    y = torch.arange(5, device=device)
    assert torch.equal(ops.cross_entropy(x + shift, y), ops.cross_entropy(x, y))


@pytest.mark.parametrize("classes", [1, 1024, 50257])
def test_memory_does_not_grow_with_the_classes(classes, device):
    """Rows of any length: no program holds one."""
    x = torch.zeros(2, classes, device=device, requires_grad=True)
    loss = ops.cross_entropy(x, torch.tensor([0, classes - 1], device=device))
    loss.backward()
    assert_close(loss.item(), math.log(classes), rtol=1e-6, atol=1e-7)
    expected = torch.full((2, classes), 0.5 / classes, device=device)
    expected[0, 0] -= 0.5
    expected[1, -1] -= 0.5
    assert_close(x.grad, expected)


def test_the_gradient_of_a_mean_square_divides_before_it_doubles(device):
    """Twice the difference is no float32; torch's CPU multiplies it by 2 / N as well."""
    x = torch.tensor([3e38, 1.0, -2.0, 0.5], device=device, requires_grad=True)
    y = torch.zeros(4, device=device, requires_grad=True)
    grad_x, grad_y = torch.autograd.grad(ops.mse_loss(x, y), (x, y))
    expected = [1.5e38, 0.5, -1.0, 0.25]
    assert_close(grad_x, torch.tensor(expected, device=device))
    assert_close(grad_y, -grad_x)


DISTANCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_of_nothing_and_of_equal_values(name, device):
    """The mean of nothing is NaN, its sum zero; where two values meet the gradient is zero."""
    op, nothing = getattr(ops, name), torch.ones(0, 3, device=device)
    assert math.isnan(op(nothing, nothing).item())
    assert op(nothing, nothing, reduction="sum").item() == 0
    leaf = torch.tensor([1.0, -2.0, 0.0, -0.0], device=device).requires_grad_()
    op(leaf, leaf.detach().abs() * leaf.detach().sign(), reduction="sum").backward()
    assert leaf.grad.tolist() == [0.0] * 4


def test_binary_cross_entropy_stops_at_a_hundred(device):
    x = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device, requires_grad=True)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    losses = ops.binary_cross_entropy(x, y, reduction="none")
    losses.sum().backward()
    assert losses.tolist() == [100.0, 100.0, 0.0, 0.0]
    assert_close(x.grad.cpu(), torch.tensor([-1e12, 1e12, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_binary_cross_entropy_takes_no_integers(dtype, device):
    x, y = torch.full((3,), 0.5, device=device), torch.ones(3, device=device).to(dtype)
    for function in (ops.binary_cross_entropy, F.binary_cross_entropy):
        with pytest.raises(RuntimeError, match=r"dtype|Float"):
            function(x, y)


# the sums of rows send back one number for all their elements, in a tensor without memory for it
EXPANDED = [lambda ones: ones.expand(4, 4).flatten(), lambda ones: ones.expand(16)]


@pytest.mark.parametrize("expand", EXPANDED, ids=["flattened", "expanded"])
@pytest.mark.parametrize("name", DISTANCES)
def test_peer_defect_4_a_gradient_without_strides_is_read_in_line(name, expand, device):
    x, y = logits(16, device=device), logits(16, device=device, seed=1)
    grads = []
    for module in (ops, F):
        leaf = x.clone().requires_grad_()
        losses = getattr(module, name)(leaf, y, reduction="none")
        losses.backward(expand(torch.full((), 2.0, dtype=torch.float64, device=device)))
        grads.append(leaf.grad)
    assert_close(*grads)


def test_peer_defect_12_the_running_maximum_starts_at_zero(device):
    """Of logits near -300 nothing is left then, and the loss is NaN."""
    x = torch.tensor([[-300.0, -301.0, -302.0], [-310.0, -300.0, -305.0]], device=device)
    y = torch.tensor([0, 2], device=device)
    assert_close(ops.cross_entropy(x, y), F.cross_entropy(x, y))
    soft = torch.full_like(x, 1 / 3)
    assert_close(ops.cross_entropy(x, soft), F.cross_entropy(x, soft))


@pytest.mark.parametrize("ignored", [-100, -1, 7, 2**40])
def test_peer_defect_13_an_ignored_class_is_read_out_of_bounds(ignored, device):
    x = logits(4, 5, device=device)
    y = torch.tensor([1, ignored, 4, ignored], device=device)
    for ours, torchs in ((ops.cross_entropy, F.cross_entropy), (ops.nll_loss, F.nll_loss)):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        loss = ours(leaves[0], y, ignore_index=ignored)
        expected = torchs(leaves[1], y, ignore_index=ignored)
        loss.backward()
        expected.backward()
        assert_close((loss, leaves[0].grad), (expected, leaves[1].grad))
        assert leaves[0].grad[[1, 3]].tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_peer_defect_16_autocast_returns_another_half_precision(half, device):
    """A loss is float32, its gradient of the type of what came in."""
    x = logits(4, 5, device=device).to(half)
    calls = {
        "cross_entropy": torch.arange(4, device=device),
        "nll_loss": torch.arange(4, device=device),
        "mse_loss": torch.zeros_like(x),
        "huber_loss": torch.zeros_like(x),
        "binary_cross_entropy_with_logits": torch.zeros_like(x),
    }
    for name, target in calls.items():
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, dtype=half):
            loss = getattr(ops, name)(leaf, target)
        loss.backward()
        assert (loss.dtype, leaf.grad.dtype) == (torch.float32, half), name
