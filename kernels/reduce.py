"""Sums: over everything but the channels, and over the partial results of a split reduction, in a
fixed order.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.activation import activate
from tritorch.kernels.tiles import strided_offsets

# elements of the result per program of the split sum
BLOCK = 1024
# partial sums that one program of the sum of many splits reads at once
MANY_BLOCK = 2048

CHANNEL_SUM_CONFIGS = (
    # channels along memory: a row of 64 channels is one to four 128-byte lines
    Config({"BLOCK_R": 64, "BLOCK_C": 64}, num_warps=4, num_stages=3, maxnreg=255),
    # pixels along memory: few channels per program, long rows
    Config({"BLOCK_R": 512, "BLOCK_C": 8}, num_warps=4, num_stages=3, maxnreg=255),
)
# programs wanted: about two per multiprocessor of a large GPU, one constant so that sums repeat
# across GPUs
PROGRAMS = 256


def channel_sum_config(channels_last):
    """Tile of the channel sum: along the channels when they are contiguous, else along the pixels.
    """
    return CHANNEL_SUM_CONFIGS[0 if channels_last else 1]


def num_splits(tiles, steps, min_steps, programs=PROGRAMS):
    """Slices of a reduction of `steps` steps so that `tiles` output tiles fill a GPU, each of
    min_steps at least.
    """
    return max(1, min(programs // max(tiles, 1), steps // min_steps))


@triton.jit
def channel_sum_kernel(
    x_ptr, y_ptr,
    C, R, STEPS, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    INDEX_64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program sums STEPS tiles of BLOCK_R elements of each of its BLOCK_C channels into row
    `split` of y.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split = tl.program_id(1)
    if INDEX_64:
        split = split.to(tl.int64)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_r = split * STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    if INDEX_64:
        offs_r = offs_r.to(tl.int64)
        x_ptrs = x_ptr + offs_c[None, :].to(tl.int64) * x_stride_c
    else:
        x_ptrs = x_ptr + offs_c[None, :] * x_stride_c
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for _ in range(STEPS):
        offsets = strided_offsets(offs_r, size_1, size_2, size_3, size_4,
                                  x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
        mask = (offs_r < R)[:, None] & mask_c[None, :]
        acc += tl.load(x_ptrs + offsets[:, None], mask=mask, other=0.0).to(ACC)
        offs_r += BLOCK_R
    y = tl.sum(acc, axis=0)
    tl.store(y_ptr + split * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def split_sum_kernel(
    x_ptr, bias_ptr, y_ptr, preactivation_ptr, residual_ptr,
    NUMEL, SPLITS, COLUMNS, bias_stride, residual_along,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_PREACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds BLOCK elements of the SPLITS rows of x in order, then the bias of their
    column and a residual, and rounds once.  KEEPS_PREACTIVATION stores what the activation is
    applied to, too.  `residual_along` is None where the residual is laid out as y, else sizes and
    strides as `strided_offsets` takes them.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    acc = tl.zeros((BLOCK,), dtype=x_ptr.dtype.element_ty)
    for _ in range(SPLITS):
        acc += tl.load(x_ptr + index, mask=mask, other=0.0)
        x_ptr += NUMEL
    if HAS_BIAS:
        acc += tl.load(bias_ptr + index % COLUMNS * bias_stride, mask=mask, other=0.0).to(acc.dtype)
    if residual_ptr is not None:
        offsets = index
        if residual_along is not None:
            (size_1, size_2, size_3, size_4,
             stride_0, stride_1, stride_2, stride_3, stride_4) = residual_along
            offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                      stride_0, stride_1, stride_2, stride_3, stride_4)
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc.dtype)
    if KEEPS_PREACTIVATION:
        tl.store(preactivation_ptr + index, acc.to(preactivation_ptr.dtype.element_ty), mask=mask)
    acc = activate(acc, ACTIVATION)
    tl.store(y_ptr + index, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def many_splits_sum_kernel(
    x_ptr, y_ptr,
    NUMEL, SPLITS,
    size_1, size_2, size_3, size_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program adds BLOCK elements of the SPLITS rows of x, and rounds once.

    BLOCK_S partial sums run side by side, so that many loads are in flight; the order depends on
    SPLITS alone.
    """
    # below 2^31 here, where 64 bits would take the registers of the loads in flight
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK), dtype=x_ptr.dtype.element_ty)
    for first in range(0, SPLITS, BLOCK_S):
        inside = (first + offs_s < SPLITS)[:, None] & mask[None, :]
        rows = (first + offs_s).to(tl.int64)[:, None] * NUMEL
        acc += tl.load(x_ptr + rows + index[None, :], mask=inside, other=0.0)
    y = tl.sum(acc, axis=0)
    offsets = strided_offsets(index.to(tl.int64), size_1, size_2, size_3, size_4,
                              y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
