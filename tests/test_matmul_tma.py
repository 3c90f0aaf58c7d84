"""What matrix products on Hopper compute: operands of any order, linear layers, residuals."""

import pytest
import torch
import torch.nn.functional as F

from tests.hopper_products import (
    KERNEL,
    PARTS,
    along,
    assert_close,
    configs,
    gradients,
    made,
    tiles,
    watched,
    with_residual,
)
from tests.hopper_products import hopper as hopper
from tritorch import ops
from tritorch.ops import stream_k

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("form", ["tile", "persistent", "stream-k"])
@pytest.mark.parametrize("layouts", ["NN", "NT", "TN", "TT"])
def test_operands_of_either_order(form, layouts, device):
    a, b = made(device, 2, 40, 40), made(device, 2, 40, 24)
    a, b = (along(x, order == "T") for x, order in zip((a, b), layouts, strict=True))
    with tiles(form, 32, 16, 32) as names, watched(device):
        y = ops.matmul(a, b)
    assert names == ([KERNEL, PARTS] if form == "stream-k" else [KERNEL])
    assert_close(y, a.double() @ b.double())


@pytest.mark.parametrize("programs", [1, 2, 5, 8, 13, 21, 40])
def test_programs_that_share_tiles(programs, device):
    """Of eight tiles of five slices: shares of several tiles, of one each, and of one slice."""
    a, b = made(device, 56, 80), made(device, 80, 24)
    with (
        tiles("stream-k", 16, 16, 16, pieces=4) as names,
        watched(device),
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(stream_k, "num_programs", lambda *_: programs)
        y = ops.matmul(a, b)
    assert names == [KERNEL, PARTS]
    assert_close(y, a.double() @ b.double())


def test_tiles_are_shared_where_there_is_a_slice_for_each_program(device):
    for k, rows, shares in ((80, 56, True), (80, 24, False), (80, 8, False)):
        a, b = made(device, rows, k), made(device, k, 40)
        with tiles("stream-k", 16, 16, 16) as names, pytest.MonkeyPatch.context() as patched:
            patched.setattr(stream_k, "num_programs", lambda *_: 31)
            y = ops.matmul(a, b)
        assert (PARTS in names) == shares
        assert_close(y, a.double() @ b.double())


@pytest.mark.parametrize("pieces", [1, 2])
def test_one_program_of_many_tiles(pieces, device):
    """Of three slices each, of which a tile keeps its own place while the next one is loaded."""
    a, b = made(device, 104, 80, dtype=torch.bfloat16), made(device, 80, 56, dtype=torch.bfloat16)
    with tiles("persistent", 16, 16, 32, pieces=pieces) as names, pytest.MonkeyPatch.context() as m:
        m.setattr(configs, "residents", lambda *_: 2)
        y = ops.matmul(a, b)
    assert names == [KERNEL]
    assert_close(y, a.double() @ b.double())


@pytest.mark.parametrize("k", [24, 32])
def test_one_tile_of_b_for_all_of_a(k, device):
    a, b = made(device, 104, k), made(device, k, 24)
    with tiles("stationary", 16, 16, 32) as names, pytest.MonkeyPatch.context() as patched:
        patched.setattr(configs, "residents", lambda *_: 3)
        y = ops.matmul(a, b)
    assert names == [KERNEL]
    assert_close(y, a.double() @ b.double())


def test_a_tile_of_b_is_kept_for_short_sums_alone(device):
    """Of a longer sum, or of a batch of its own, it is another tile with every step."""
    for a, b in (
        (made(device, 40, 64), made(device, 64, 24)),
        (made(device, 2, 40, 32), made(device, 2, 32, 24)),
    ):
        with tiles("stationary", 16, 16, 32) as names:
            y = ops.matmul(a, b)
        assert names == ["matmul_kernel"]
        assert_close(y, a.double() @ b.double())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "size", [(40, 24, 40), (8, 48, 40), (8, 48, 528)], ids=["rows", "few-rows", "split"]
)
def test_linear_and_its_gradients(activation, size, device):
    """With bias and activation, and the preactivation where the gradient needs it."""
    m, n, k = size
    operands = made(device, m, k), made(device, n, k) / k**0.5, made(device, n)
    with tiles("tile", 32, 16, 32) as names, watched(device):
        found = gradients(lambda *o: ops.linear(*o, activation), operands)
    assert names.count(KERNEL) == 3
    assert ("split_sum_kernel" in names) == (k == 528)
    function = getattr(F, activation)
    exact = gradients(lambda *o: function(F.linear(*o)), [o.double() for o in operands])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=4)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("form", "pieces", "size"),
    [
        ("tile", 1, (40, 24, 40)),
        ("tile", 2, (40, 24, 40)),
        ("persistent", 2, (40, 24, 40)),
        ("stream-k", 4, (40, 24, 40)),
        ("stationary", 1, (40, 24, 24)),
        ("tile", 2, (8, 48, 40)),
        ("tile", 2, (8, 48, 528)),
    ],
    ids=["tile", "halves", "persistent", "stream-k", "stationary", "few-rows", "split"],
)
def test_linear_with_a_residual(form, pieces, size, activation, device):
    m, n, k = size
    operands = made(device, m, k), made(device, n, k) / k**0.5, made(device, n), made(device, m, n)
    with tiles(form, 32, 16, 32, pieces=pieces) as names, watched(device):
        found = gradients(with_residual(ops.linear, activation=activation), operands)
    # a gradient has longer sums than the one slice that is stationary
    assert names[0] == KERNEL
    assert names.count(KERNEL) == 3 or form == "stationary"
    assert ("split_sum_kernel" in names) == (k == 528)
    # the weight's gradient is a product with the bias's
    assert names.count(PARTS) == (2 if form == "stream-k" else 0)
    exact = gradients(with_residual(F.linear, activation), [o.double() for o in operands])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=4)


@pytest.mark.parametrize("size", [(40, 48, 72), (528, 40, 48)], ids=["tiles", "split"])
@pytest.mark.parametrize("columns", [False, True])
def test_gradients_of_weight_and_bias_in_one_product(size, columns, device):
    """Tiles past the first column, and rows past the last whole tile, add nothing to the sums."""
    m, n, k = size
    x, w, bias = made(device, m, k), made(device, n, k), made(device, n)
    grad = along(made(device, m, n, seed=1), columns)
    leaves = [each.requires_grad_() for each in (w, bias)]
    with tiles("tile", 32, 16, 32) as names, watched(device):
        y = ops.linear(x, *leaves)
        del names[:]
        found = torch.autograd.grad(y, leaves, grad)
    # partial sums of the weight, and those of the bias
    assert names == [KERNEL] + (["split_sum_kernel"] * 2 if m == 528 else [])
    grad = grad.double()
    for one, exact in zip(found, (grad.mT @ x.double(), grad.sum(0)), strict=True):
        assert_close(one, exact)


def test_a_gradient_of_few_rows_is_summed_apart(device):
    """Its product is the transposed one, whose first operand is another."""
    x, w, bias = made(device, 40, 48), made(device, 24, 48), made(device, 24)
    with tiles("tile", 32, 16, 32) as names:
        found = gradients(ops.linear, (x, w, bias))
    assert "channel_sum_kernel" in names
    exact = gradients(F.linear, [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)


def test_second_gradients_of_a_linear_layer(device):
    """Of both gradients at once, and of either alone."""
    operands = made(device, 40, 56), made(device, 48, 56) / 7, made(device, 48)
    grad = made(device, 40, 48, seed=1)
    seeds = [made(device, *each.shape, seed=2) for each in operands]

    def twice(run, wanted, operands, grad, seeds):
        leaves = [each.detach().clone().requires_grad_() for each in (*operands, grad)]
        first = torch.autograd.grad(run(*leaves[:3]), leaves[:3], leaves[3], create_graph=True)
        chosen = [first[index] for index in wanted], [seeds[index] for index in wanted]
        return torch.autograd.grad(chosen[0], leaves[:1] + leaves[3:], chosen[1], allow_unused=True)

    for wanted in ((1, 2), (1,), (2,)):
        with tiles("tile", 32, 16, 32):
            found = twice(ops.linear, wanted, operands, grad, seeds)
        exact = twice(
            F.linear,
            wanted,
            [each.double() for each in operands],
            grad.double(),
            [each.double() for each in seeds],
        )
        for one, other in zip(found, exact, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                assert_close(one, other, terms=2)


def test_residuals_that_a_descriptor_takes_and_others(device):
    """Rows on 16 bytes, whatever their distance; others are added by the portable kernel."""
    operands = made(device, 40, 32), made(device, 24, 32) / 6, made(device, 24)
    exact = F.linear(*(o.double() for o in operands))
    wide = made(device, 40, 64)
    for residual, kernel in (
        (wide[:, 8:32], KERNEL),
        (wide[:, 1:25], "matmul_kernel"),
        (wide.T.contiguous().T[:, :24], "matmul_kernel"),
        (wide[:1, :24].expand(40, 24), "matmul_kernel"),
        (made(device, 40, 28)[:, :24], "matmul_kernel"),
    ):
        with tiles("tile", 32, 16, 32) as names, watched(device):
            found = ops.linear(*operands, residual=residual)
        assert names == [kernel]
        assert_close(found, exact + residual.double())
