"""Cross entropy at the logits, classes and weights where its formula breaks, in every tile."""

import pytest
import torch
import torch.nn.functional as F

from tests.losses import INF, NAN, check
from tests.losses import fallbacks as fallbacks
from tests.losses import kernels_only as kernels_only
from tritorch import launch, ops
from tritorch.kernels.cross_entropy import CROSS_ENTROPY_CONFIGS
from tritorch.kernels.cross_entropy_second import CROSS_ENTROPY_SECOND_CONFIGS
from tritorch.ops import classes
from tritorch.registry import Maker

pytestmark = pytest.mark.interpret

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
