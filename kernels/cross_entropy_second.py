"""The gradients of a gradient of cross-entropy.

With the names of cross_entropy.py, s the gradient of a row's loss and Q = sum(q), the gradient of
the logits is s (Q p - q), that of probabilities t is -s (1 - a) w log(p).  Of the product of the
first with v, P = sum(p v), the gradients are

    of s: Q P - sum(q v)        of x: s Q p (v - P)        of t: s (1 - a) w (P - v)

and of the second, P = (1 - a) sum(w v)

    of s: -(1 - a) sum(w v log(p))        of x: s (p P - (1 - a) w v)        of t: 0
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.cross_entropy import load_classes, spread_weights
from tritorch.kernels.tiles import strided_offsets

# 8 elements per thread; without the bound the assembler spills for the sake of one more warp
CROSS_ENTROPY_SECOND_CONFIGS = (
    Config({"BLOCK_N": 8, "BLOCK_C": 128}, num_warps=4, maxnreg=255),
    # long rows, or too few of them
    Config({"BLOCK_N": 1, "BLOCK_C": 1024}, num_warps=4, maxnreg=255),
    # classes apart in memory: rows side by side
    Config({"BLOCK_N": 128, "BLOCK_C": 8}, num_warps=4, maxnreg=255),
)


def cross_entropy_second_config(rows, classes, contiguous):
    """A tile along what is contiguous in memory; `contiguous`: the classes are."""
    short, long, apart = CROSS_ENTROPY_SECOND_CONFIGS
    if not contiguous:
        return apart
    return long if classes > 128 and rows < 4096 else short


@triton.jit
def row_factors(
    y_ptr, weight_ptr, rows_ptr, denominator_ptr, y_rows, n, mask_n, N, C, divisor, ignore_index,
    weight_stride, kept, SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr,
):
    """Class of each row, its target weight, the sum of them, and what divides the loss.

    The last is infinite for a row that is ignored.
    """
    ACC: tl.constexpr = kept.dtype
    if denominator_ptr is None:
        divisors = tl.zeros(n.shape, ACC) + divisor
    else:
        divisors = tl.zeros(n.shape, ACC) + tl.load(denominator_ptr)
    if PROBABILITIES:
        y, q_y = tl.zeros_like(mask_n).to(tl.int32), tl.zeros(n.shape, ACC)
    else:
        y, ignored, weight = load_classes(
            y_ptr, weight_ptr, y_rows, mask_n, C, ignore_index, weight_stride, ACC)
        divisors = tl.where(ignored, float("inf"), divisors)
        q_y = kept * weight
    q_total = tl.load(rows_ptr + N + N + n, mask=mask_n, other=0.0) if SPREAD else q_y
    return y, q_y, q_total, divisors


@triton.jit
def load_tile(ptr, rows, c, mask, stride_c, ACC: tl.constexpr):
    """Elements of the classes c of the rows, 0 elsewhere."""
    offsets = rows[:, None] + c.to(rows.dtype) * stride_c
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def cross_entropy_second_rows_kernel(
    x_ptr, y_ptr, weight_ptr, rows_ptr, v_ptr, denominator_ptr, products_ptr, grad_grad_loss_ptr,
    N, C, divisor, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_c, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    v_stride_c, v_stride_0, v_stride_1, v_stride_2, v_stride_3, v_stride_4,
    weight_stride,
    ignore_index, smoothing: tl.float64,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, OF_INPUT: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program writes P of BLOCK_N rows, and the gradient of s."""
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    pid = tl.program_id(0)
    n = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    x_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    v_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             v_stride_0, v_stride_1, v_stride_2, v_stride_3, v_stride_4)
    kept = (1.0 - smoothing).to(ACC)
    spread = (smoothing / C).to(ACC)
    y, q_y, q_total, divisors = row_factors(
        y_ptr, weight_ptr, rows_ptr, denominator_ptr, y_rows, n, mask_n, N, C, divisor,
        ignore_index, weight_stride, kept, SPREAD, PROBABILITIES)
    row_largest = tl.load(rows_ptr + n, mask=mask_n, other=0.0)
    log_total = tl.load(rows_ptr + N + n, mask=mask_n, other=0.0)

    product = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    other = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        mask = mask_n[:, None] & (c < C)
        x = load_tile(x_ptr, x_rows, c, mask, x_stride_c, ACC)
        v = load_tile(v_ptr, v_rows, c, mask, v_stride_c, ACC)
        log_p = (x - row_largest[:, None]) - log_total[:, None]
        if OF_INPUT:
            product += tl.where(mask, tl.exp(log_p) * v, 0.0)
            if SPREAD:
                other += v * spread_weights(y_ptr, weight_ptr, y_rows, c, c, mask, kept, spread,
                                            y_stride_c, weight_stride, PROBABILITIES)
            if not PROBABILITIES:
                other += tl.where(c == y[:, None], q_y[:, None], 0.0) * v
        else:
            if weight_ptr is not None:
                v *= tl.load(weight_ptr + c * weight_stride, mask=mask, other=0.0).to(ACC)
            product += kept * v
            other += tl.where(mask, kept * v * log_p, 0.0)
    row_product = tl.sum(product, axis=1)
    grad = -tl.sum(other, axis=1)
    if OF_INPUT:
        grad += q_total * row_product
    tl.store(products_ptr + n, row_product, mask=mask_n)
    grad = (grad / divisors).to(grad_grad_loss_ptr.dtype.element_ty)
    tl.store(grad_grad_loss_ptr + n, grad, mask=mask_n)


@triton.jit
def cross_entropy_second_kernel(
    x_ptr, y_ptr, weight_ptr, rows_ptr, v_ptr, products_ptr, grad_loss_ptr, denominator_ptr,
    grad_ptr,
    N, C, TILES_C, divisor, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_c, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    v_stride_c, v_stride_0, v_stride_1, v_stride_2, v_stride_3, v_stride_4,
    grad_stride_c, grad_stride_0, grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4,
    grad_loss_stride_0, grad_loss_stride_1, grad_loss_stride_2,
    grad_loss_stride_3, grad_loss_stride_4,
    weight_stride,
    ignore_index, smoothing: tl.float64,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, OF_INPUT: tl.constexpr,
    WITH_RESPECT_TO_INPUT: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program writes a tile of BLOCK_N rows of a gradient, of x or of t."""
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    pid_n = tl.program_id(0) // TILES_C
    n = (pid_n.to(tl.int64) if INDEX_64 else pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    x_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    v_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             v_stride_0, v_stride_1, v_stride_2, v_stride_3, v_stride_4)
    grad_rows = strided_offsets(n, size_1, size_2, size_3, size_4, grad_stride_0,
                                grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4)
    grad_loss_rows = strided_offsets(
        n, size_1, size_2, size_3, size_4, grad_loss_stride_0,
        grad_loss_stride_1, grad_loss_stride_2, grad_loss_stride_3, grad_loss_stride_4)
    kept = (1.0 - smoothing).to(ACC)
    _, _, q_total, divisors = row_factors(
        y_ptr, weight_ptr, rows_ptr, denominator_ptr, y_rows, n, mask_n, N, C, divisor,
        ignore_index, weight_stride, kept, SPREAD, PROBABILITIES)
    scale = tl.load(grad_loss_ptr + grad_loss_rows, mask=mask_n, other=0.0).to(ACC) / divisors
    row_largest = tl.load(rows_ptr + n, mask=mask_n, other=0.0)
    log_total = tl.load(rows_ptr + N + n, mask=mask_n, other=0.0)
    product = tl.load(products_ptr + n, mask=mask_n, other=0.0)

    c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = mask_n[:, None] & (c < C)
    v = load_tile(v_ptr, v_rows, c, mask, v_stride_c, ACC)
    weight = tl.full((BLOCK_N, BLOCK_C), 1.0, ACC)
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + c * weight_stride, mask=mask, other=0.0).to(ACC)
    if WITH_RESPECT_TO_INPUT:
        x = load_tile(x_ptr, x_rows, c, mask, x_stride_c, ACC)
        p = tl.exp((x - row_largest[:, None]) - log_total[:, None])
        if OF_INPUT:
            grad = q_total[:, None] * p * (v - product[:, None])
        else:
            grad = p * product[:, None] - kept * weight * v
    else:
        tl.static_assert(OF_INPUT)
        grad = kept * weight * (product[:, None] - v)
    offsets = grad_rows[:, None] + c.to(grad_rows.dtype) * grad_stride_c
    grad = (scale[:, None] * grad).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offsets, grad, mask=mask)
