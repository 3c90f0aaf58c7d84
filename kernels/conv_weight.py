"""The gradient of a filter as an implicit matrix product, summed over all pixels.

Letters, units and `depth` are those of conv.py.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.pixels import (
    corner_offset,
    in_units,
    inside,
    next_corner,
    pixels_of_tile,
    tile_axes,
)


def _tile(k, crs, npq, num_warps, num_stages, maxnreg=None):
    blocks = {"BLOCK_K": k, "BLOCK_CRS": crs, "BLOCK_NPQ": npq}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


# by bytes per element
CONV2D_GRAD_WEIGHT_CONFIGS = {
    2: (_tile(128, 128, 64, 8, 3), _tile(64, 128, 64, 4, 3), _tile(64, 64, 64, 4, 4)),
    4: (_tile(64, 64, 32, 4, 3, 255),),
    8: (_tile(32, 32, 16, 4, 2, 255),),
}

# beside 128 columns four warps have no registers for the walk through a volume
CONV3D_GRAD_WEIGHT_CONFIGS = {
    itemsize: configs[::2] for itemsize, configs in CONV2D_GRAD_WEIGHT_CONFIGS.items()
}

CONV2D_GRAD_WEIGHT_GATHER_CONFIGS = {
    2: (_tile(64, 64, 32, 8, 3, 255), _tile(32, 32, 32, 8, 3, 255)),
    4: (_tile(64, 64, 32, 8, 3, 255), _tile(32, 32, 32, 8, 3, 255)),
    8: (_tile(32, 32, 16, 4, 2, 255),),
}

# splits that are summed side by side
SPLITS_AT_ONCE = 8


def conv2d_grad_weight_config(k, crs, itemsize):
    """The largest tile that is not mostly empty: splitting the sum over pixels fills the GPU."""
    return _largest(CONV2D_GRAD_WEIGHT_CONFIGS[itemsize], k, crs)


def conv3d_grad_weight_config(k, crs, itemsize):
    """As `conv2d_grad_weight_config`, for volumes."""
    return _largest(CONV3D_GRAD_WEIGHT_CONFIGS[itemsize], k, crs)


def _largest(configs, k, crs):
    for config in configs[:-1]:
        if k > config.kwargs["BLOCK_K"] // 2 and crs > config.kwargs["BLOCK_CRS"] // 2:
            return config
    return configs[-1]


def conv2d_grad_weight_gather_config(k, crs, itemsize):
    """The larger tile unless it is mostly empty."""
    return CONV2D_GRAD_WEIGHT_GATHER_CONFIGS[itemsize][-1 if k <= 32 or crs <= 32 else 0]


@triton.jit(do_not_specialize=["N", "H", "W", "P", "STEPS", "SPLITS", "padding_h"])
def conv2d_grad_weight_kernel(
    grad_y_ptr, x_ptr, grad_w_ptr,
    C, H, W, K, R, S, N, P, Q, block_p, block_q, STEPS, SPLITS,
    grad_y_stride_n, grad_y_stride_k, grad_y_stride_p, grad_y_stride_q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    grad_w_stride_split, grad_w_stride_k, grad_w_stride_c, grad_w_stride_r, grad_w_stride_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    depth,
    FLAT_C: tl.constexpr, UNIT: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, X_CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr, BLOCK_NPQ: tl.constexpr,
):
    """One program sums BLOCK_K channels x BLOCK_CRS (tap, channel) pairs over STEPS pixel tiles.

    A tile is block_p x block_q pixels of BLOCK_NPQ / (block_p * block_q) images.  Its pixels keep
    their places around its corner, and the next tile moves the three numbers of the corner, where
    a flat index of pixels would be divided anew.  FLAT_C and UNIT are as in `conv2d_kernel`.
    A tile of a volume lies in one slice, and its program knows one slice of taps.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C *= UNIT
    K *= UNIT
    if FLAT_C:
        C = FLAT_C
    x_stride_n, x_stride_h, x_stride_w = in_units(
        UNIT, INDEX_64, x_stride_n, x_stride_h, x_stride_w)
    grad_y_stride_n, grad_y_stride_p, grad_y_stride_q = in_units(
        UNIT, INDEX_64, grad_y_stride_n, grad_y_stride_p, grad_y_stride_q)
    if depth is not None:
        (D, T, Z, grad_y_stride_z, x_stride_d, grad_w_stride_t,
         stride_d, padding_d, dilation_d) = depth
        grad_y_stride_z, x_stride_d, _ = in_units(
            UNIT, INDEX_64, grad_y_stride_z, x_stride_d, x_stride_d)
    num_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_crs = tl.program_id(0) // num_k
    if depth is not None:
        # one slice of taps, which is the same for all columns
        t = pid_crs % T
        pid_crs = pid_crs // T
        tap_d = t * dilation_d - padding_d
        grad_w_ptr += t.to(tl.int64) * grad_w_stride_t
    split = tl.program_id(1) % SPLITS
    group = (tl.program_id(1) // SPLITS).to(tl.int64)
    grad_y_ptr += group * K * grad_y_stride_k
    x_ptr += group * C * x_stride_c
    grad_w_ptr += split.to(tl.int64) * grad_w_stride_split + group * K * grad_w_stride_k
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_crs = pid_crs * BLOCK_CRS + tl.arange(0, BLOCK_CRS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # and all offsets that follow from them
        offs_k = offs_k.to(tl.int64)
        offs_crs = offs_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < K
    mask_crs = offs_crs < C * R * S
    offs_c = offs_crs % C
    offs_r = offs_crs // C // S
    offs_s = offs_crs // C % S
    block_n = BLOCK_NPQ // (block_p * block_q)
    offs_n, offs_p, offs_q = pixels_of_tile(offs_npq, block_p, block_q)

    grad_y_rows = offs_n * grad_y_stride_n + offs_p * grad_y_stride_p + offs_q * grad_y_stride_q
    rows, columns = tile_axes(grad_y_rows, offs_k * grad_y_stride_k, Y_CHANNELS_LAST)
    grad_y_offsets = rows + columns
    rows, columns = tile_axes(offs_n * x_stride_n, offs_c * x_stride_c, X_CHANNELS_LAST)
    rows_h, taps_h = tile_axes(offs_p * stride_h, offs_r * dilation_h - padding_h, X_CHANNELS_LAST)
    rows_w, taps_w = tile_axes(offs_q * stride_w, offs_s * dilation_w - padding_w, X_CHANNELS_LAST)
    x_h = rows_h + taps_h
    x_w = rows_w + taps_w
    x_offsets = (rows + rows_h * x_stride_h + rows_w * x_stride_w
                 + (columns + taps_h * x_stride_h + taps_w * x_stride_w))

    num_p = tl.cdiv(P, block_p)
    num_q = tl.cdiv(Q, block_q)
    begin = split * STEPS
    n = begin // (num_p * num_q) * block_n
    if depth is not None:
        n = begin // (num_p * num_q * Z) * block_n
        z = begin // (num_p * num_q) % Z
    p = begin // num_q % num_p * block_p
    q = begin % num_q * block_q
    acc = tl.zeros((BLOCK_K, BLOCK_CRS), dtype=ACC)
    # at least one step, all masked where there is none: on Hopper ptxas overlaps no products of a
    # loop that may not run
    for _ in range(max(STEPS, 1)):
        mask_npq = (offs_n < N - n) & (offs_p < P - p) & (offs_q < Q - q)
        pixels, channels = tile_axes(mask_npq, mask_k, Y_CHANNELS_LAST)
        corner = corner_offset(n, p, q, grad_y_stride_n, grad_y_stride_p, grad_y_stride_q)
        if depth is not None:
            corner += z.to(tl.int64) * grad_y_stride_z
        grad_y = tl.load(grad_y_ptr + corner + grad_y_offsets, mask=pixels & channels, other=0.0)
        if Y_CHANNELS_LAST:
            grad_y = tl.trans(grad_y)
        if depth is not None:
            x_d = z * stride_d + tap_d
            mask_npq &= inside(x_d, D)
        pixels, channels = tile_axes(mask_npq, mask_crs, X_CHANNELS_LAST)
        mask = pixels & channels & inside(x_h + p * stride_h, H) & inside(x_w + q * stride_w, W)
        corner = corner_offset(n, p * stride_h, q * stride_w, x_stride_n, x_stride_h, x_stride_w)
        if depth is not None:
            corner += x_d.to(tl.int64) * x_stride_d
        x = tl.load(x_ptr + corner + x_offsets, mask=mask, other=0.0)
        if not X_CHANNELS_LAST:
            x = tl.trans(x)
        acc = tl.dot(grad_y, x, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if depth is None:
            n, p, q = next_corner(n, p, q, P, Q, block_n, block_p, block_q)
        else:
            z, p, q = next_corner(z, p, q, P, Q, 1, block_p, block_q)
            volume_ends = z == Z
            z = tl.where(volume_ends, 0, z)
            n += tl.where(volume_ends, block_n, 0)

    rows = offs_k * grad_w_stride_k
    columns = offs_c * grad_w_stride_c + offs_r * grad_w_stride_r + offs_s * grad_w_stride_s
    grad_w = acc.to(grad_w_ptr.dtype.element_ty)
    mask = mask_k[:, None] & mask_crs[None, :]
    tl.store(grad_w_ptr + (rows[:, None] + columns[None, :]), grad_w, mask=mask)
