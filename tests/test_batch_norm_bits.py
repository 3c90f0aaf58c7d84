"""Batch norm with a residual and ReLU in up to 32 bits, which keeps one bit of each output."""

import math

import pytest
import torch
from torch.testing import assert_close

import tritorch
from tritorch import launch, ops
from tritorch.ops import batch_norm_function, strided
from tritorch.ops import batch_norm_stages as stages

pytestmark = pytest.mark.interpret

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPE = (2, 64, 3, 5)


def images(shape, dtype, device):
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def vectors(channels, device):
    return torch.rand(4, channels, device=device).add_(0.5).unbind()


def step(x, residual, grad, given, training=True):
    """Output, running statistics and all gradients."""
    mean, var = (one.clone() for one in given[:2])
    leaves = [one.detach().requires_grad_() for one in (x, *given[2:], residual)]
    y = ops.batch_norm(
        leaves[0], mean, var, *leaves[1:3], training, activation="relu", residual=leaves[3]
    )
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad)]


def of_output(monkeypatch, *arguments):
    """The same of a gradient that goes by the output."""
    with monkeypatch.context() as patched:
        patched.setattr(batch_norm_function, "keeps_bits", lambda *arguments: False)
        return step(*arguments)


def kept(call):
    """All tensors that autograd keeps, each memory once."""
    found = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.setdefault(t.data_ptr(), t), lambda t: t
    ):
        call()
    return list(found.values())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [SHAPE, (7, 128), (3, 128, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients(dtype, shape, training, device):
    torch.manual_seed(0)
    given = [one.to(torch.promote_types(dtype, one.dtype)) for one in vectors(shape[1], device)]
    x, residual, grad = (
        images(shape, dtype, device) if len(shape) == 4 else torch.randn(shape).to(device, dtype)
        for _ in range(3)
    )
    found = step(x, residual, grad, given, training)
    with tritorch.backend.use("reference"):
        doubles = [one.double() for one in (x, residual, grad)]
        expected = step(*doubles, [one.double() for one in given], training)
    eps = torch.finfo(dtype).eps
    for ours, truth in zip(found, expected, strict=True):
        # a gradient of the input is a difference of terms larger than itself
        assert_close(ours.double(), truth, rtol=2 * eps, atol=2 * eps + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_is_an_eighth_of_a_byte(dtype, device):
    """Of each element, besides the input and what there is of each channel."""
    given = vectors(64, device)
    x, residual, grad = (images(SHAPE, dtype, device) for _ in range(3))
    found = kept(lambda: step(x, residual, grad, given))
    large = [one for one in found if one.numel() > 64]
    assert sorted((one.dtype, one.numel()) for one in large if one.dtype != dtype) == [
        (torch.uint8, x.numel() // 8)
    ]
    assert [one.data_ptr() for one in large if one.dtype == dtype] == [x.data_ptr()]


@pytest.mark.parametrize("case", ["nothing", "residual", "evaluation", "float64", "contiguous"])
def test_no_bits_are_written_where_no_gradient_takes_them(case, device, monkeypatch):
    def written(*arguments):
        raise AssertionError("bits that nobody reads")

    monkeypatch.setattr(batch_norm_function, "batch_norm_elemt_bits", written)
    dtype = torch.float64 if case == "float64" else torch.float16
    mean, var, weight, bias = (
        one.to(torch.promote_types(dtype, torch.float32)) for one in vectors(64, device)
    )
    x, residual = (images(SHAPE, dtype, device) for _ in range(2))
    if case == "contiguous":
        x = x.contiguous()
    for leaf in {"nothing": (), "residual": (residual,)}.get(case, (x, residual)):
        leaf.requires_grad_()
    training = case != "evaluation"
    y = ops.batch_norm(x, mean, var, weight, bias, training, activation="relu", residual=residual)
    if y.requires_grad:
        assert residual.requires_grad
        (grad,) = torch.autograd.grad(y.sum(), residual)
        assert torch.equal(grad != 0, y > 0)


def test_zero_nan_infinity_and_underflow(device, monkeypatch):
    """By the output as it is stored: 1e-9 is 0 in float16, and NaN lets a gradient pass."""
    values = [math.nan, 0.0, -0.0, -math.inf, math.inf, -1.0, 1.0, 6e-8]
    passing = [2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 2.0, 2.0]
    residual = torch.tensor(values * 16, dtype=torch.float16, device=device).view(2, 64)
    x, grad = torch.ones_like(residual), torch.full_like(residual, 2.0)
    zero, one = torch.zeros(64, device=device), torch.ones(64, device=device)
    *_, grad_residual = step(x, residual, grad, (zero, one, 1e-9 * one, zero), False)
    assert grad_residual.tolist() == [passing * 8] * 2
    # a gradient that is stopped is zero, whatever it was
    results = [
        take(x, residual, torch.full_like(grad, math.nan), (zero, one, one, zero), False)
        for take in (step, lambda *arguments: of_output(monkeypatch, *arguments))
    ]
    assert results[0][-1].isnan().any()
    assert_close(*results, rtol=0, atol=0, equal_nan=True)


GRADIENTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "transposed": lambda shape: torch.randn(*shape[:2], shape[3], shape[2]).mT,
    "reversed": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
    "every-other": lambda shape: torch.randn(*shape[:3], 2 * shape[3])[..., 1::2],
    "expanded": lambda shape: torch.randn(shape[:2]).view(*shape[:2], 1, 1).expand(shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_of_any_strides(gradient, device):
    """The bits of one order of rows, whatever the order of what they mask."""
    torch.manual_seed(0)
    given = vectors(64, device)
    x, residual = (images(SHAPE, torch.float16, device) for _ in range(2))
    grad = gradient(SHAPE).to(device, torch.float16)
    found = step(x, residual, grad, given)
    expected = step(x, residual, grad.contiguous(memory_format=torch.channels_last), given)
    assert torch.equal(found[-1], torch.where(found[0] > 0, grad, 0.0))
    assert_close(found, expected, rtol=2e-3, atol=2e-3)


INPUTS = {
    "between-channels": lambda **of: torch.randn(2, 3, 5, 70, **of).permute(0, 3, 1, 2)[:, 3:67],
    "turned": lambda **of: torch.randn(2, 5, 3, 64, **of).permute(0, 3, 2, 1),
    "images-innermost": lambda **of: torch.randn(3, 5, 2, 64, **of).permute(2, 3, 0, 1),
    # walked along memory, its rows would be in another order than those of the output
    "expanded": lambda **of: torch.randn(3, 5, 64, **of).permute(2, 0, 1).expand(SHAPE),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_with_channels_along_memory(make, device, monkeypatch):
    torch.manual_seed(0)
    given = vectors(64, device)
    x, residual = (make(dtype=torch.float16, device=device) for _ in range(2))
    grad = torch.randn(SHAPE, dtype=torch.float16, device=device)
    assert not x.is_contiguous(memory_format=torch.channels_last)
    assert stages.keeps_bits(x, residual, "relu")
    found = step(x, residual, grad, given)
    assert torch.equal(found[-1], torch.where(found[0] > 0, grad, 0.0))
    expected = of_output(monkeypatch, x, residual, grad, given)
    assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_indices_of_64_bits(device, monkeypatch):
    torch.manual_seed(0)
    given = vectors(128, device)
    x, residual, grad = (images((2, 128, 3, 5), torch.float16, device) for _ in range(3))
    expected = step(x, residual, grad, given)
    monkeypatch.setattr(strided, "is_wide", lambda sizes, strides: True)
    # no plan that was remembered
    with launch.choices():
        found = step(x, residual, grad, given)
    assert_close(found, expected, rtol=0, atol=0)


def test_a_residual_of_other_strides(device):
    torch.manual_seed(0)
    given = vectors(64, device)
    x, residual, grad = (images(SHAPE, torch.float16, device) for _ in range(3))
    other = residual.contiguous()
    assert not stages.keeps_bits(x, other, "relu")
    results = [step(x, one, grad, given) for one in (residual, other)]
    assert_close(*results, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_gradients(training, device):
    torch.manual_seed(0)
    given = vectors(64, device)
    x, residual, grad = (images((2, 64, 2, 1), torch.float16, device) for _ in range(3))
    results = []
    for dtype, choice in ((torch.float16, "auto"), (torch.float64, "reference")):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [x.to(dtype), *(one.to(wide) for one in given[2:]), residual.to(dtype)]
        leaves = [leaf.detach().requires_grad_() for leaf in (*leaves, grad.to(dtype))]
        running = [one.to(wide) for one in given[:2]]
        with tritorch.backend.use(choice):
            y = ops.batch_norm(
                leaves[0], *running, *leaves[1:3], training, activation="relu", residual=leaves[3]
            )
            grads = torch.autograd.grad(y, leaves[:4], leaves[4], create_graph=True)
            total = sum(one.to(wide).square().sum() for one in grads)
            second = torch.autograd.grad(total, leaves, materialize_grads=True)
        results.append([one.double() for one in second])
    assert all(one.abs().sum() > 0 for one in results[0][:2])
    for ours, truth in zip(*results, strict=True):
        assert_close(ours, truth, rtol=1e-2, atol=1e-2 * truth.abs().max().item())


def test_bits_are_unpacked_as_they_were_packed(device):
    """By hand: panels of 64 channels, rows in their order, the lowest bit first."""
    torch.manual_seed(0)
    x = images((2, 128, 1, 3), torch.float16, device)
    zero, one = torch.zeros(128, device=device), torch.ones(128, device=device)
    y, bits = stages.batch_norm_elemt_bits(x, x, zero, one, None, None, 0.0, "relu")
    assert (bits.dtype, bits.shape) == (torch.uint8, (2, 6, 8))
    for panel, row, byte in ((0, 0, 0), (0, 4, 7), (1, 3, 2), (1, 5, 5)):
        first = 64 * panel + 8 * byte
        channels = y[row // 3, first : first + 8, 0, row % 3]
        assert bits[panel, row, byte] == sum(2**n for n in range(8) if channels[n] > 0)
    assert torch.equal(stages.unpacked(bits, y.shape), y > 0)


def test_the_stage_passes_opcheck(device):
    x = images((2, 64, 2, 2), torch.float16, device)
    call = torch.ops.tritorch.batch_norm_elemt_bits.default
    torch.library.opcheck(call, (x, x, *vectors(64, device), 1e-5, "relu"))
    _, bits = call(x, x, *vectors(64, device), 1e-5, "relu")
    call = torch.ops.tritorch.batch_norm_backward_reduce.default
    torch.library.opcheck(call, (x, bits, x, *vectors(64, device), 1e-5, "relu"))
