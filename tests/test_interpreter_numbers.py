"""The numbers of the corrected interpreter: bfloat16, rounding and NaN, against those of a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
import triton.language as tl

from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret

NAN, INF = float("nan"), float("inf")
# in bfloat16: ties between two neighbours, what is just off them, both ends of the range
AWKWARD = torch.tensor(
    [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, -1 - 2**-8, 0.0, -0.0,
     3.4e38, -3.4e38, INF, -INF, NAN, 1e-40, -9.2e-41, 1 / 3]
)  # fmt: skip


@triton.jit
def unary_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if OPERATION == "cast":
        y = x.to(y_ptr.dtype.element_ty)
    elif OPERATION == "truncate":
        y = x.to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    elif OPERATION == "bitcast":
        y = x.to(y_ptr.dtype.element_ty, bitcast=True)
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "abs":
        y = tl.abs(x)
    elif OPERATION == "add scalar":
        y = x + 0.3
    elif OPERATION == "full":
        y = tl.full((BLOCK,), 0.3, y_ptr.dtype.element_ty)
    elif OPERATION == "zeros":
        y = tl.zeros_like(x)
    elif OPERATION == "clamp":
        y = tl.clamp(x, -1.0, 1.0)
    elif OPERATION == "clamp all":
        y = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "exp":
        y = tl.exp(x)
    elif OPERATION == "sum":
        y = tl.sum(x, axis=0, keep_dims=True)
    elif OPERATION == "max":
        y = tl.max(x, axis=0, keep_dims=True)
    elif OPERATION == "min":
        y = tl.min(x, axis=0, keep_dims=True)
    elif OPERATION == "argmax":
        y = tl.max(x, axis=0, return_indices=True, keep_dims=True)[0]
    elif OPERATION == "cumsum":
        y = tl.cumsum(x, axis=0)
    elif OPERATION == "transposed abs":
        y = tl.reshape(tl.abs(tl.trans(tl.reshape(x, (4, BLOCK // 4)))), (BLOCK,))
    tl.store(y_ptr + offs, y)


@triton.jit
def binary_kernel(x_ptr, y_ptr, z_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "subtract":
        z = x - y
    elif OPERATION == "multiply":
        z = x * y
    elif OPERATION == "divide":
        z = x / y
    elif OPERATION == "less":
        z = x < y
    elif OPERATION == "equal":
        z = x == y
    elif OPERATION == "where":
        z = tl.where(x > y, x, y)
    elif OPERATION == "maximum":
        z = tl.maximum(x, y)
    elif OPERATION == "minimum":
        z = tl.minimum(x, y)
    elif OPERATION == "maximum all":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "minimum all":
        z = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "fma":
        z = tl.fma(x, y, -y)
    tl.store(z_ptr + offs, z)


@triton.jit
def axis_sum_kernel(
    x_ptr, y_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    y = tl.sum(x, axis=AXIS, keep_dims=KEEP)
    if AXIS is None:
        if KEEP:
            y_ptr += tl.zeros((1, 1), tl.int32)
        tl.store(y_ptr, y)
    else:
        offs = tl.arange(0, N if AXIS == 0 else M)
        tl.store(y_ptr + (tl.expand_dims(offs, AXIS) if KEEP else offs), y)


@triton.jit
def add_atomically_kernel(x_ptr, y_ptr, old_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    old = tl.atomic_add(y_ptr + offs // 8, tl.load(x_ptr + offs), mask=offs < n)
    tl.store(old_ptr + offs, old, mask=offs < n)


@triton.jit
def exchange_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    # the compared value is what x holds, so that each element becomes twice itself
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.atomic_cas(x_ptr + offs, x, x + x))


def unary(operation, x, dtype=None, **context):
    y = torch.zeros(x.shape, dtype=dtype or x.dtype)
    with corrected(**context):
        unary_kernel[(1,)](x, y, operation, x.numel())
    return y


def binary(operation, x, y, dtype=None):
    z = torch.zeros(x.shape, dtype=dtype or x.dtype)
    with corrected():
        binary_kernel[(1,)](x, y, z, operation, x.numel())
    return z


def normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def all_bfloat16():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


# bfloat16


def test_every_bfloat16_is_copied_bit_by_bit():
    x = all_bfloat16()
    copied = unary("cast", x)
    assert torch.equal(copied.view(torch.int16), x.view(torch.int16))


def test_every_bfloat16_widens_to_float32():
    x = all_bfloat16()
    assert_same(unary("cast", x, torch.float32), x.float())


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.bfloat16], ids=str)
def test_the_bits_of_bfloat16_are_cast(dtype):
    x = normal(16)
    assert_same(unary("bitcast", x, dtype).view(torch.int16), x.view(torch.int16))
    bits = x.view(dtype)
    assert_same(unary("bitcast", bits, torch.bfloat16), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_float_rounds_to_the_nearest_bfloat16(dtype):
    assert_same(unary("cast", AWKWARD.to(dtype), torch.bfloat16), AWKWARD.bfloat16())


def test_random_float32_round_to_the_nearest_bfloat16():
    x = normal(4096, dtype=torch.float32)
    assert_same(unary("cast", x, torch.bfloat16), x.bfloat16())


def test_a_nan_with_low_bits_alone_stays_nan():
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F80FFFF], dtype=torch.int32).view(
        torch.float32
    )
    assert unary("cast", x, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float16], ids=str)
def test_bfloat16_converts_to_and_from(dtype):
    x = torch.tensor([0, 1, -3, 100, 127, 77, -128, 5]).repeat(2).to(dtype)
    if dtype in (torch.int32, torch.int64):
        # more digits than bfloat16 has
        x = x * 1001
    rounded = x.bfloat16()
    assert_same(unary("cast", x, torch.bfloat16), rounded)
    assert_same(unary("cast", rounded, dtype), rounded.to(dtype))


def test_rounding_to_bfloat16_can_be_towards_zero():
    bits = AWKWARD.view(torch.int32) >> 16
    expected = bits.to(torch.int16).view(torch.bfloat16)
    assert_same(unary("truncate", AWKWARD, torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add", torch.add),
        ("subtract", torch.sub),
        ("multiply", torch.mul),
        ("divide", torch.div),
        ("where", torch.maximum),
        ("maximum", torch.maximum),
        ("minimum", torch.minimum),
        ("maximum all", torch.maximum),
        ("minimum all", torch.minimum),
        ("fma", lambda x, y: (x.double() * y.double() - y.double()).bfloat16()),
    ],
)
def test_binary_operation_of_bfloat16(operation, expected):
    x, y = normal(256), normal(256, seed=1)
    assert_same(binary(operation, x, y), expected(x, y))


@pytest.mark.parametrize(("operation", "expected"), [("less", torch.lt), ("equal", torch.eq)])
def test_comparison_of_bfloat16(operation, expected):
    x, y = normal(256), normal(256, seed=1)
    y[::2] = x[::2]
    # -0 equals 0, and their bits differ
    x[0], y[0] = 0.0, -0.0
    assert_same(binary(operation, x, y, torch.bool), expected(x, y))
    # as a number it is 0 or 1
    assert_same(binary(operation, x, y, torch.float32), expected(x, y).float())


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("negate", torch.neg),
        ("abs", torch.abs),
        ("transposed abs", lambda x: x.view(4, -1).t().abs().flatten()),
        ("add scalar", lambda x: x + torch.full_like(x, 0.3)),
        ("full", lambda x: torch.full_like(x, 0.3)),
        ("zeros", torch.zeros_like),
        ("clamp", lambda x: x.clamp(-1, 1)),
        ("clamp all", lambda x: x.clamp(-1, 1)),
        ("max", lambda x: x.max().expand(x.shape)),
        ("min", lambda x: x.min().expand(x.shape)),
        ("argmax", lambda x: x.max().expand(x.shape)),
        ("cumsum", lambda x: x.float().cumsum(0).bfloat16()),
    ],
)
def test_unary_operation_of_bfloat16(operation, expected):
    x = normal(64)
    assert_same(unary(operation, x), expected(x).contiguous())


def test_lanes_add_to_one_bfloat16_in_turn():
    x = normal(16)
    y = torch.tensor([0.5, 100.0]).bfloat16()
    old = torch.zeros_like(x)
    total, before = y.clone(), torch.zeros_like(x)
    for lane in range(12):
        before[lane] = total[lane // 8]
        total[lane // 8] += x[lane]
    with corrected():
        add_atomically_kernel[(1,)](x, y, old, 12, 16)
    assert_same(y, total)
    assert_same(old, before)


def test_a_bfloat16_is_exchanged_where_it_compares_equal():
    x = normal(16)
    before, y = x.clone(), torch.zeros_like(x)
    with corrected():
        exchange_kernel[(1,)](x, y, 16)
    assert_same(y, before)
    assert_same(x, 2 * before)


# sums and rounding


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_a_sum_rounds_every_partial_sum_to_the_dtype(dtype, large):
    # large + 1 is large: of three ones it takes two, when they come as a pair
    x = torch.tensor([large, 1.0, 1.0, 1.0]).to(dtype).repeat(16)
    expected = torch.full_like(x, 16 * (large + 2))
    assert (expected != x.double().sum().to(dtype)).all()
    assert_same(unary("sum", x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("keep_dims", [False, True])
def test_a_sum_of_16_bits_over_an_axis(dtype, axis, keep_dims):
    # integers that every partial sum can represent
    x = torch.arange(-32, 32).reshape(16, 4).to(dtype)
    y = torch.full((64,), NAN, dtype=dtype)
    with corrected():
        axis_sum_kernel[(1,)](x, y, axis, keep_dims, 16, 4)
    expected = x.sum(axis if axis is not None else (0, 1), keepdim=keep_dims)
    assert_same(y[: expected.numel()], expected.flatten())
    assert y[expected.numel() :].isnan().all()


def test_a_sum_of_float32_is_near_the_true_sum():
    x = normal(64, dtype=torch.float32)
    torch.testing.assert_close(unary("sum", x), x.double().sum().float().expand(64).contiguous())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_fused_multiply_add_rounds_once(dtype):
    x, y = normal(256, dtype=dtype), normal(256, dtype=dtype, seed=1)
    expected = (x.double() * y.double() - y.double()).to(dtype)
    assert not torch.equal(expected, x * y - y)
    assert_same(binary("fma", x, y), expected)


def test_an_overflow_is_no_warning():
    x = torch.full((16,), 1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(unary("exp", x), torch.full((16,), INF))


# NaN


LEFT = torch.tensor([NAN, NAN, 1.0, -2.0]).repeat(4)
RIGHT = torch.tensor([NAN, 3.0, NAN, -1.0]).repeat(4)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("maximum", torch.fmax),
        ("minimum", torch.fmin),
        ("maximum all", torch.maximum),
        ("minimum all", torch.minimum),
    ],
)
def test_maximum_drops_nan_unless_asked_to_propagate(operation, expected, dtype):
    x, y = LEFT.to(dtype), RIGHT.to(dtype)
    assert_same(binary(operation, x, y), expected(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_clamp_drops_nan_unless_asked_to_propagate(dtype):
    x = LEFT.to(dtype)
    assert_same(unary("clamp", x), x.nan_to_num(-1.0).clamp(-1, 1))
    assert_same(unary("clamp all", x), x.clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_reduction_to_the_extreme_drops_nan(dtype):
    x = LEFT.to(dtype)
    assert_same(unary("max", x), torch.ones_like(x))
    assert_same(unary("min", x), torch.full_like(x, -2))


def test_the_extreme_of_nan_alone_is_nan_without_a_warning():
    x = torch.full((16,), NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(unary("max", x), x)
        assert_same(unary("min", x), x)


def test_a_maximum_with_index_loses_what_is_before_a_nan():
    x = torch.tensor([9.0, NAN, 3.0, 1.0]).repeat_interleave(4)
    assert_same(unary("argmax", x), torch.full((16,), 3.0))
