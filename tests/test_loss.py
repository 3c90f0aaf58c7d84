"""Losses at the values where formulas break, and what a spec's samples cannot say."""

import pytest
import torch
import torch.nn.functional as F

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import backend, launch, ops
from tritorch.kernels.cross_entropy import CROSS_ENTROPY_CONFIGS
from tritorch.kernels.cross_entropy_second import CROSS_ENTROPY_SECOND_CONFIGS
from tritorch.ops import classes
from tritorch.ops import loss as loss_ops
from tritorch.registry import Maker, specs
from tritorch.testing import cases

pytestmark = pytest.mark.interpret

NAN, INF = float("nan"), float("inf")
LOGITS = {
    "minus-infinity": [-INF, 0.0, 1.0],
    "all-minus-infinity": [-INF, -INF, -INF],
    "all-but-one-minus-infinity": [0.0, -INF, -INF],
    "infinity": [INF, 0.0, 0.0],
    "infinity-elsewhere": [0.0, INF, 0.0],
    "minus-infinity-elsewhere": [0.0, -INF, 0.0],
    "two-infinities": [INF, INF, 0.0],
    "both-infinities": [INF, -INF, 0.0],
    "nan": [NAN, 0.0, 0.0],
    "nan-elsewhere": [0.0, 0.0, NAN],
    "large": [1e35, -1e35, 0.0],
    "far-below-zero": [-300.0, -301.0, -302.0],
}


@pytest.fixture(autouse=True)
def kernels_only():
    backend.reset()
    yield
    assert backend.explain() == {}


@pytest.fixture
def fallbacks(kernels_only):
    """The counts of calls that left the kernels, forgotten afterwards."""
    yield backend.explain
    backend.reset()


def check(name, **arguments):
    """The op agrees with its reference in float64, NaN and infinities included."""
    spec = next(spec for spec in specs() if spec.name == name)
    found = cases.verdicts(spec, arguments, cases.random_gradient(name))
    failures = [f"{what}: {verdict.failure}" for what, verdict in found if not verdict.accepted]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", LOGITS.values(), ids=LOGITS)
def test_cross_entropy_of_special_logits(row, smoothing, reduction, device):
    check(
        "cross_entropy",
        input=torch.tensor([row, [0.0, 1.0, 2.0]], device=device),
        target=torch.tensor([0, 2], device=device),
        reduction=reduction,
        label_smoothing=smoothing,
    )


@pytest.mark.parametrize("probabilities", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.2, 0.3]])
@pytest.mark.parametrize("row", LOGITS.values(), ids=LOGITS)
def test_probabilities_of_special_logits(row, probabilities, device):
    check(
        "cross_entropy",
        input=torch.tensor([row, [0.0, 1.0, 2.0]], device=device),
        target=torch.tensor([probabilities, [0.2, 0.3, 0.5]], device=device),
        reduction="none",
    )


@pytest.mark.parametrize("row", LOGITS.values(), ids=LOGITS)
def test_ignored_and_weightless_rows_of_special_logits(row, device):
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], device=device)
    weight = torch.tensor([0.0, 1.0, 2.0], device=device)
    target = torch.tensor([0, 2], device=device)
    check("cross_entropy", input=logits, target=target, ignore_index=0)
    check("cross_entropy", input=logits, target=target, weight=weight)


def test_all_weights_zero_is_nan(device):
    check(
        "cross_entropy",
        input=torch.randn(4, 3, device=device),
        target=torch.tensor([0, 1, 2, 1], device=device),
        weight=torch.zeros(3, device=device),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9, 1031), (5, 1040), (130, 21), (3, 21, 50)], ids=str)
@pytest.mark.parametrize("config", CROSS_ENTROPY_CONFIGS, ids=str)
def test_every_tile_computes_cross_entropy(config, shape, dtype, device):
    """A tile that selection does not choose for a shape is still right for it."""
    make = Maker(dtype, device)
    with launch.override("cross_entropy_config", config):
        check(
            "cross_entropy",
            input=make(*shape),
            target=make.classes(shape[0], *shape[2:], count=shape[1]),
            weight=make(shape[1], low=0.5, high=2.0),
            label_smoothing=0.1,
        )


def second_gradients(function, arguments, names):
    """Of the square of every gradient; each is a mixture of all second derivatives."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    losses = function(**arguments | leaves)
    weights = torch.linspace(0.5, 2.0, max(losses.numel(), 1)).to(losses).view(losses.shape)
    incoming = weights.requires_grad_()
    inputs = [*leaves.values(), incoming]
    first = torch.autograd.grad(losses, list(leaves.values()), incoming, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classed", [True, False], ids=["classes", "probabilities"])
@pytest.mark.parametrize("config", CROSS_ENTROPY_SECOND_CONFIGS, ids=str)
def test_every_tile_computes_second_gradients(config, classed, reduction, device):
    make = Maker(torch.float64, device)
    arguments = {"input": make(3, 21, 7), "weight": make(21, low=0.5, high=2.0)}
    arguments |= {"reduction": reduction, "label_smoothing": 0.1}
    if classed:
        arguments |= {"target": make.classes(3, 7, count=21), "ignore_index": 20}
        arguments["target"][0, :2] = 20
    else:
        arguments["target"] = make(3, 21, 7, low=0.0, high=0.1)
    names = ("input",) if classed else ("input", "target")
    with launch.override("cross_entropy_second_config", config):
        found = second_gradients(ops.cross_entropy, arguments, names)
    expected = second_gradients(F.cross_entropy, arguments, names)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_class_out_of_range(wrong, device):
    target = torch.tensor([0, wrong], device=device)
    logits = torch.randn(2, 3, device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"cross_entropy: target {wrong} is out of bounds"):
            ops.cross_entropy(logits, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_class_out_of_range_is_nan_where_nobody_waits(wrong, smoothing, device, monkeypatch):
    """On a GPU the host does not look at classes: the loss of the row and its gradient are NaN."""
    monkeypatch.setattr(classes, "check_range", lambda *arguments: None)
    logits = torch.randn(2, 3, device=device, requires_grad=True)
    target = torch.tensor([0, wrong], device=device)
    losses = ops.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True]
    assert logits.grad.isnan().all(1).tolist() == [False, True]
    assert ops.cross_entropy(logits, target, label_smoothing=smoothing).isnan()


def test_ignore_index_is_compared_beyond_a_byte(device):
    """-100 and 156 are the same byte."""
    logits = torch.randn(2, 200, device=device)
    target = torch.tensor([156, 3], dtype=torch.uint8, device=device)
    check("cross_entropy", input=logits, target=target, reduction="none")
    if device == "cpu":
        with pytest.raises(IndexError, match="target 156 is out of bounds"):
            ops.cross_entropy(logits[:, :100], target)


def test_logits_are_only_read(device):
    logits = torch.randn(4, 3, device=device, requires_grad=True)
    before = logits.detach().clone()
    ops.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=device)).backward()
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_cross_entropy_declines_and_says_why(device, fallbacks):
    weight = torch.ones(3, device=device, requires_grad=True)
    logits, target = torch.randn(4, 3, device=device), torch.rand(4, 3, device=device)
    ops.cross_entropy(logits, target, weight).backward()
    assert weight.grad is not None
    ignored = torch.full((4,), -100, device=device)
    assert ops.cross_entropy(logits[:, :0], ignored, reduction="sum") == 0
    reasons = {"a weight that requires a gradient": 1, "no classes": 1}
    assert fallbacks() == {"cross_entropy": reasons}


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


@pytest.mark.parametrize("name", TWICE)
def test_a_third_derivative_is_refused(name, device):
    """Left out of the graph it would be missing without a word."""
    x = torch.rand(2, 3, device=device, requires_grad=True)
    value = TWICE[name](x, torch.full((2, 3), 1 / 3, device=device))
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}.*differentiable no more"):
        second.sum().backward()


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
