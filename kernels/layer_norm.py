"""Layer normalisation of M rows of N elements.

With n = (x - mean) rstd, rstd = 1 / sqrt(var + eps), and g = grad_y weight, row by row

    grad_x = rstd (g - mean(g) - n mean(g n))

A tile is BLOCK_M rows by BLOCK_N columns.  A row that fits into one is read once; a longer one is
cut into slices, whose statistics or sums every later program of the row merges for itself.
VECTOR columns lie together in memory, aligned and masked as one: of a size or a stride Triton
itself sees only whether 16 divides it.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.moments import shifted_moments
from tritorch.kernels.reduce import PROGRAMS
from tritorch.kernels.tiles import strided_offsets, tile_mask


def tiles(elements, widest):
    """Tiles of that many elements, from 128 columns to the widest."""
    return tuple(
        Config({"BLOCK_M": max(elements // columns, 1), "BLOCK_N": columns},
               num_warps=8, num_stages=1, maxnreg=255)
        for columns in (128, 256, 512, 1024, widest)
    )


# by bytes per element: 16 elements per thread are two 128-bit accesses of a 16-bit type, and as
# many of a 64-bit type would not fit into the registers
LAYER_NORM_CONFIGS = {2: tiles(4096, 4096), 4: tiles(4096, 4096), 8: tiles(2048, 2048)}
# tiles that one program of a reduction along a long row sums at least
MIN_STEPS = 2
# slices of a row that are merged at once: all that there can be
BLOCK_S = PROGRAMS


def layer_norm_config(columns, itemsize):
    """The narrowest tile that takes a whole row, else the widest."""
    configs = LAYER_NORM_CONFIGS[itemsize]
    for config in configs:
        if columns <= config.kwargs["BLOCK_N"]:
            return config
    return configs[-1]


@triton.jit
def own_program(INDEX_64: tl.constexpr):
    """The index of this program, as wide as offsets must be."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    return pid


@triton.jit
def column_mask(offs_n, N, VECTOR: tl.constexpr):
    mask = offs_n < N
    if VECTOR > 1:
        mask = tl.max_constancy(mask, [VECTOR])
    return mask


@triton.jit
def together(offsets, VECTOR: tl.constexpr):
    if VECTOR > 1:
        offsets = tl.max_contiguous(offsets, (1, VECTOR))
        offsets = tl.multiple_of(offsets, (1, VECTOR))
    return offsets


@triton.jit
def tile_offsets(
    offs_m, offs_n,
    row_1, row_2, row_3, row_4, column_1, column_2, column_3, column_4,
    row_stride_0, row_stride_1, row_stride_2, row_stride_3, row_stride_4,
    column_stride_0, column_stride_1, column_stride_2, column_stride_3, column_stride_4,
    VECTOR: tl.constexpr,
):
    """Offsets of the tile in a tensor of those strides along its rows and along its columns."""
    rows = strided_offsets(offs_m, row_1, row_2, row_3, row_4,
                           row_stride_0, row_stride_1, row_stride_2, row_stride_3, row_stride_4)
    columns = strided_offsets(offs_n, column_1, column_2, column_3, column_4,
                              column_stride_0, column_stride_1, column_stride_2,
                              column_stride_3, column_stride_4)
    return together(rows[:, None] + columns[None, :], VECTOR)


@triton.jit
def load_columns(ptr, offs_n, mask, OTHER: tl.constexpr, DTYPE: tl.constexpr):
    """One value per column; OTHER where there is no such tensor."""
    if ptr is None:
        values = tl.full(offs_n.shape, OTHER, DTYPE)
    else:
        values = tl.load(ptr + offs_n, mask=mask, other=OTHER).to(DTYPE)
    return values


@triton.jit
def slice_mask(offs_m, offs_s, M, SLICES):
    return (offs_m < M)[:, None] & (offs_s < SLICES)[None, :]


@triton.jit
def layer_norm_stats_kernel(
    x_ptr, statistics_ptr,
    M, N, STEPS, SLICES, row_1, row_2, row_3, row_4, column_1, column_2, column_3, column_4,
    x_row_stride_0, x_row_stride_1, x_row_stride_2, x_row_stride_3, x_row_stride_4,
    x_column_stride_0, x_column_stride_1, x_column_stride_2, x_column_stride_3, x_column_stride_4,
    INDEX_64: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program writes mean and squared deviations of STEPS tiles of its long rows."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    pid = own_program(INDEX_64)
    split = pid % SLICES
    offs_m = pid // SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = split * STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.minimum(N - split * STEPS * BLOCK_N, STEPS * BLOCK_N)

    mask = tile_mask(offs_m, offs_n, M, N, 1, VECTOR)
    offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                           column_1, column_2, column_3, column_4,
                           x_row_stride_0, x_row_stride_1, x_row_stride_2,
                           x_row_stride_3, x_row_stride_4,
                           x_column_stride_0, x_column_stride_1, x_column_stride_2,
                           x_column_stride_3, x_column_stride_4, VECTOR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    # deviations from the mean of the first tile: far from zero the squares would cancel
    shift = tl.sum(x, 1) / tl.minimum(count, BLOCK_N).to(ACC)
    sum1 = tl.where(mask, x - shift[:, None], 0.0)
    sum2 = sum1 * sum1
    for _ in range(1, STEPS):
        offs_n += BLOCK_N
        mask = tile_mask(offs_m, offs_n, M, N, 1, VECTOR)
        offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                               column_1, column_2, column_3, column_4,
                               x_row_stride_0, x_row_stride_1, x_row_stride_2,
                               x_row_stride_3, x_row_stride_4,
                               x_column_stride_0, x_column_stride_1, x_column_stride_2,
                               x_column_stride_3, x_column_stride_4, VECTOR)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        deviation = tl.where(mask, x - shift[:, None], 0.0)
        sum1 += deviation
        sum2 += deviation * deviation

    mean, m2 = shifted_moments(sum1, sum2, shift, count.to(ACC), 1)
    entries = statistics_ptr + (offs_m * SLICES + split) * 2
    tl.store(entries, mean, mask=offs_m < M)
    tl.store(entries + 1, m2, mask=offs_m < M)


@triton.jit
def merged_statistics(
    statistics_ptr, offs_m, M, N, STEPS, SLICES, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Mean and biased variance of each row from those of its slices."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    offs_s = tl.arange(0, BLOCK_S)
    mask = slice_mask(offs_m, offs_s, M, SLICES)
    entries = statistics_ptr + (offs_m[:, None] * SLICES + offs_s[None, :]) * 2
    means = tl.load(entries, mask=mask, other=0.0)
    squares = tl.load(entries + 1, mask=mask, other=0.0)
    count = tl.minimum(N - offs_s * STEPS * BLOCK_N, STEPS * BLOCK_N)
    count = tl.where(offs_s < SLICES, count, 0).to(ACC)[None, :]
    mean = tl.sum(count * means, 1) / N
    deviation = tl.where(mask, means - mean[:, None], 0.0)
    # deviations should average 0: what they average is the rounding error of the mean
    error = tl.sum(count * deviation, 1) / N
    squares = tl.sum(squares + count * deviation * deviation, 1)
    return mean + error, squares / N - error * error


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, statistics_ptr, y_ptr, mean_ptr, rstd_ptr,
    M, N, STEPS, SLICES, row_1, row_2, row_3, row_4, column_1, column_2, column_3, column_4,
    x_row_stride_0, x_row_stride_1, x_row_stride_2, x_row_stride_3, x_row_stride_4,
    x_column_stride_0, x_column_stride_1, x_column_stride_2, x_column_stride_3, x_column_stride_4,
    eps: tl.float64,
    INDEX_64: tl.constexpr, VECTOR: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program normalises a tile: of whole rows, whose statistics it finds, or of long ones."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    pid = own_program(INDEX_64)
    num_n = tl.cdiv(N, BLOCK_N)
    offs_m = pid // num_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = column_mask(offs_n, N, VECTOR)
    mask = tile_mask(offs_m, offs_n, M, N, 1, VECTOR)
    offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                           column_1, column_2, column_3, column_4,
                           x_row_stride_0, x_row_stride_1, x_row_stride_2,
                           x_row_stride_3, x_row_stride_4,
                           x_column_stride_0, x_column_stride_1, x_column_stride_2,
                           x_column_stride_3, x_column_stride_4, VECTOR)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if statistics_ptr is None:
        mean = tl.sum(x, 1) / N
        deviation = tl.where(mask, x - mean[:, None], 0.0)
        # deviations should average 0: what they average is the rounding error of the mean
        error = tl.sum(deviation, 1) / N
        var = tl.sum(deviation * deviation, 1) / N - error * error
        mean += error
    else:
        mean, var = merged_statistics(statistics_ptr, offs_m, M, N, STEPS, SLICES, BLOCK_S, BLOCK_N)
    # rounding may leave a tiny negative variance; NaN stays
    var = tl.where(var < 0, 0.0, var)
    rstd = 1.0 / tl.sqrt(var + eps.to(ACC))
    weight = load_columns(weight_ptr, offs_n, mask_n, 1.0, ACC)
    bias = load_columns(bias_ptr, offs_n, mask_n, 0.0, ACC)
    y = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    y_offsets = together((offs_m * N)[:, None] + offs_n[None, :], VECTOR)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    # the first program of a row writes what is kept
    mask_m = (offs_m < M) & (pid % num_n == 0)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def normalise(x, mean_ptr, rstd_ptr, offs_m, M):
    """(x - mean) * rstd, and rstd, of the rows."""
    mean = tl.load(mean_ptr + offs_m, mask=offs_m < M, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
    return (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def layer_norm_backward_reduce_kernel(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, sums_ptr,
    M, N, STEPS, SLICES, row_1, row_2, row_3, row_4, column_1, column_2, column_3, column_4,
    grad_y_row_stride_0, grad_y_row_stride_1, grad_y_row_stride_2,
    grad_y_row_stride_3, grad_y_row_stride_4,
    grad_y_column_stride_0, grad_y_column_stride_1, grad_y_column_stride_2,
    grad_y_column_stride_3, grad_y_column_stride_4,
    x_row_stride_0, x_row_stride_1, x_row_stride_2, x_row_stride_3, x_row_stride_4,
    x_column_stride_0, x_column_stride_1, x_column_stride_2, x_column_stride_3, x_column_stride_4,
    INDEX_64: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program sums g and g * normalised x, g = grad_y * weight, over STEPS tiles of long rows.
    """
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    pid = own_program(INDEX_64)
    split = pid % SLICES
    offs_m = pid // SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = split * STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    product_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in range(STEPS):
        mask = tile_mask(offs_m, offs_n, M, N, 1, VECTOR)
        offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                               column_1, column_2, column_3, column_4,
                               grad_y_row_stride_0, grad_y_row_stride_1, grad_y_row_stride_2,
                               grad_y_row_stride_3, grad_y_row_stride_4,
                               grad_y_column_stride_0, grad_y_column_stride_1,
                               grad_y_column_stride_2, grad_y_column_stride_3,
                               grad_y_column_stride_4, VECTOR)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        mask_n = column_mask(offs_n, N, VECTOR)
        grad *= load_columns(weight_ptr, offs_n, mask_n, 1.0, ACC)[None, :]
        offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                               column_1, column_2, column_3, column_4,
                               x_row_stride_0, x_row_stride_1, x_row_stride_2,
                               x_row_stride_3, x_row_stride_4,
                               x_column_stride_0, x_column_stride_1, x_column_stride_2,
                               x_column_stride_3, x_column_stride_4, VECTOR)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        normalised, _ = normalise(x, mean_ptr, rstd_ptr, offs_m, M)
        grad_sum += grad
        product_sum += grad * normalised
        offs_n += BLOCK_N
    entries = sums_ptr + (offs_m * SLICES + split) * 2
    tl.store(entries, tl.sum(grad_sum, 1), mask=offs_m < M)
    tl.store(entries + 1, tl.sum(product_sum, 1), mask=offs_m < M)


@triton.jit
def layer_norm_backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, row_sums_ptr, grad_x_ptr, sums_ptr,
    M, N, STEPS, SLICES, row_1, row_2, row_3, row_4, column_1, column_2, column_3, column_4,
    grad_y_row_stride_0, grad_y_row_stride_1, grad_y_row_stride_2,
    grad_y_row_stride_3, grad_y_row_stride_4,
    grad_y_column_stride_0, grad_y_column_stride_1, grad_y_column_stride_2,
    grad_y_column_stride_3, grad_y_column_stride_4,
    x_row_stride_0, x_row_stride_1, x_row_stride_2, x_row_stride_3, x_row_stride_4,
    x_column_stride_0, x_column_stride_1, x_column_stride_2, x_column_stride_3, x_column_stride_4,
    INDEX_64: tl.constexpr, VECTOR: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One program walks STEPS tiles of its columns, one below the other: it writes the gradient of
    x, and the sums of grad_y and grad_y * normalised x over its rows.

    Without row_sums_ptr a tile holds whole rows.
    """
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    pid = own_program(INDEX_64)
    num_n = tl.cdiv(N, BLOCK_N)
    split = pid // num_n
    offs_m = split * STEPS * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = column_mask(offs_n, N, VECTOR)
    weight = load_columns(weight_ptr, offs_n, mask_n, 1.0, ACC)
    grad_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    product_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for _ in range(STEPS):
        mask = tile_mask(offs_m, offs_n, M, N, 1, VECTOR)
        offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                               column_1, column_2, column_3, column_4,
                               grad_y_row_stride_0, grad_y_row_stride_1, grad_y_row_stride_2,
                               grad_y_row_stride_3, grad_y_row_stride_4,
                               grad_y_column_stride_0, grad_y_column_stride_1,
                               grad_y_column_stride_2, grad_y_column_stride_3,
                               grad_y_column_stride_4, VECTOR)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        offsets = tile_offsets(offs_m, offs_n, row_1, row_2, row_3, row_4,
                               column_1, column_2, column_3, column_4,
                               x_row_stride_0, x_row_stride_1, x_row_stride_2,
                               x_row_stride_3, x_row_stride_4,
                               x_column_stride_0, x_column_stride_1, x_column_stride_2,
                               x_column_stride_3, x_column_stride_4, VECTOR)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
        normalised, rstd = normalise(x, mean_ptr, rstd_ptr, offs_m, M)
        if sums_ptr is not None:
            grad_sum += grad
            product_sum += grad * normalised
        if grad_x_ptr is not None:
            grad *= weight[None, :]
            if row_sums_ptr is None:
                grad_mean = tl.sum(grad, 1) / N
                slope = tl.sum(grad * normalised, 1) / N
            else:
                offs_s = tl.arange(0, BLOCK_S)
                mask_s = slice_mask(offs_m, offs_s, M, SLICES)
                entries = row_sums_ptr + (offs_m[:, None] * SLICES + offs_s[None, :]) * 2
                grad_mean = tl.sum(tl.load(entries, mask=mask_s, other=0.0), 1) / N
                slope = tl.sum(tl.load(entries + 1, mask=mask_s, other=0.0), 1) / N
            grad -= grad_mean[:, None] + normalised * slope[:, None]
            grad_x = (grad * rstd[:, None]).to(grad_x_ptr.dtype.element_ty)
            offsets = together((offs_m * N)[:, None] + offs_n[None, :], VECTOR)
            tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
        offs_m += BLOCK_M

    if sums_ptr is not None:
        row = sums_ptr + split * 2 * N + offs_n
        tl.store(row, tl.sum(grad_sum, 0), mask=mask_n)
        tl.store(row + N, tl.sum(product_sum, 0), mask=mask_n)
