"""Convolution as an implicit matrix product, and the transposed one, which is its gradient.

Pixels of y are rows, channels of y columns, and the inner axis is all (tap, channel of x) pairs: a
program gathers its tile of that matrix from x as it goes, and no such matrix is stored.

The letters follow the step that a kernel takes, in whatever direction: channels `C` are read and
`K` written, both per group; the image that is read is H x W, the one that is written P x Q.  A
volume adds the depths `D` read and `Z` written, and `T` slices of R x S taps.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.pixels import (
    in_units,
    inside,
    next_slice,
    pixels_of_axis,
    store_pixels,
    taps_of_axis,
    tile_axes,
)


def _tile(npq, k, crs, num_warps, num_stages, maxnreg=None):
    blocks = {"BLOCK_NPQ": npq, "BLOCK_K": k, "BLOCK_CRS": crs}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


# by bytes per element: 16-bit operands feed tensor cores, float32 runs TF32 or plain FMA; with a
# limit of 255 registers ptxas does not aim for an occupancy that would spill a few scalars
CONV2D_CONFIGS = {
    2: (
        _tile(128, 128, 64, 8, 3, 255),
        _tile(128, 64, 64, 4, 3, 255),
        _tile(64, 64, 64, 4, 4, 255),
        _tile(128, 32, 64, 4, 3, 255),
    ),
    4: (
        _tile(128, 128, 32, 8, 3, 255),
        _tile(128, 64, 32, 8, 3, 255),
        _tile(64, 64, 32, 4, 3, 255),
        _tile(128, 32, 16, 8, 3, 255),
    ),
    8: (_tile(64, 32, 16, 4, 2, 255),),
}

# float32 that is not TF32: products are FMA, whose operands take the registers of the deeper tiles
CONV2D_FULL_CONFIGS = {
    4: (
        _tile(128, 128, 16, 8, 3, 255),
        _tile(128, 64, 32, 8, 3, 255),
        _tile(64, 64, 16, 4, 3, 255),
        _tile(128, 32, 16, 8, 3, 255),
    ),
}

CONV2D_FULL_EPILOGUE_CONFIGS = {
    4: (
        _tile(128, 64, 16, 8, 3, 255),
        _tile(64, 64, 16, 8, 3, 255),
        _tile(128, 32, 16, 8, 3, 255),
    ),
}

# only these have registers left for the walk through a volume
CONV3D_FULL_CONFIGS = {itemsize: configs[1::2] for itemsize, configs in CONV2D_FULL_CONFIGS.items()}

# for operands gathered element by element: each has an address of its own, so fewer per thread
CONV2D_GATHER_CONFIGS = {
    2: (_tile(128, 64, 32, 8, 3, 255), _tile(64, 32, 32, 4, 3, 255)),
    4: (_tile(64, 64, 16, 8, 3, 255), _tile(64, 32, 16, 4, 3, 255)),
    8: (_tile(32, 32, 16, 8, 2, 255),),
}

# tiles that keep most multiprocessors of a large GPU busy
ENOUGH_TILES = 96


def conv2d_config(npq, k, groups, itemsize):
    """The largest tile that is not mostly empty and of which there are enough."""
    configs = CONV2D_CONFIGS[itemsize]
    return configs[-1] if itemsize == 8 else _largest(configs, npq, k, groups)


def conv2d_full_config(npq, k, groups, itemsize):
    """As `conv2d_config`, for float32 in full precision."""
    return _largest(CONV2D_FULL_CONFIGS[itemsize], npq, k, groups)


def conv2d_full_epilogue_config(npq, k, groups, itemsize):
    """As `conv2d_full_config`, where the epilogue computes or gathers a residual; volumes too."""
    return _largest(CONV2D_FULL_EPILOGUE_CONFIGS[itemsize], npq, k, groups)


def conv3d_full_config(npq, k, groups, itemsize):
    """As `conv2d_full_config`, for volumes."""
    return _largest(CONV3D_FULL_CONFIGS[itemsize], npq, k, groups)


def _largest(configs, npq, k, groups):
    if k <= 32:
        return configs[-1]
    for config in configs[:-2]:
        sizes = config.kwargs
        tiles = triton.cdiv(npq, sizes["BLOCK_NPQ"]) * triton.cdiv(k, sizes["BLOCK_K"]) * groups
        if tiles >= ENOUGH_TILES and k > sizes["BLOCK_K"] // 2:
            return config
    return configs[-2]


def conv2d_gather_config(npq, k, itemsize):
    """The larger tile unless it is mostly empty."""
    return CONV2D_GATHER_CONFIGS[itemsize][-1 if npq <= 64 or k <= 32 else 0]


@triton.jit
def flat_taps(offs_crs, C, num_r, num_s):
    """Which (tap, channel) pairs number `offs_crs` there are, and their channel, row and column."""
    mask = offs_crs < C * num_r * num_s
    # a residue may have no taps: divisors are 1 at least
    return mask, offs_crs % C, offs_crs // C // max(num_s, 1), offs_crs // C % max(num_s, 1)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "STEPS", "SPLITS", "padding_h"])
def conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, preactivation_ptr, residual_ptr,
    N, C, H, W, K, R, S, P, Q, STEPS, SPLITS, bias_stride,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    w_stride_group, w_stride_k, w_stride_c, w_stride_r, w_stride_s,
    y_stride_split, y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    depth, residual_strides,
    TRANSPOSED: tl.constexpr, FLAT_C: tl.constexpr, UNIT: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEPS_PREACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
):
    """One program computes BLOCK_NPQ pixels x BLOCK_K channels of y over STEPS slices of x and w.

    A slice is BLOCK_CRS channels of one tap or, where C = FLAT_C channels would leave much of it
    empty, of all (tap, channel) pairs.  Transposed, the pixels of a program share their residue
    modulo the stride: a convolution of unit stride over the taps that reach the residue.
    Numbers of channels, and strides along all other axes, come divided by UNIT.  `depth` is None
    for images; for volumes it holds along the depth what the arguments before it hold along rows.
    KEEPS_PREACTIVATION stores what the activation is applied to, too, laid out as y.

    A residual is added before the activation; it is laid out as y or, for images, by its own
    `residual_strides` along (n, k, p, q).
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    C *= UNIT
    K *= UNIT
    x_stride_n, x_stride_h, x_stride_w = in_units(
        UNIT, INDEX_64, x_stride_n, x_stride_h, x_stride_w)
    y_stride_n, y_stride_p, y_stride_q = in_units(
        UNIT, INDEX_64, y_stride_n, y_stride_p, y_stride_q)
    w_stride_group, w_stride_r, w_stride_s = in_units(
        UNIT, INDEX_64, w_stride_group, w_stride_r, w_stride_s)
    if TRANSPOSED:
        w_stride_c = in_units(UNIT, INDEX_64, w_stride_c, 0, 0)[0]
    else:
        w_stride_k = in_units(UNIT, INDEX_64, w_stride_k, 0, 0)[0]
    if depth is not None:
        (D, T, Z, x_stride_d, w_stride_t, y_stride_z,
         stride_d, padding_d, dilation_d, tap_step_d, inverse_d) = depth
        x_stride_d, w_stride_t, y_stride_z = in_units(
            UNIT, INDEX_64, x_stride_d, w_stride_t, y_stride_z)
    num_k = tl.cdiv(K, BLOCK_K)
    # the programs of one pixel tile run together, so that its pixels are fetched from memory once
    pid_k = tl.program_id(0) % num_k
    pid_npq = tl.program_id(0) // num_k
    split = tl.program_id(1) % SPLITS
    group = (tl.program_id(1) // SPLITS).to(tl.int64)
    x_ptr += group * C * x_stride_c
    w_ptr += group * w_stride_group
    y_corner = split.to(tl.int64) * y_stride_split + group * K * y_stride_k
    y_ptr += y_corner
    if KEEPS_PREACTIVATION:
        preactivation_ptr += y_corner
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    slice_crs = tl.arange(0, BLOCK_CRS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # and all offsets that follow from them
        offs_k = offs_k.to(tl.int64)
        slice_crs = slice_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < K

    residue_h = 0
    residue_w = 0
    residue_d = 0
    if TRANSPOSED:
        residue_h = pid_npq % (stride_h * stride_w) // stride_w
        residue_w = pid_npq % stride_w
        pid_npq = pid_npq // (stride_h * stride_w)
        if depth is not None:
            residue_d = pid_npq % stride_d
            pid_npq = pid_npq // stride_d
    first_r, num_r, num_p, origin_h, step_h = taps_of_axis(
        residue_h, P, R, stride_h, padding_h, dilation_h, tap_step_h, inverse_h, TRANSPOSED)
    first_s, num_s, num_q, origin_w, step_w = taps_of_axis(
        residue_w, Q, S, stride_w, padding_w, dilation_w, tap_step_w, inverse_w, TRANSPOSED)
    if depth is not None:
        first_t, num_t, num_z, origin_d, step_d = taps_of_axis(
            residue_d, Z, T, stride_d, padding_d, dilation_d, tap_step_d, inverse_d, TRANSPOSED)
    if depth is not None:
        # slices of a volume count as images here; z is split off below
        N *= num_z
    offs_npq += pid_npq * BLOCK_NPQ
    mask_npq = offs_npq < N * num_p * num_q
    # a residue may have no pixels and no taps: divisors are 1 at least
    n = offs_npq // max(num_p * num_q, 1)
    p = offs_npq // max(num_q, 1) % max(num_p, 1)
    q = offs_npq % max(num_q, 1)
    x_h, p = pixels_of_axis(p, residue_h, origin_h, stride_h, TRANSPOSED)
    x_w, q = pixels_of_axis(q, residue_w, origin_w, stride_w, TRANSPOSED)
    if depth is not None:
        z = n % max(num_z, 1)
        n = n // max(num_z, 1)
        x_d, z = pixels_of_axis(z, residue_d, origin_d, stride_d, TRANSPOSED)
    x_rows = n * x_stride_n + x_h * x_stride_h + x_w * x_stride_w
    if depth is not None:
        x_rows += x_d * x_stride_d
    # no tap brings a row past the last pixel into the image
    x_h = tl.where(mask_npq, x_h, -(1 << 30))

    num_c = tl.cdiv(C, BLOCK_CRS)
    if FLAT_C:
        # a constant: its divisions are cheap, and do not hide aligned vectors
        C = FLAT_C
        num_steps = tl.cdiv(C * num_r * num_s, BLOCK_CRS)
    else:
        num_steps = num_c * num_r * num_s
    if depth is not None:
        # slices of taps one after the other: t is the same for a whole step
        steps_t = max(num_steps, 1)
        num_steps *= num_t
        w_ptr += first_t * w_stride_t
        w_step_t = tap_step_d * w_stride_t
        x_step_t = step_d * x_stride_d
    begin = split * STEPS
    first = begin
    if depth is not None:
        t = begin // steps_t
        first = begin % steps_t
    c = first % num_c * BLOCK_CRS
    i = first // num_c // max(num_s, 1)
    j = first // num_c % max(num_s, 1)
    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), dtype=ACC)
    for step in range(begin, min(begin + STEPS, num_steps)):
        if FLAT_C:
            number = step if depth is None else first
            mask_crs, offs_c, offs_i, offs_j = flat_taps(
                number * BLOCK_CRS + slice_crs, C, num_r, num_s)
        else:
            offs_c = c + slice_crs
            mask_crs = offs_c < C
            offs_i = i + tl.zeros_like(offs_c)
            offs_j = j + tl.zeros_like(offs_c)
        taps_h = offs_i * step_h
        taps_w = offs_j * step_w
        x_columns = offs_c * x_stride_c + taps_h * x_stride_h + taps_w * x_stride_w
        rows, columns = tile_axes(x_rows, x_columns, X_CHANNELS_LAST)
        pixels_h = x_h
        if depth is not None:
            # rows of a slice outside the volume go outside the image: cheaper than a second mask
            pixels_h = tl.where(inside(x_d + t * step_d, D), x_h, -(1 << 30))
        rows_h, taps_h = tile_axes(pixels_h, taps_h, X_CHANNELS_LAST)
        rows_w, taps_w = tile_axes(x_w, taps_w, X_CHANNELS_LAST)
        _, channels = tile_axes(mask_npq, mask_crs, X_CHANNELS_LAST)
        mask = inside(rows_h + taps_h, H) & inside(rows_w + taps_w, W) & channels
        x_tap_ptr = x_ptr
        w_tap_ptr = w_ptr
        if depth is not None:
            x_tap_ptr += t * x_step_t
            w_tap_ptr += t * w_step_t
        x = tl.load(x_tap_ptr + (rows + columns), mask=mask, other=0.0)
        if not X_CHANNELS_LAST:
            x = tl.trans(x)
        w_rows = (offs_c * w_stride_c + (first_r + offs_i * tap_step_h) * w_stride_r
                  + (first_s + offs_j * tap_step_w) * w_stride_s)
        # a weight meets the zeros of the padding as it is: infinity times zero is NaN
        w = tl.load(w_tap_ptr + (w_rows[:, None] + offs_k[None, :] * w_stride_k),
                    mask=mask_crs[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if not FLAT_C:
            i, j, c = next_slice(i, j, c, num_s, C, BLOCK_CRS)
        if depth is not None:
            if FLAT_C:
                first += 1
                slice_ends = first == steps_t
                first = tl.where(slice_ends, 0, first)
            else:
                slice_ends = i == num_r
                i = tl.where(slice_ends, 0, i)
            t += slice_ends.to(tl.int32)

    if HAS_BIAS:
        bias_ptrs = bias_ptr + (group * K + offs_k) * bias_stride
        bias = tl.load(bias_ptrs, mask=mask_k & (split == 0), other=0.0)
        acc += bias.to(ACC)[None, :]
    if not Y_CHANNELS_LAST:
        acc = tl.trans(acc)
    y_rows = n * y_stride_n + p * y_stride_p + q * y_stride_q
    if depth is not None:
        y_rows += z * y_stride_z
    if residual_ptr is not None:
        over_k = y_stride_k
        if residual_strides is not None:
            over_k = residual_strides[1]
        residual_ptr += group * K * over_k
    store_pixels(
        acc, y_ptr, preactivation_ptr if KEEPS_PREACTIVATION else None,
        residual_ptr, residual_strides,
        n, p, q, y_rows, offs_k, y_stride_k, mask_npq, mask_k, Y_CHANNELS_LAST, ACTIVATION)
