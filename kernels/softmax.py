"""Softmax and its logarithm along one dimension, forward and backward.

Rows longer than a block are read once for a running maximum and a sum of exponentials, rescaled
whenever the maximum rises (online softmax, https://arxiv.org/abs/1805.02867), and once more to be
written.  From the output y and its gradient g, row by row, the gradient is y (g - sum(g y)), and
g - exp(y) sum(g) where y is a logarithm.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.tiles import strided_offsets

SOFTMAX_CONFIGS = (
    # few values in each row: many rows, of which one program holds every value; a limit of its own,
    # since ptxas would spill to fit more programs
    Config({"BLOCK_M": 8, "BLOCK_N": 128}, num_warps=4, num_stages=3, maxnreg=255),
    Config({"BLOCK_M": 1, "BLOCK_N": 1024}, num_warps=4, num_stages=3, maxnreg=255),
    # rows that lie side by side: memory is walked across them
    Config({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=3, maxnreg=255),
)


def softmax_config(n, along):
    """A tile for rows of n values that are contiguous (`along`), or interleaved in memory."""
    if not along:
        return SOFTMAX_CONFIGS[2]
    return SOFTMAX_CONFIGS[0 if n <= 128 else 1]


@triton.jit
def shift_of(maximum):
    """What is subtracted from the values of a row: the maximum, or 0 where that is -inf, since
    -inf - -inf is NaN.
    """
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def normalize(x, maximum, total, LOG: tl.constexpr):
    x = x - shift_of(maximum)[:, None]
    if LOG:
        y = x - tl.log(total)[:, None]
    else:
        y = tl.exp(x) / total[:, None]
    return y


@triton.jit
def softmax_forward_kernel(
    x_ptr, y_ptr,
    M, N, size_1, size_2, size_3, size_4,
    x_stride_n, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_n, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    LOG: tl.constexpr, ONE_BLOCK: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program computes BLOCK_M of the M rows of N values; of rows longer than a block it reads
    every value twice.
    """
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if OUT == tl.float64 else tl.float32
    OFFSET: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(OFFSET)
    advance = tl.full((), BLOCK_N, OFFSET)
    mask_m = offs_m < M
    x_offsets = strided_offsets(offs_m, size_1, size_2, size_3, size_4,
                                x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_offsets = strided_offsets(offs_m, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    x_ptrs = x_ptr + x_offsets[:, None] + offs_n[None, :] * x_stride_n
    y_ptrs = y_ptr + y_offsets[:, None] + offs_n[None, :] * y_stride_n
    if ONE_BLOCK:
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        # rounded to the result's dtype first, as torch converts the input
        x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(OUT).to(ACC)
        # NaN need not reach the maximum: it reaches the total
        maximum = tl.max(x, axis=1)
        total = tl.sum(tl.exp(x - shift_of(maximum)[:, None]), axis=1)
        tl.store(y_ptrs, normalize(x, maximum, total, LOG).to(OUT), mask=mask)
    else:
        x_first = x_ptrs
        maximum = tl.full((BLOCK_M,), float("-inf"), ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (offs_n < N - start)[None, :]
            x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(OUT).to(ACC)
            larger = tl.maximum(maximum, tl.max(x, axis=1))
            shift = shift_of(larger)
            total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
            maximum = larger
            x_ptrs += advance * x_stride_n
        x_ptrs = x_first
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (offs_n < N - start)[None, :]
            x = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(OUT).to(ACC)
            tl.store(y_ptrs, normalize(x, maximum, total, LOG).to(OUT), mask=mask)
            x_ptrs += advance * x_stride_n
            y_ptrs += advance * y_stride_n


@triton.jit
def terms(grad, y, LOG: tl.constexpr):
    """What is summed over a row for its gradient."""
    return grad if LOG else grad * y


@triton.jit
def gradient(grad, y, total, LOG: tl.constexpr):
    if LOG:
        grad = grad - tl.exp(y) * total[:, None]
    else:
        grad = y * (grad - total[:, None])
    return grad


@triton.jit
def softmax_backward_kernel(
    grad_y_ptr, y_ptr, grad_x_ptr,
    M, N, size_1, size_2, size_3, size_4,
    grad_y_stride_n, grad_y_stride_0, grad_y_stride_1, grad_y_stride_2, grad_y_stride_3,
    grad_y_stride_4,
    y_stride_n, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    grad_x_stride_n, grad_x_stride_0, grad_x_stride_1, grad_x_stride_2, grad_x_stride_3,
    grad_x_stride_4,
    LOG: tl.constexpr, ONE_BLOCK: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program computes the gradient of BLOCK_M rows from the output y; of rows longer than a
    block it reads every value twice.
    """
    OUT: tl.constexpr = grad_x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    OFFSET: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(OFFSET)
    advance = tl.full((), BLOCK_N, OFFSET)
    mask_m = offs_m < M
    grad_y_offsets = strided_offsets(offs_m, size_1, size_2, size_3, size_4,
                                     grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
                                     grad_y_stride_3, grad_y_stride_4)
    y_offsets = strided_offsets(offs_m, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    grad_x_offsets = strided_offsets(offs_m, size_1, size_2, size_3, size_4,
                                     grad_x_stride_0, grad_x_stride_1, grad_x_stride_2,
                                     grad_x_stride_3, grad_x_stride_4)
    grad_y_ptrs = grad_y_ptr + grad_y_offsets[:, None] + offs_n[None, :] * grad_y_stride_n
    y_ptrs = y_ptr + y_offsets[:, None] + offs_n[None, :] * y_stride_n
    grad_x_ptrs = grad_x_ptr + grad_x_offsets[:, None] + offs_n[None, :] * grad_x_stride_n
    if ONE_BLOCK:
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        grad = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(ACC)
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(ACC)
        total = tl.sum(terms(grad, y, LOG), axis=1)
        tl.store(grad_x_ptrs, gradient(grad, y, total, LOG).to(OUT), mask=mask)
    else:
        grad_y_first = grad_y_ptrs
        y_first = y_ptrs
        sums = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (offs_n < N - start)[None, :]
            grad = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(ACC)
            y = tl.load(y_ptrs, mask=mask, other=0.0).to(ACC)
            sums += terms(grad, y, LOG)
            grad_y_ptrs += advance * grad_y_stride_n
            y_ptrs += advance * y_stride_n
        total = tl.sum(sums, axis=1)
        grad_y_ptrs = grad_y_first
        y_ptrs = y_first
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (offs_n < N - start)[None, :]
            grad = tl.load(grad_y_ptrs, mask=mask, other=0.0).to(ACC)
            y = tl.load(y_ptrs, mask=mask, other=0.0).to(ACC)
            tl.store(grad_x_ptrs, gradient(grad, y, total, LOG).to(OUT), mask=mask)
            grad_y_ptrs += advance * grad_y_stride_n
            y_ptrs += advance * y_stride_n
            grad_x_ptrs += advance * grad_x_stride_n
