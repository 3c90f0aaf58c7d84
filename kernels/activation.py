"""Elementwise activations, forward and backward, over dense or strided tensors."""

import triton
import triton.language as tl

from tritorch.kernels.tiles import strided_offsets


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, slope=0.01):
    """ACTIVATION of float32 or float64 values; None leaves them.

    `slope` is leaky_relu's: a constant, or a scalar of the dtype of x.
    """
    # a selection by `where` keeps NaN and -0.0 as torch does: a maximum would drop NaN on a GPU
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        # the definition's (1 + tanh(u)) / 2 without its cancellation
        x = x * sigmoid(2 * gelu_inner(x))
    elif ACTIVATION == "hardsigmoid":
        x = ramp(x) / 6
    elif ACTIVATION == "hardswish":
        x = x * ramp(x) / 6
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return x


@triton.jit
def activation_gradient(grad, saved, ACTIVATION: tl.constexpr, slope=0.01):
    """grad times the derivative of ACTIVATION, in float32 or float64.

    `saved` is the output of relu, relu6, leaky_relu (of a slope that is not negative), sigmoid and
    tanh, and the input of the others.
    """
    # at NaN a gradient passes, is zero or is NaN as torch's own selections make it
    if ACTIVATION == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((saved > 0) & (saved < 6), grad, 0.0)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(saved > 0, grad, grad * slope)
    elif ACTIVATION == "sigmoid":
        grad = grad * (saved * (1 - saved))
    elif ACTIVATION == "tanh":
        grad = grad * (1 - saved * saved)
    elif ACTIVATION == "silu":
        s = sigmoid(saved)
        grad = grad * (s * (1 + saved * (1 - s)))
    elif ACTIVATION == "gelu":
        grad = grad * (normal_cdf(saved) + saved * normal_density(saved))
    elif ACTIVATION == "gelu_tanh":
        u = 2 * gelu_inner(saved)
        grad = grad * (sigmoid(u) + saved * sigmoid_slope(u) * (2 * gelu_inner_slope(saved)))
    elif ACTIVATION == "hardsigmoid":
        grad = tl.where((saved > -3) & (saved < 3), grad / 6, 0.0)
    elif ACTIVATION == "hardswish":
        inside = tl.where(saved >= 3, grad, grad * (saved / 3 + 0.5))
        grad = tl.where(saved <= -3, 0.0, inside)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return grad


@triton.jit
def activation_curvature(grad, saved, ACTIVATION: tl.constexpr):
    """grad times the derivative, by `saved`, of the factor in `activation_gradient`.

    Activations made of straight lines have none and are refused.
    """
    if ACTIVATION == "sigmoid":
        grad = grad * (1 - 2 * saved)
    elif ACTIVATION == "tanh":
        grad = grad * (-2 * saved)
    elif ACTIVATION == "silu":
        grad = grad * (sigmoid_slope(saved) * (2 + saved * (1 - 2 * sigmoid(saved))))
    elif ACTIVATION == "gelu":
        grad = grad * (normal_density(saved) * (2 - saved * saved))
    elif ACTIVATION == "gelu_tanh":
        u = 2 * gelu_inner(saved)
        slope = 2 * gelu_inner_slope(saved)
        # the second derivative of 2 * gelu_inner is 12 * 0.044715 sqrt(2 / pi) x
        bend = 0.42812889763560146 * saved + (1 - 2 * sigmoid(u)) * slope * slope
        grad = grad * (sigmoid_slope(u) * (2 * slope + saved * bend))
    else:
        tl.static_assert(ACTIVATION == "hardswish", "no curvature")
        grad = tl.where((saved > -3) & (saved < 3), grad / 3, 0.0)
    return grad


@triton.jit
def sigmoid(x):
    # where exp overflows to infinity this is 0, as it should be
    return 1 / (1 + tl.exp(-x))


@triton.jit
def sigmoid_slope(x):
    """sigmoid(x) (1 - sigmoid(x)) without its cancellation."""
    e = tl.exp(-tl.abs(x))
    return e / ((1 + e) * (1 + e))


@triton.jit
def tanh(x):
    """tanh from exp, since Triton has none outside libdevice.

    Accurate to a few roundings, also near 0, and near 1, so that 1 - y^2 keeps its digits.
    """
    a = tl.abs(x)
    # above 20 the result is 1 in float64 too; the comparison is false for NaN, which stays
    a = tl.where(a > 20, 20.0, a)
    e = tl.exp(2 * a)
    z = x * x
    # near 0 e - 1 cancels: a convergent of Lambert's continued fraction instead
    if x.dtype == tl.float64:
        p = 34459425 + z * (4729725 + z * (135135 + z * (990 + z)))
        q = 34459425 + z * (16216200 + z * (945945 + z * (13860 + z * 45)))
    else:
        p = 945 + z * (105 + z)
        q = 945 + z * (420 + z * 15)
    near = a < 0.625
    quotient = tl.where(near, x * p, 2.0) / tl.where(near, q, e + 1)
    return tl.where(near, quotient, tl.where(x < 0, quotient - 1, 1 - quotient))


@triton.jit
def ramp(x):
    """x + 3 between 0 and 6; NaN stays."""
    x = x + 3
    return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))


@triton.jit
def normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_inner(x):
    """sqrt(2 / pi) (x + 0.044715 x^3)."""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def gelu_inner_slope(x):
    return 0.7978845608028654 * (1 + 0.134145 * x * x)


# elements per program: 8 per thread with 4 warps, one 128-bit access of a 16-bit type
BLOCK = 1024


@triton.jit
def activation_forward_kernel(
    x_ptr, y_ptr,
    NUMEL,
    size_1, size_2, size_3, size_4,
    x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    slope: tl.float64,
    ACTIVATION: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK consecutive elements of the loop nest over x and y."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    x_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(ACC)
    y = activate(x, ACTIVATION, slope.to(ACC))
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward_kernel(
    grad_y_ptr, saved_ptr, grad_x_ptr,
    NUMEL,
    size_1, size_2, size_3, size_4,
    grad_y_stride_0, grad_y_stride_1, grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
    saved_stride_0, saved_stride_1, saved_stride_2, saved_stride_3, saved_stride_4,
    grad_x_stride_0, grad_x_stride_1, grad_x_stride_2, grad_x_stride_3, grad_x_stride_4,
    slope: tl.float64,
    ACTIVATION: tl.constexpr, ORDER: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK consecutive elements of grad_y times the first derivative, or
    where ORDER is 2 the second, from what the forward pass saved: its input or its output.
    """
    ACC: tl.constexpr = tl.float64 if saved_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    grad_y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                     grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
                                     grad_y_stride_3, grad_y_stride_4)
    saved_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                    saved_stride_0, saved_stride_1, saved_stride_2,
                                    saved_stride_3, saved_stride_4)
    grad_x_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                     grad_x_stride_0, grad_x_stride_1, grad_x_stride_2,
                                     grad_x_stride_3, grad_x_stride_4)
    grad = tl.load(grad_y_ptr + grad_y_offsets, mask=mask, other=0.0).to(ACC)
    saved = tl.load(saved_ptr + saved_offsets, mask=mask, other=0.0).to(ACC)
    if ORDER == 1:
        grad = activation_gradient(grad, saved, ACTIVATION, slope.to(ACC))
    else:
        grad = activation_curvature(grad, saved, ACTIVATION)
    tl.store(grad_x_ptr + grad_x_offsets, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
