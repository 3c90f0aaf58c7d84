"""Group normalisation of N images of C channels, in G groups, and R pixels.

With n = (x - mean) rstd, rstd = 1 / sqrt(var + eps), and g = grad_y weight, per image and group

    grad_x = rstd (g - mean(g) - n mean(g n))

A tile is BLOCK_R pixels by BLOCK_C channels of one image, along either, whichever is contiguous.
Sums are taken per channel and slice of the pixels, and merged over the channels of a group, so that
the same sums make the gradients of weight and bias.  VECTOR_R by VECTOR_C elements lie together in
memory, aligned and masked as one.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.moments import shifted_moments
from tritorch.kernels.tiles import load_channels, strided_offsets, tile_mask


def tiles(rows):
    """Tiles of 64 * rows elements."""
    shapes = (
        (rows, 64),
        # few pixels, of contiguous channels
        (rows // 4, 256),
        # many contiguous pixels
        (16 * rows, 4),
    )
    return tuple(
        Config({"BLOCK_R": r, "BLOCK_C": c}, num_warps=8, num_stages=1, maxnreg=255)
        for r, c in shapes
    )


# by bytes per element: 16 elements per thread are two 128-bit accesses of a 16-bit type, and as
# many of a 64-bit type would not fit into the registers
GROUP_NORM_CONFIGS = {2: tiles(64), 4: tiles(64), 8: tiles(32)}
# tiles that one program of a reduction sums at least
MIN_STEPS = 2
# groups that one program merges, and sums of each at once
BLOCK_G = 8
BLOCK_K = 128


def group_norm_config(channels_last, pixels, itemsize):
    """A tile along channels that are contiguous, else along the pixels; no longer than they are."""
    configs = GROUP_NORM_CONFIGS[itemsize]
    if channels_last:
        return configs[0 if pixels > 16 else 1]
    return configs[2 if pixels > 256 else 0]


@triton.jit
def own_tile(
    C, STEPS, SLICES, INDEX_64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Image, slice, first pixels and channels of this program; the channels run fastest."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    num_c = tl.cdiv(C, BLOCK_C)
    offs_c = pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // num_c % SLICES
    offs_r = split * STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    return pid // num_c // SLICES, split, offs_r, offs_c


@triton.jit
def tile_offsets(
    n, offs_r, offs_c, size_1, size_2, stride_n, stride_c, stride_0, stride_1, stride_2,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr,
):
    """Offsets of the tile of image n in a tensor of those strides."""
    pixels = strided_offsets(offs_r, size_1, size_2, 1, 1, stride_0, stride_1, stride_2, 0, 0)
    offsets = (n * stride_n + pixels)[:, None] + (offs_c * stride_c)[None, :]
    if VECTOR_R * VECTOR_C > 1:
        offsets = tl.max_contiguous(offsets, (VECTOR_R, VECTOR_C))
        offsets = tl.multiple_of(offsets, (VECTOR_R, VECTOR_C))
    return offsets


@triton.jit
def load_groups(ptr, n, offs_c, C, G, STRIDE: tl.constexpr):
    """The value of its group of image n for each channel; STRIDE values to a group."""
    groups = n * G + offs_c // (C // G)
    return tl.load(ptr + groups * STRIDE, mask=offs_c < C, other=0.0)


@triton.jit
def group_norm_stats_kernel(
    x_ptr, statistics_ptr,
    C, R, STEPS, SLICES, size_1, size_2,
    x_stride_n, x_stride_c, x_stride_0, x_stride_1, x_stride_2,
    INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program writes mean and squared deviations of STEPS tiles of its channels."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    n, split, offs_r, offs_c = own_tile(C, STEPS, SLICES, INDEX_64, BLOCK_R, BLOCK_C)
    count = tl.minimum(R - split * STEPS * BLOCK_R, STEPS * BLOCK_R)
    mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
    offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, x_stride_n, x_stride_c,
                           x_stride_0, x_stride_1, x_stride_2, VECTOR_R, VECTOR_C)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    # deviations from the mean of the first tile: far from zero the squares would cancel
    shift = tl.sum(x, 0) / tl.minimum(count, BLOCK_R).to(ACC)
    sum1 = tl.where(mask, x - shift[None, :], 0.0)
    sum2 = sum1 * sum1
    for _ in range(1, STEPS):
        offs_r += BLOCK_R
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, x_stride_n, x_stride_c,
                               x_stride_0, x_stride_1, x_stride_2, VECTOR_R, VECTOR_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        deviation = tl.where(mask, x - shift[None, :], 0.0)
        sum1 += deviation
        sum2 += deviation * deviation

    mean, m2 = shifted_moments(sum1, sum2, shift, count.to(ACC), 0)
    row = statistics_ptr + (n * SLICES + split) * 2 * C + offs_c
    tl.store(row, mean, mask=offs_c < C)
    tl.store(row + C, m2, mask=offs_c < C)


@triton.jit
def own_groups(INDEX_64: tl.constexpr, BLOCK_G: tl.constexpr):
    """The groups of this program, counted over all images."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    return pid * BLOCK_G + tl.arange(0, BLOCK_G)


@triton.jit
def group_entries(offs_g, offs_k, GROUPS, C, G, SLICES):
    """Offsets of the sums number offs_k of each group, the slices of its channels, and a mask."""
    channels = C // G
    n, first_c = offs_g // G, offs_g % G * channels
    offsets = (n * SLICES * 2 * C + first_c)[:, None]
    offsets += (offs_k // channels * 2 * C + offs_k % channels)[None, :]
    return offsets, (offs_g < GROUPS)[:, None] & (offs_k < SLICES * channels)[None, :]


@triton.jit
def group_norm_gather_stats_kernel(
    statistics_ptr, mean_ptr, rstd_ptr,
    GROUPS, C, G, R, STEPS, SLICES,
    eps: tl.float64,
    INDEX_64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program merges the channels and slices of its groups."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    offs_g = own_groups(INDEX_64, BLOCK_G)
    total = tl.zeros((BLOCK_G, BLOCK_K), dtype=ACC)
    for start in range(0, SLICES * (C // G), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        offsets, mask = group_entries(offs_g, offs_k, GROUPS, C, G, SLICES)
        split = offs_k // (C // G)
        count = tl.minimum(R - split * STEPS * BLOCK_R, STEPS * BLOCK_R).to(ACC)
        total += count[None, :] * tl.load(statistics_ptr + offsets, mask=mask, other=0.0)
    mean = tl.sum(total, 1) / (C // G) / R

    squares = tl.zeros((BLOCK_G, BLOCK_K), dtype=ACC)
    drift = tl.zeros((BLOCK_G, BLOCK_K), dtype=ACC)
    for start in range(0, SLICES * (C // G), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        offsets, mask = group_entries(offs_g, offs_k, GROUPS, C, G, SLICES)
        split = offs_k // (C // G)
        count = tl.minimum(R - split * STEPS * BLOCK_R, STEPS * BLOCK_R).to(ACC)
        means = tl.load(statistics_ptr + offsets, mask=mask, other=0.0)
        deviation = tl.where(mask, means - mean[:, None], 0.0)
        squares += tl.load(statistics_ptr + C + offsets, mask=mask, other=0.0)
        squares += count[None, :] * deviation * deviation
        drift += count[None, :] * deviation
    # deviations should average 0: what they average is the rounding error of the mean
    error = tl.sum(drift, 1) / (C // G) / R
    var = tl.sum(squares, 1) / (C // G) / R - error * error
    # rounding may leave a tiny negative variance; NaN stays
    var = tl.where(var < 0, 0.0, var)
    tl.store(mean_ptr + offs_g, mean + error, mask=offs_g < GROUPS)
    tl.store(rstd_ptr + offs_g, 1.0 / tl.sqrt(var + eps.to(ACC)), mask=offs_g < GROUPS)


@triton.jit
def group_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr,
    C, G, R, STEPS, SLICES, size_1, size_2,
    x_stride_n, x_stride_c, x_stride_0, x_stride_1, x_stride_2,
    y_stride_n, y_stride_c, y_stride_0, y_stride_1, y_stride_2,
    INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program normalises STEPS tiles of its channels."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    n, _, offs_r, offs_c = own_tile(C, STEPS, SLICES, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_groups(mean_ptr, n, offs_c, C, G, 1)
    scale = load_groups(rstd_ptr, n, offs_c, C, G, 1)
    scale *= load_channels(weight_ptr, offs_c, C, 1.0, ACC)
    bias = load_channels(bias_ptr, offs_c, C, 0.0, ACC)
    for _ in range(STEPS):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, x_stride_n, x_stride_c,
                               x_stride_0, x_stride_1, x_stride_2, VECTOR_R, VECTOR_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, y_stride_n, y_stride_c,
                               y_stride_0, y_stride_1, y_stride_2, VECTOR_R, VECTOR_C)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        offs_r += BLOCK_R


@triton.jit
def group_norm_backward_reduce_kernel(
    grad_y_ptr, x_ptr, mean_ptr, rstd_ptr, sums_ptr,
    C, G, R, STEPS, SLICES, size_1, size_2,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
    x_stride_n, x_stride_c, x_stride_0, x_stride_1, x_stride_2,
    INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program sums grad_y and grad_y * normalised x over STEPS tiles of its channels."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    n, split, offs_r, offs_c = own_tile(C, STEPS, SLICES, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_groups(mean_ptr, n, offs_c, C, G, 1)
    rstd = load_groups(rstd_ptr, n, offs_c, C, G, 1)
    grad_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    product_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for _ in range(STEPS):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, grad_y_stride_n, grad_y_stride_c,
                               grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
                               VECTOR_R, VECTOR_C)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, x_stride_n, x_stride_c,
                               x_stride_0, x_stride_1, x_stride_2, VECTOR_R, VECTOR_C)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        grad_sum += grad
        product_sum += grad * (x - mean[None, :])
        offs_r += BLOCK_R
    row = sums_ptr + (n * SLICES + split) * 2 * C + offs_c
    tl.store(row, tl.sum(grad_sum, 0), mask=offs_c < C)
    tl.store(row + C, tl.sum(product_sum, 0) * rstd, mask=offs_c < C)


@triton.jit
def group_norm_gather_sums_kernel(
    sums_ptr, weight_ptr, means_ptr,
    GROUPS, C, G, R, SLICES,
    INDEX_64: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program averages both products over its groups, each channel times its weight."""
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    offs_g = own_groups(INDEX_64, BLOCK_G)
    grad_sum = tl.zeros((BLOCK_G, BLOCK_K), dtype=ACC)
    product_sum = tl.zeros((BLOCK_G, BLOCK_K), dtype=ACC)
    for start in range(0, SLICES * (C // G), BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        offsets, mask = group_entries(offs_g, offs_k, GROUPS, C, G, SLICES)
        grads = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        products = tl.load(sums_ptr + C + offsets, mask=mask, other=0.0)
        if weight_ptr is not None:
            offs_c = (offs_g % G * (C // G))[:, None] + (offs_k % (C // G))[None, :]
            weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(ACC)
            grads *= weight
            products *= weight
        grad_sum += grads
        product_sum += products
    means_ptrs = means_ptr + offs_g * 2
    tl.store(means_ptrs, tl.sum(grad_sum, 1) / (C // G) / R, mask=offs_g < GROUPS)
    tl.store(means_ptrs + 1, tl.sum(product_sum, 1) / (C // G) / R, mask=offs_g < GROUPS)


@triton.jit
def group_norm_grad_input_kernel(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, grad_x_ptr,
    C, G, R, STEPS, SLICES, size_1, size_2,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
    x_stride_n, x_stride_c, x_stride_0, x_stride_1, x_stride_2,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_0, grad_x_stride_1, grad_x_stride_2,
    INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes STEPS tiles of the gradient of x."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    n, _, offs_r, offs_c = own_tile(C, STEPS, SLICES, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_groups(mean_ptr, n, offs_c, C, G, 1)
    rstd = load_groups(rstd_ptr, n, offs_c, C, G, 1)
    weight = load_channels(weight_ptr, offs_c, C, 1.0, ACC)
    grad_mean = load_groups(means_ptr, n, offs_c, C, G, 2)
    slope = load_groups(means_ptr + 1, n, offs_c, C, G, 2) * rstd
    for _ in range(STEPS):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, grad_y_stride_n, grad_y_stride_c,
                               grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
                               VECTOR_R, VECTOR_C)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC) * weight[None, :]
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, x_stride_n, x_stride_c,
                               x_stride_0, x_stride_1, x_stride_2, VECTOR_R, VECTOR_C)
        deviation = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
        grad -= grad_mean[None, :] + deviation * slope[None, :]
        grad_x = (grad * rstd[None, :]).to(grad_x_ptr.dtype.element_ty)
        offsets = tile_offsets(n, offs_r, offs_c, size_1, size_2, grad_x_stride_n, grad_x_stride_c,
                               grad_x_stride_0, grad_x_stride_1, grad_x_stride_2,
                               VECTOR_R, VECTOR_C)
        tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
        offs_r += BLOCK_R
