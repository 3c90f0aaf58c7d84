"""Elementwise losses and their gradients, and the sum in a fixed order that ends a reduced loss."""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.tiles import strided_offsets

# elements per program: 8 per thread with 4 warps, one 128-bit access of a 16-bit type; without the
# bound the assembler spills for the sake of one more warp
ELEMENTWISE_CONFIG = Config({"BLOCK": 1024}, num_warps=4, maxnreg=255)
BLOCK = ELEMENTWISE_CONFIG.kwargs["BLOCK"]
# partial sums that one program of the total adds up, with 8 warps
TOTAL_BLOCK = 4096


@triton.jit
def log1p(u):
    """log(1 + u) for u of at least -1, accurate also where 1 + u rounds to 1."""
    v = 1.0 + u
    # v - 1 is what u was rounded to: the ratio undoes the rounding (Kahan)
    return tl.where(v == 1.0, u, tl.log(v) * (u / (v - 1.0)))


@triton.jit
def poison_outside_unit(value, x, y):
    """NaN where x or y is no probability: torch stops there, and a loss must not look plausible."""
    return tl.where((x >= 0.0) & (x <= 1.0) & (y >= 0.0) & (y <= 1.0), value, float("nan"))


@triton.jit
def clamp(x, bound):
    """x between -bound and bound; NaN passes, which a minimum would drop on a GPU."""
    return tl.where(x <= -bound, -bound, tl.where(x >= bound, bound, x))


@triton.jit
def elementwise_loss(x, y, pos_weight, threshold, LOSS: tl.constexpr):
    """The loss of each element, before its weight."""
    if LOSS == "mse_loss":
        loss = (x - y) * (x - y)
    elif LOSS == "l1_loss":
        loss = tl.abs(x - y)
    elif LOSS == "smooth_l1_loss":
        distance = tl.abs(x - y)
        square = 0.5 * distance * distance / threshold
        loss = tl.where(distance < threshold, square, distance - 0.5 * threshold)
    elif LOSS == "huber_loss":
        distance = tl.abs(x - y)
        line = threshold * (distance - 0.5 * threshold)
        loss = tl.where(distance < threshold, 0.5 * distance * distance, line)
    elif LOSS == "binary_cross_entropy":
        log_x = tl.maximum(tl.log(x), -100.0)
        log_not_x = tl.maximum(log1p(-x), -100.0)
        loss = poison_outside_unit((y - 1.0) * log_not_x - y * log_x, x, y)
    else:
        tl.static_assert(LOSS == "binary_cross_entropy_with_logits")
        # log(1 + exp(-x)) is relu(-x) + rest; the large terms come first, so that they cancel
        rest = log1p(tl.exp(-tl.abs(x)))
        log_weight = 1.0 + (pos_weight - 1.0) * y
        loss = ((1.0 - y) * x + log_weight * tl.where(x < 0, -x, 0.0)) + log_weight * rest
    return loss


@triton.jit
def elementwise_derivative(
    x, y, pos_weight, threshold, LOSS: tl.constexpr, WITH_RESPECT_TO: tl.constexpr,
):
    """The derivative of `elementwise_loss` with respect to x ("input") or y ("target").

    For mse_loss it is half of that, which the caller doubles.
    """
    OF_INPUT: tl.constexpr = WITH_RESPECT_TO == "input"
    # a loss of the difference alone
    excess = x - y if OF_INPUT else y - x
    if LOSS == "mse_loss":
        derivative = excess
    elif LOSS == "l1_loss":
        # 0 at NaN, as in torch
        derivative = tl.where(excess > 0, 1.0, tl.where(excess < 0, -1.0, 0.0)).to(x.dtype)
    elif LOSS == "smooth_l1_loss":
        derivative = clamp(excess, threshold) / threshold
    elif LOSS == "huber_loss":
        derivative = clamp(excess, threshold)
    elif LOSS == "binary_cross_entropy":
        if OF_INPUT:
            derivative = (x - y) / tl.maximum(x * (1.0 - x), 1e-12)
        else:
            derivative = log1p(-x) - tl.log(x)
        derivative = poison_outside_unit(derivative, x, y)
    else:
        tl.static_assert(LOSS == "binary_cross_entropy_with_logits")
        tail = tl.exp(-tl.abs(x))
        if OF_INPUT:
            # sigmoid(x) and sigmoid(-x), neither by a difference from 1
            large, small = 1.0 / (1.0 + tail), tail / (1.0 + tail)
            sigmoid = tl.where(x < 0, small, large)
            opposite = tl.where(x < 0, large, small)
            derivative = (1.0 - y) * sigmoid - pos_weight * y * opposite
        else:
            rest = log1p(tail)
            negative, positive = tl.where(x < 0, -x, 0.0) + rest, tl.where(x > 0, x, 0.0) + rest
            derivative = tl.where(pos_weight == 1.0, -x, pos_weight * negative - positive)
    return derivative


@triton.jit
def second_derivative(x, y, pos_weight, threshold, LOSS: tl.constexpr, MIXED: tl.constexpr):
    """The second derivative of `elementwise_loss`, by x twice or (MIXED) by x and y."""
    if LOSS == "smooth_l1_loss":
        curvature = tl.where(tl.abs(x - y) < threshold, 1.0 / threshold, 0.0)
        derivative = -curvature if MIXED else curvature
    elif LOSS == "huber_loss":
        curvature = tl.where(tl.abs(x - y) < threshold, 1.0, 0.0).to(x.dtype)
        derivative = -curvature if MIXED else curvature
    elif LOSS == "binary_cross_entropy":
        if MIXED:
            derivative = -1.0 / tl.maximum(x * (1.0 - x), 1e-12)
        else:
            spread = (x + 1e-12) * (1.0 - x + 1e-12)
            derivative = (x * x - 2.0 * x * y + y) / (spread * spread)
        derivative = poison_outside_unit(derivative, x, y)
    else:
        tl.static_assert(LOSS == "binary_cross_entropy_with_logits")
        tail = tl.exp(-tl.abs(x))
        large, small = 1.0 / (1.0 + tail), tail / (1.0 + tail)
        if MIXED:
            derivative = tl.where(
                x < 0, -(small + pos_weight * large), -(large + pos_weight * small))
        else:
            derivative = (1.0 + (pos_weight - 1.0) * y) * (large * small)
    return derivative


@triton.jit
def load_operand(
    ptr, index, mask, OTHER: tl.constexpr, DTYPE: tl.constexpr,
    size_1, size_2, size_3, size_4,
    stride_0, stride_1, stride_2, stride_3, stride_4,
):
    """Elements number `index` of a strided tensor; OTHER where there is no such tensor."""
    if ptr is None:
        values = tl.full(index.shape, OTHER, DTYPE)
    else:
        offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                  stride_0, stride_1, stride_2, stride_3, stride_4)
        values = tl.load(ptr + offsets, mask=mask, other=OTHER).to(DTYPE)
    return values


@triton.jit
def elementwise_loss_forward_kernel(
    x_ptr, y_ptr, weight_ptr, pos_weight_ptr, loss_ptr,
    NUMEL,
    size_1, size_2, size_3, size_4,
    x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    weight_stride_0, weight_stride_1, weight_stride_2, weight_stride_3, weight_stride_4,
    pos_weight_stride_0, pos_weight_stride_1, pos_weight_stride_2,
    pos_weight_stride_3, pos_weight_stride_4,
    loss_stride_0, loss_stride_1, loss_stride_2, loss_stride_3, loss_stride_4,
    threshold: tl.float64,
    LOSS: tl.constexpr, REDUCED: tl.constexpr, SUMS_WEIGHTS: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program writes the losses of BLOCK consecutive elements, or (REDUCED) their sum.

    With SUMS_WEIGHTS the sums of the weights follow those of the losses.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    index = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    x = load_operand(x_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
                     x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y = load_operand(y_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
                     y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    weight = load_operand(
        weight_ptr, index, mask, 1.0, ACC, size_1, size_2, size_3, size_4, weight_stride_0,
        weight_stride_1, weight_stride_2, weight_stride_3, weight_stride_4)
    pos_weight = load_operand(
        pos_weight_ptr, index, mask, 1.0, ACC, size_1, size_2, size_3, size_4, pos_weight_stride_0,
        pos_weight_stride_1, pos_weight_stride_2, pos_weight_stride_3, pos_weight_stride_4)
    loss = weight * elementwise_loss(x, y, pos_weight, threshold.to(ACC), LOSS)
    if REDUCED:
        tl.store(loss_ptr + pid, tl.sum(tl.where(mask, loss, 0.0)))
        if SUMS_WEIGHTS:
            tl.store(loss_ptr + tl.num_programs(0) + pid, tl.sum(tl.where(mask, weight, 0.0)))
    else:
        offsets = strided_offsets(index, size_1, size_2, size_3, size_4, loss_stride_0,
                                  loss_stride_1, loss_stride_2, loss_stride_3, loss_stride_4)
        tl.store(loss_ptr + offsets, loss.to(loss_ptr.dtype.element_ty), mask=mask)


@triton.jit
def elementwise_loss_backward_kernel(
    x_ptr, y_ptr, weight_ptr, pos_weight_ptr, grad_loss_ptr, grad_grad_ptr, denominator_ptr,
    grad_ptr,
    NUMEL, divisor,
    size_1, size_2, size_3, size_4,
    x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    weight_stride_0, weight_stride_1, weight_stride_2, weight_stride_3, weight_stride_4,
    pos_weight_stride_0, pos_weight_stride_1, pos_weight_stride_2,
    pos_weight_stride_3, pos_weight_stride_4,
    grad_loss_stride_0, grad_loss_stride_1, grad_loss_stride_2,
    grad_loss_stride_3, grad_loss_stride_4,
    grad_grad_stride_0, grad_grad_stride_1, grad_grad_stride_2,
    grad_grad_stride_3, grad_grad_stride_4,
    grad_stride_0, grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4,
    threshold: tl.float64,
    LOSS: tl.constexpr, WITH_RESPECT_TO: tl.constexpr, ONE_GRAD_LOSS: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program writes BLOCK consecutive elements of one gradient.

    ONE_GRAD_LOSS: all losses share one gradient, that of their sum or mean.  With grad_grad_ptr,
    the gradient of a gradient, WITH_RESPECT_TO names both: "input/target".
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    index = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    x = load_operand(x_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
                     x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y = load_operand(y_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
                     y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    weight = load_operand(
        weight_ptr, index, mask, 1.0, ACC, size_1, size_2, size_3, size_4, weight_stride_0,
        weight_stride_1, weight_stride_2, weight_stride_3, weight_stride_4)
    pos_weight = load_operand(
        pos_weight_ptr, index, mask, 1.0, ACC, size_1, size_2, size_3, size_4, pos_weight_stride_0,
        pos_weight_stride_1, pos_weight_stride_2, pos_weight_stride_3, pos_weight_stride_4)
    if ONE_GRAD_LOSS:
        grad_loss = tl.load(grad_loss_ptr).to(ACC)
    else:
        grad_loss = load_operand(
            grad_loss_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
            grad_loss_stride_0, grad_loss_stride_1, grad_loss_stride_2, grad_loss_stride_3,
            grad_loss_stride_4)
    if denominator_ptr is None:
        grad_loss = grad_loss / divisor
    else:
        grad_loss = grad_loss / tl.load(denominator_ptr)
    if LOSS == "mse_loss":
        # doubled only after the division: twice a large difference may overflow
        grad_loss = grad_loss * 2.0
    threshold = threshold.to(ACC)
    if grad_grad_ptr is None:
        derivative = elementwise_derivative(x, y, pos_weight, threshold, LOSS, WITH_RESPECT_TO)
    else:
        MIXED: tl.constexpr = WITH_RESPECT_TO == "input/target" or WITH_RESPECT_TO == "target/input"
        derivative = second_derivative(x, y, pos_weight, threshold, LOSS, MIXED)
        derivative *= load_operand(
            grad_grad_ptr, index, mask, 0.0, ACC, size_1, size_2, size_3, size_4,
            grad_grad_stride_0, grad_grad_stride_1, grad_grad_stride_2, grad_grad_stride_3,
            grad_grad_stride_4)
    grad = grad_loss * weight * derivative
    offsets = strided_offsets(index, size_1, size_2, size_3, size_4, grad_stride_0,
                              grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4)
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def loss_total_kernel(
    partial_ptr, loss_ptr, denominator_ptr,
    COUNT, divisor,
    HAS_WEIGHTS: tl.constexpr, FINAL: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program adds BLOCK of COUNT sums of losses, and with HAS_WEIGHTS of weights after them.

    FINAL: the only program divides the losses by the weights, else by the divisor, and rounds once.
    """
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < COUNT
    loss = tl.sum(tl.load(partial_ptr + offs, mask=mask, other=0.0))
    if HAS_WEIGHTS:
        denominator = tl.sum(tl.load(partial_ptr + COUNT + offs, mask=mask, other=0.0))
    if FINAL:
        if HAS_WEIGHTS:
            tl.store(denominator_ptr, denominator)
            loss = loss / denominator
        else:
            loss = loss / divisor
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    else:
        tl.store(loss_ptr + pid, loss)
        if HAS_WEIGHTS:
            tl.store(loss_ptr + tl.num_programs(0) + pid, denominator)
