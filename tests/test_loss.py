"""Losses at the values where formulas break, and what a spec's samples cannot say."""

import pytest
import torch
import torch.nn.functional as F

from tests.losses import INF, NAN, check
from tests.losses import fallbacks as fallbacks
from tests.losses import kernels_only as kernels_only
from tritorch import ops
from tritorch.ops import loss as loss_ops

pytestmark = pytest.mark.interpret

BROADCASTING = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


@pytest.mark.parametrize("smaller", [(1, 3), (3,), (4, 1), ()], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", BROADCASTING)
def test_broadcasts_with_torchs_warning(name, smaller, reduction, device):
    pair = torch.randn(4, 3, device=device), torch.randn(smaller, device=device)
    for input, target in (pair, pair[::-1]):
        found = []
        for function in (getattr(ops, name), getattr(F, name)):
            leaves = [t.clone().requires_grad_() for t in (input, target)]
            with pytest.warns(UserWarning, match="Using a target size") as warned:
                result = function(*leaves, reduction=reduction)
            result.sum().backward()
            found.append((result, *(leaf.grad for leaf in leaves)))
            messages = [str(warning.message) for warning in warned]
            # the line that called the op
            assert [warning.filename for warning in warned] == [__file__]
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected)
        assert len(messages) == 1


def test_mse_loss_broadcasts_in_one_graph(device):
    input, target = torch.randn(4, 3, device=device), torch.randn(1, 3, device=device)
    compiled = torch.compile(ops.mse_loss, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="Using a target size"):
        expected = F.mse_loss(input, target)
    torch.testing.assert_close(compiled(input, target), expected)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("other", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mse_loss_promotes(dtype, other, device):
    values = torch.tensor([0.0, 1.0, 1.0], device=device)
    one, two = torch.tensor([0.5, 0.25, 2.0], device=device).to(dtype), values.to(other)
    for input, target in ((one, two), (two, one)):
        assert_same(ops.mse_loss(input, target), F.mse_loss(input, target))


def assert_same(value, expected):
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected)


def test_binary_cross_entropy_at_the_edges(device):
    """Logarithms stop at -100, and the gradient at 1e12."""
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-30], device=device, requires_grad=True)
    y = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], device=device, requires_grad=True)
    losses = ops.binary_cross_entropy(x, y, reduction="none")
    losses.sum().backward()
    assert losses[:4].tolist() == [0.0, 100.0, 100.0, 0.0]
    a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
    F.binary_cross_entropy(a, b, reduction="sum").backward()
    torch.testing.assert_close(x.grad, a.grad, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(y.grad, b.grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["input", "target"])
@pytest.mark.parametrize("wrong", [-0.5, 1.5, NAN])
def test_what_is_no_probability(name, wrong, device, monkeypatch):
    """An error where the host may look, NaN in the loss and in the gradient where it does not."""
    arguments = {k: torch.tensor([0.25, 0.5], device=device) for k in ("input", "target")}
    arguments[name][1] = wrong
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"all elements of {name} must be between 0 and 1"):
            ops.binary_cross_entropy(**arguments)
    monkeypatch.setattr(loss_ops, "_check_probabilities", lambda *arguments: None)
    for value in arguments.values():
        value.requires_grad_()
    losses = ops.binary_cross_entropy(**arguments, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True]
    for value in arguments.values():
        assert value.grad.isnan().tolist() == [False, True]


@pytest.mark.parametrize("pos_weight", [None, 0.0, 0.5, 1.0, 2.0])
def test_special_logits_of_binary_cross_entropy(pos_weight, device):
    logits = [INF, INF, INF, -INF, -INF, -INF, NAN, 80.0, -80.0, 200.0, -200.0, -0.0]
    target = [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0, -1.0, 2.0, 1.0, 0.0, 0.0]
    check(
        "binary_cross_entropy_with_logits",
        input=torch.tensor(logits, device=device),
        target=torch.tensor(target, device=device),
        reduction="none",
        pos_weight=None if pos_weight is None else torch.tensor(pos_weight, device=device),
    )


def test_small_losses_of_logits_keep_their_digits(device):
    """exp(-20) is below the rounding of 1, and still the loss."""
    logits = torch.tensor([-20.0, 20.0], device=device, requires_grad=True)
    target = torch.tensor([0.0, 1.0], device=device)
    losses = ops.binary_cross_entropy_with_logits(logits, target, reduction="none")
    losses.sum().backward()
    exact = torch.tensor(20.0).double().neg().exp().float()
    torch.testing.assert_close(losses.cpu(), exact.expand(2), rtol=4e-6, atol=0.0)
    torch.testing.assert_close(logits.grad.cpu().abs(), exact.expand(2), rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4096, 4097, 3 * 4096 + 5])
def test_total_of_partial_sums(count, weighted, device):
    """Integers add up exactly, over one round of programs or two."""
    partial = torch.randint(-8, 9, (2, count), device=device).float()
    result = torch.full((), NAN, device=device)
    denominator = torch.full((), NAN, device=device) if weighted else None
    loss_ops.total(partial if weighted else partial[:1], result, 1, denominator)
    expected = partial.double().sum(1)
    if weighted:
        assert denominator == expected[1]
        expected = expected / expected[1]
    torch.testing.assert_close(result.double(), expected[0], rtol=1e-6, atol=0.0, equal_nan=True)


TWICE = {
    "cross_entropy": ops.cross_entropy,
    "binary_cross_entropy": ops.binary_cross_entropy,
    "binary_cross_entropy_with_logits": ops.binary_cross_entropy_with_logits,
    "smooth_l1_loss": ops.smooth_l1_loss,
    "huber_loss": ops.huber_loss,
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", TWICE)
def test_derivatives_of_third_order(name, reduction, device):
    """By input and target, each path of them, and by the gradient that comes in."""
    torch.manual_seed(4)
    target = torch.rand(3, 4, dtype=torch.float64).softmax(1)
    more = {}
    if name == "cross_entropy":
        more = {"label_smoothing": 0.1, "weight": torch.rand(4, dtype=torch.float64).to(device)}
    elif name.startswith("binary"):
        more = {"weight": torch.rand(3, 4, dtype=torch.float64).to(device)}
    found = []
    for function in (TWICE[name], getattr(F, name)):
        leaves = [
            value.to(device).requires_grad_()
            for value in (torch.linspace(0.1, 0.8, 12, dtype=torch.float64).view(3, 4), target)
        ]
        value = function(*leaves, reduction=reduction, **more)
        grad = torch.linspace(0.5, 1, value.numel(), device=device, dtype=torch.float64)
        leaves.append(grad.view(value.shape).requires_grad_())
        derived = torch.autograd.grad(value, leaves[:2], leaves[2], create_graph=True)
        for _ in range(2):
            total = sum((one * torch.sin(one)).sum() for one in derived)
            derived = torch.autograd.grad(total, leaves, create_graph=True)
            found.append(derived)
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TWICE)
def test_products_with_the_hessian(name, device):
    """torch asks for them by a gradient of a gradient that it differentiates once more."""
    x = torch.linspace(0.1, 0.8, 12, device=device).view(3, 4)
    target = x.flip(1).softmax(1)
    found = [
        torch.autograd.functional.hvp(lambda x, f=f: f(x, target), x, torch.cos(x))[1]
        for f in (TWICE[name], getattr(F, name))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", TWICE)
def test_a_gradient_penalty_is_torchs(name, device):
    target = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.6, 0.1]], device=device)
    penalties = []
    for function in (TWICE[name], getattr(F, name)):
        x = torch.linspace(0.15, 0.9, 6, device=device).view(2, 3).requires_grad_()
        value = function(x, target)
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (value + grad.square().sum()).backward()
        penalties.append(x.grad)
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("x", [0.0, 1.0, 1e-30])
def test_second_derivative_of_binary_cross_entropy_at_the_edges(x, target, device):
    found = []
    for function in (ops.binary_cross_entropy, F.binary_cross_entropy):
        leaf = torch.tensor([x], device=device, requires_grad=True)
        value = function(leaf, torch.tensor([target], device=device))
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        found += torch.autograd.grad(grad, leaf)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("function", ["l1_loss", "smooth_l1_loss", "huber_loss"])
def test_distances_where_a_square_ends(function, device):
    """0, the ends of the square, infinities, NaN; derivatives at them are torch's choice."""
    differences = [0.0, -0.0, 1.0, -1.0, 0.5, -2.0, INF, -INF, NAN]
    found = []
    for module in (ops, F):
        x = torch.tensor(differences, device=device, requires_grad=True)
        y = torch.zeros_like(x, requires_grad=True)
        losses = getattr(module, function)(x, y, reduction="none")
        first = torch.autograd.grad(losses.sum(), (x, y), create_graph=True)
        # torch's of l1_loss have no memory
        second = [torch.zeros_like(x)] * 2
        if function != "l1_loss":
            second = torch.autograd.grad(first[0].sum(), (x, y))
        found.append([losses, *first, *second])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ["l1_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float64, torch.int64)])
def test_distances_promote_as_torchs(name, pair, device, fallbacks):
    """Where torch's result is not what the dtypes promote to, it is torch's."""
    for dtypes in (pair, pair[::-1]):
        x, y = (
            torch.tensor([2.0, -1.0, 0.0], device=device).to(dtypes[0]),
            torch.tensor([1.0, 3.0, 0.0], device=device).to(dtypes[1]),
        )
        results = []
        for module in (ops, F):
            try:
                results.append(getattr(module, name)(x, y))
            except RuntimeError as error:
                results.append(str(error))
        if isinstance(results[1], str):
            assert results[0] == results[1]
        else:
            assert_same(*results)


def test_smooth_l1_without_a_square_is_l1(device):
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 3, device=device)
    assert_same(ops.smooth_l1_loss(x, y, beta=0.0), ops.l1_loss(x, y))
    with pytest.raises(RuntimeError, match="beta must be at least 0"):
        ops.smooth_l1_loss(x, y, beta=NAN)
    with pytest.raises(RuntimeError, match="delta must be above 0"):
        ops.huber_loss(x, y, delta=NAN)
