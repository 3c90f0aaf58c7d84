"""Statistics of batch normalisation: the moments of slices of a batch, and their merging.

R, the tiles and VECTOR_R by VECTOR_C are those of batch_norm.py; S counts the slices.
"""

import triton
import triton.language as tl

from tritorch.kernels.batch_norm import own_tile, tile_offsets
from tritorch.kernels.moments import shifted_moments
from tritorch.kernels.tiles import tile_mask

# slices and channels that one program merges at a time; with 256 slices Triton 3.9 crashes while
# it compiles for sm_90, where the channels are no multiple of 16
BLOCK_S = 128
BLOCK_C = 16
MERGE_WARPS = 8
# of more slices than this, groups are merged first: few channels make few programs
MAX_SLICES = 512


def slices_of_group(slices):
    """Slices in a group, so that one program can merge all groups in one step."""
    return BLOCK_S * triton.cdiv(slices, BLOCK_S * BLOCK_S)


@triton.jit(do_not_specialize=["R", "STEPS"])
def batch_norm_stats_kernel(
    x_ptr, moments_ptr,
    C, R, STEPS, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program writes the moments of STEPS tiles of its channels."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split, offs_r, offs_c = own_tile(C, STEPS, INDEX_64, BLOCK_R, BLOCK_C)
    mask_c = offs_c < C
    count = tl.minimum(R - split * STEPS * BLOCK_R, STEPS * BLOCK_R)

    mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
    offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                           x_stride_c, x_stride_0, x_stride_1,
                           x_stride_2, x_stride_3, x_stride_4,
                           VECTOR_R, VECTOR_C)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    # deviations from the mean of the first tile: far from zero the squares would cancel, and from
    # this shift they are at most 1 + STEPS times the result
    shift = tl.sum(x, 0) / tl.minimum(count, BLOCK_R).to(ACC)
    # an infinite value makes the mean infinite, as in torch, and not NaN
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    sum1 = tl.where(mask, x - shift[None, :], 0.0)
    sum2 = sum1 * sum1
    for _ in tl.range(1, STEPS, num_stages=STAGES):
        offs_r += BLOCK_R
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               x_stride_c, x_stride_0, x_stride_1,
                               x_stride_2, x_stride_3, x_stride_4,
                               VECTOR_R, VECTOR_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        deviation = tl.where(mask, x - shift[None, :], 0.0)
        sum1 += deviation
        sum2 += deviation * deviation

    count = count.to(ACC)
    mean, m2 = shifted_moments(sum1, sum2, shift, count, 0)
    row = moments_ptr + split * 3 * C + offs_c
    tl.store(row, mean, mask=mask_c)
    tl.store(row + C, m2, mask=mask_c)
    tl.store(row + 2 * C, tl.zeros_like(m2) + count, mask=mask_c)


@triton.jit
def move_running(ptr, stride, offs_c, mask_c, value, momentum):
    """(1 - momentum) * running + momentum * value, in float64, so that it is rounded once."""
    ptrs = ptr + offs_c.to(tl.int64) * stride
    running = tl.load(ptrs, mask=mask_c, other=0.0).to(tl.float64)
    running = (1.0 - momentum) * running + momentum * value.to(tl.float64)
    tl.store(ptrs, running.to(ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["S"])
def batch_norm_gather_stats_kernel(
    moments_ptr, running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, merged_ptr,
    S, C,
    running_mean_stride, running_var_stride, STEP,
    momentum: tl.float64,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program merges the S slices of its channels and moves their running statistics, once.

    Merged by the formulas of Chan, Golub and LeVeque (1979): with n elements of mean m in a slice,
    squared deviations are the sum of the slices' own and of n (m - mean)^2.  With merged_ptr it
    writes moments, as of one slice; with STEP, programs along the second axis merge STEP slices
    each.
    """
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if STEP is not None:
        first = tl.program_id(1) * STEP
        moments_ptr += first.to(tl.int64) * 3 * C
        merged_ptr += tl.program_id(1) * 3 * C
        S = tl.minimum(S - first, STEP)
    offs_s = tl.arange(0, BLOCK_S)
    count = tl.zeros((BLOCK_S, BLOCK_C), dtype=ACC)
    total = tl.zeros((BLOCK_S, BLOCK_C), dtype=ACC)
    for start in range(0, S, BLOCK_S):
        mask = (start + offs_s < S)[:, None] & mask_c[None, :]
        rows = moments_ptr + (start + offs_s)[:, None] * 3 * C + offs_c[None, :]
        n = tl.load(rows + 2 * C, mask=mask, other=0.0)
        count += n
        total += n * tl.load(rows, mask=mask, other=0.0)
    count = tl.where(mask_c, tl.sum(count, 0), 2.0)
    mean = tl.sum(total, 0) / count

    m2 = tl.zeros((BLOCK_S, BLOCK_C), dtype=ACC)
    drift = tl.zeros((BLOCK_S, BLOCK_C), dtype=ACC)
    for start in range(0, S, BLOCK_S):
        mask = (start + offs_s < S)[:, None] & mask_c[None, :]
        rows = moments_ptr + (start + offs_s)[:, None] * 3 * C + offs_c[None, :]
        n = tl.load(rows + 2 * C, mask=mask, other=0.0)
        deviation = tl.load(rows, mask=mask, other=0.0) - mean[None, :]
        m2 += tl.load(rows + C, mask=mask, other=0.0) + n * deviation * deviation
        drift += n * deviation
    # deviations should average 0: what they average is the rounding error of the mean
    error = tl.sum(drift, 0) / count
    squares = tl.sum(m2, 0) - count * error * error
    # rounding may leave a tiny negative sum; NaN stays
    squares = tl.where(squares < 0, 0.0, squares)
    mean = tl.where(error == error, mean + error, mean)
    if merged_ptr is not None:
        tl.store(merged_ptr + offs_c, mean, mask=mask_c)
        tl.store(merged_ptr + C + offs_c, squares, mask=mask_c)
        tl.store(merged_ptr + 2 * C + offs_c, count, mask=mask_c)
    else:
        tl.store(mean_ptr + offs_c, mean, mask=mask_c)
        tl.store(var_ptr + offs_c, squares / count, mask=mask_c)
    if running_mean_ptr is not None:
        move_running(running_mean_ptr, running_mean_stride, offs_c, mask_c, mean, momentum)
        unbiased = squares / (count - 1.0)
        move_running(running_var_ptr, running_var_stride, offs_c, mask_c, unbiased, momentum)
