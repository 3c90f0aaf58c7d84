"""Pointwise convolutions on Hopper, which are matrix products: what they compute."""

import pytest
import torch
import torch.nn.functional as F

from tests.hopper_products import (
    KERNEL,
    SUM,
    assert_close,
    gradients,
    last,
    made,
    tiles,
    watched,
    with_residual,
)
from tests.hopper_products import hopper as hopper
from tritorch import ops
from tritorch.ops import conv_dispatch
from tritorch.testing import products

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(("size", "stride"), [((4, 5), 1), ((6, 4), 2)], ids=["1", "2"])
def test_pointwise_convolution_with_a_residual(form, size, stride, device):
    x, w, bias = made(device, 3, 24, *size), made(device, 40, 24, 1, 1) / 5, made(device, 40)
    residual = made(device, *F.conv2d(x.double(), w.double(), None, stride).shape)
    operands = x, w, bias, residual
    with tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(with_residual(ops.conv2d, "relu", stride=stride), operands)
    assert names.count(KERNEL) == 3
    exact = gradients(
        with_residual(F.conv2d, "relu", stride=stride), [o.double() for o in operands]
    )
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=2)
    assert found[0].is_contiguous(memory_format=last)


def test_a_split_pointwise_convolution_with_a_residual(device):
    x, w, residual = (
        made(device, 2, 528, 2, 2),
        made(device, 24, 528, 1, 1),
        made(device, 2, 24, 2, 2),
    )
    with tiles("tile", 32, 16, 32) as names, watched(device):
        found = ops.conv2d(x, w / 23, activation="relu", residual=residual)
    assert names == [KERNEL, "split_sum_kernel"]
    exact = (F.conv2d(x.double(), (w / 23).double()) + residual.double()).relu()
    assert_close(found, exact)


@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(
    ("size", "stride"), [((4, 5), 1), ((6, 4), 2), ((4, 5), 2)], ids=["1", "2", "2-odd"]
)
def test_pointwise_convolution_and_its_gradients(form, size, stride, device):
    x, w, bias = made(device, 3, 24, *size), made(device, 40, 24, 1, 1), made(device, 40)
    with tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(lambda *o: ops.conv2d(*o, stride), (x, w, bias))
    assert [name for name in names if name != "channel_sum_kernel"] == [KERNEL] * 3
    exact = gradients(lambda *o: F.conv2d(*o, stride), [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)
    assert found[0].is_contiguous(memory_format=last)
    assert found[1].is_contiguous(memory_format=last)


@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(
    ("size", "stride"), [((4, 5), 1), ((6, 4), 2), ((4, 5), 2)], ids=["1", "2", "2-odd"]
)
def test_pointwise_convolution_as_tf32(form, size, stride, device, monkeypatch):
    """The gradient of the image is a product with a copy of the filter, that of the filter a sum
    over pixels, which do not lie along memory.
    """
    monkeypatch.setattr(conv_dispatch, "_MIN_PIXELS", 0)
    x, w, bias = (
        made(device, *shape, dtype=torch.float32)
        for shape in ((3, 24, *size), (40, 24, 1, 1), (40,))
    )
    with products.allowing_tf32(), tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(lambda *o: ops.conv2d(*o, stride), (x, w, bias))
    assert names.count(KERNEL) == 2
    assert "conv2d_grad_weight_kernel" in names
    assert "conv2d_kernel" not in names
    exact = gradients(lambda *o: F.conv2d(*o, stride), [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        # the interpreter keeps all bits unless asked
        limit = 2**-9 if device == "cuda" else 2**-20
        assert (one.double() - other).abs().max() <= limit * other.abs().max()


def test_many_sums_of_a_filter_are_added_up_in_one_order(device):
    # more slices than all sums of nine have
    x, w = made(device, 5, 16, 16, 20), made(device, 72, 16, 1, 1)
    with tiles("tile", 64, 16, 16) as names:
        found, again = (gradients(ops.conv2d, (x, w)) for _ in range(2))
    assert names.count(SUM) == 2
    for one, same in zip(found, again, strict=True):
        assert torch.equal(one, same)
    exact = gradients(F.conv2d, (x.double(), w.double()))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)


def test_second_gradients_of_a_pointwise_convolution(device):
    x, w, grad = made(device, 2, 16, 4, 3), made(device, 24, 16, 1, 1), made(device, 2, 24, 2, 2)

    def twice(run, *operands):
        leaves = [o.detach().clone().requires_grad_() for o in operands]
        y = run(*leaves[:2], None, 2)
        first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        return torch.autograd.grad(first, leaves, operands[:2])

    with tiles("tile", 16, 16, 16) as names:
        found = twice(ops.conv2d, x, w, grad)
    assert set(names) == {KERNEL}
    exact = twice(F.conv2d, x.double(), w.double(), grad.double())
    for one, other in zip(found, exact, strict=True):
        # sums of two rounded terms
        assert_close(one, other, terms=3)


def test_a_transposed_convolution_with_a_bias_has_it_everywhere(device):
    """Zeros between its pixels would be wrong."""
    x, w, bias = made(device, 2, 16, 2, 2), made(device, 16, 24, 1, 1), made(device, 24)
    options = {"stride": 2, "output_padding": 1}
    with tiles("tile", 16, 16, 16) as names:
        plain = ops.conv_transpose2d(x, w, None, **options)
        shifted = ops.conv_transpose2d(x, w, bias, **options)
    assert names[0] == KERNEL
    assert KERNEL not in names[1:]
    exact = F.conv_transpose2d(x.double(), w.double(), None, **options)
    assert_close(plain, exact)
    assert_close(shifted, exact + bias.double()[:, None, None])
