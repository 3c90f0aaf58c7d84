"""Depthwise convolution: channels do not mix, so that it is a sum over taps, no matrix product.

Letters and units are those of conv.py.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.pixels import (
    corner_offset,
    in_units,
    inside,
    next_corner,
    pixels_of_axis,
    pixels_of_tile,
    store_pixels,
    taps_of_axis,
    tile_axes,
)

# by bytes per element: four vectors of 16 bytes per thread
DEPTHWISE_CONV2D_CONFIGS = {
    2: (
        Config({"BLOCK_NPQ": 64, "BLOCK_K": 64}, num_warps=4, maxnreg=128),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 32}, num_warps=4, maxnreg=128),
    ),
    4: (
        Config({"BLOCK_NPQ": 32, "BLOCK_K": 64}, num_warps=4, maxnreg=128),
        Config({"BLOCK_NPQ": 64, "BLOCK_K": 32}, num_warps=4, maxnreg=128),
    ),
    8: (
        Config({"BLOCK_NPQ": 16, "BLOCK_K": 64}, num_warps=4, maxnreg=128),
        Config({"BLOCK_NPQ": 32, "BLOCK_K": 32}, num_warps=4, maxnreg=128),
    ),
}

# where operands are gathered element by element: fewer of them a thread, each with its own address
DEPTHWISE_CONV2D_GATHER_CONFIGS = (
    # along channels, along pixels
    Config({"BLOCK_NPQ": 32, "BLOCK_K": 32}, num_warps=4, maxnreg=255),
    Config({"BLOCK_NPQ": 256, "BLOCK_K": 4}, num_warps=4, maxnreg=255),
)

# by bytes per element: the vectors of a pixel's channels make up the threads of a warp, or half
DEPTHWISE_CONV2D_GRAD_WEIGHT_CONFIGS = {
    2: (Config({"BLOCK_RS": 16, "BLOCK_NPQ": 8, "BLOCK_K": 64}, num_warps=4, maxnreg=255),),
    4: (Config({"BLOCK_RS": 16, "BLOCK_NPQ": 8, "BLOCK_K": 32}, num_warps=4, maxnreg=255),),
    8: (Config({"BLOCK_RS": 16, "BLOCK_NPQ": 4, "BLOCK_K": 32}, num_warps=4, maxnreg=255),),
}

DEPTHWISE_CONV2D_GRAD_WEIGHT_GATHER_CONFIGS = (
    # along channels, along pixels
    Config({"BLOCK_RS": 16, "BLOCK_NPQ": 4, "BLOCK_K": 32}, num_warps=4, maxnreg=255),
    Config({"BLOCK_RS": 16, "BLOCK_NPQ": 64, "BLOCK_K": 1}, num_warps=4, maxnreg=255),
)


def depthwise_conv2d_config(k, itemsize):
    """The tile of more channels, unless the last one is half empty."""
    return DEPTHWISE_CONV2D_CONFIGS[itemsize][0 if (k - 1) % 64 >= 32 else 1]


def depthwise_conv2d_gather_config(channels_last):
    """The tile along the contiguous axis."""
    return DEPTHWISE_CONV2D_GATHER_CONFIGS[0 if channels_last else 1]


def depthwise_conv2d_grad_weight_config(itemsize):
    """The only configuration."""
    return DEPTHWISE_CONV2D_GRAD_WEIGHT_CONFIGS[itemsize][0]


def depthwise_conv2d_grad_weight_gather_config(channels_last):
    """The tile along the contiguous axis."""
    return DEPTHWISE_CONV2D_GRAD_WEIGHT_GATHER_CONFIGS[0 if channels_last else 1]


@triton.jit
def depthwise_conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, preactivation_ptr, residual_ptr,
    N, C, H, W, GROUPS, K, R, S, P, Q, block_p, block_q, bias_stride,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    w_stride_group, w_stride_k, w_stride_c, w_stride_r, w_stride_s,
    y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    residual_strides,
    TRANSPOSED: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEPS_PREACTIVATION: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_NPQ pixels x BLOCK_K channels of y, each from C channels of x.

    Its pixels are block_p x block_q of BLOCK_NPQ / (block_p * block_q) images, so that taps of
    neighbours meet in the cache; transposed, they share their residue, as in `conv2d_kernel`.
    KEEPS_PREACTIVATION stores what the activation is applied to, too, laid out as y.  A residual is
    added before the activation; it is laid out as y, or by its own `residual_strides` along
    (n, k, p, q).
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    GROUPS *= UNIT
    x_stride_n, x_stride_h, x_stride_w = in_units(
        UNIT, INDEX_64, x_stride_n, x_stride_h, x_stride_w)
    y_stride_n, y_stride_p, y_stride_q = in_units(
        UNIT, INDEX_64, y_stride_n, y_stride_p, y_stride_q)
    w_stride_r, w_stride_s, _ = in_units(UNIT, INDEX_64, w_stride_r, w_stride_s, w_stride_s)
    x_stride_c, w_stride_c, _ = in_units(1, INDEX_64, x_stride_c, w_stride_c, w_stride_c)
    num_k = tl.cdiv(GROUPS * K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_npq = tl.program_id(0) // num_k
    residue_h = 0
    residue_w = 0
    num_p = tl.cdiv(P, block_p)
    num_q = tl.cdiv(Q, block_q)
    if TRANSPOSED:
        residue_h = pid_npq % (stride_h * stride_w) // stride_w
        residue_w = pid_npq % stride_w
        pid_npq = pid_npq // (stride_h * stride_w)
        # those of the largest residue class, as on the host
        num_p = tl.cdiv(tl.cdiv(P, stride_h), block_p)
        num_q = tl.cdiv(tl.cdiv(Q, stride_w), block_q)
    first_r, num_r, _, origin_h, step_h = taps_of_axis(
        residue_h, P, R, stride_h, padding_h, dilation_h, tap_step_h, inverse_h, TRANSPOSED)
    first_s, num_s, _, origin_w, step_w = taps_of_axis(
        residue_w, Q, S, stride_w, padding_w, dilation_w, tap_step_w, inverse_w, TRANSPOSED)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # and all offsets that follow from them
        offs_k = offs_k.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    group = offs_k // K
    block_n = BLOCK_NPQ // (block_p * block_q)
    offs_n, offs_p, offs_q = pixels_of_tile(offs_npq, block_p, block_q)
    n = pid_npq // (num_p * num_q) * block_n + offs_n
    p = pid_npq // num_q % num_p * block_p + offs_p
    q = pid_npq % num_q * block_q + offs_q
    x_h, p = pixels_of_axis(p, residue_h, origin_h, stride_h, TRANSPOSED)
    x_w, q = pixels_of_axis(q, residue_w, origin_w, stride_w, TRANSPOSED)
    mask_npq = (n < N) & (p < P) & (q < Q)
    pixels, channels = tile_axes(mask_npq, offs_k < GROUPS * K, CHANNELS_LAST)
    x_rows = n * x_stride_n + x_h * x_stride_h + x_w * x_stride_w
    rows, columns = tile_axes(x_rows, group * C * x_stride_c, CHANNELS_LAST)
    x_offsets = rows + columns
    w_columns = group * w_stride_group + offs_k % K * w_stride_k
    x_h, w_offsets = tile_axes(x_h, w_columns, CHANNELS_LAST)
    x_w, bias_offsets = tile_axes(x_w, offs_k.to(tl.int64) * bias_stride, CHANNELS_LAST)
    w_ptr += first_r * w_stride_r + first_s * w_stride_s

    if CHANNELS_LAST:
        acc = tl.zeros((BLOCK_NPQ, BLOCK_K), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_NPQ), dtype=ACC)
    for i in range(num_r):
        for j in range(num_s):
            mask = pixels & channels & inside(x_h + i * step_h, H) & inside(x_w + j * step_w, W)
            x_tap = i * step_h * x_stride_h + j * step_w * x_stride_w
            w_tap = i * tap_step_h * w_stride_r + j * tap_step_w * w_stride_s
            for c in range(C):
                x = tl.load(x_ptr + (x_offsets + x_tap + c * x_stride_c), mask=mask, other=0.0)
                w = tl.load(w_ptr + (w_offsets + w_tap + c * w_stride_c), mask=channels, other=0.0)
                acc += x.to(ACC) * w.to(ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + bias_offsets, mask=channels, other=0.0).to(ACC)
    y_rows = n * y_stride_n + p * y_stride_p + q * y_stride_q
    store_pixels(
        acc, y_ptr, preactivation_ptr if KEEPS_PREACTIVATION else None,
        residual_ptr, residual_strides, n, p, q, y_rows, offs_k, y_stride_k,
        mask_npq, offs_k < GROUPS * K, CHANNELS_LAST, ACTIVATION)


@triton.jit
def depthwise_conv2d_grad_weight_kernel(
    grad_y_ptr, x_ptr, partial_ptr,
    H, W, GROUPS, K, R, S, N, P, Q, block_p, block_q, STEPS,
    grad_y_stride_n, grad_y_stride_k, grad_y_stride_p, grad_y_stride_q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_RS: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_RS taps of BLOCK_K channels over STEPS pixel tiles into its split.

    Taps are an axis of the tile, so that the gradient of y is read once for all of them; pixels
    stay another until the end.  Pixel tiles are those of `conv2d_grad_weight_kernel`.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    GROUPS *= UNIT
    x_stride_n, x_stride_h, x_stride_w = in_units(
        UNIT, INDEX_64, x_stride_n, x_stride_h, x_stride_w)
    grad_y_stride_n, grad_y_stride_p, grad_y_stride_q = in_units(
        UNIT, INDEX_64, grad_y_stride_n, grad_y_stride_p, grad_y_stride_q)
    num_k = tl.cdiv(GROUPS * K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_rs = tl.program_id(0) // num_k
    split = tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_rs = pid_rs * BLOCK_RS + tl.arange(0, BLOCK_RS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # and all offsets that follow from them
        offs_k = offs_k.to(tl.int64)
        offs_rs = offs_rs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < GROUPS * K
    mask_rs = offs_rs < R * S
    taps_h = (offs_rs // S * dilation_h - padding_h)[:, None, None]
    taps_w = (offs_rs % S * dilation_w - padding_w)[:, None, None]
    block_n = BLOCK_NPQ // (block_p * block_q)
    offs_n, offs_p, offs_q = pixels_of_tile(offs_npq, block_p, block_q)

    grad_y_rows = offs_n * grad_y_stride_n + offs_p * grad_y_stride_p + offs_q * grad_y_stride_q
    rows, columns = tile_axes(grad_y_rows, offs_k * grad_y_stride_k, CHANNELS_LAST)
    grad_y_offsets = rows + columns
    rows_h, _ = tile_axes(offs_p * stride_h, offs_k, CHANNELS_LAST)
    rows_w, _ = tile_axes(offs_q * stride_w, offs_k, CHANNELS_LAST)
    x_h = rows_h[None, :, :] + taps_h
    x_w = rows_w[None, :, :] + taps_w
    rows, columns = tile_axes(offs_n * x_stride_n, offs_k // K * x_stride_c, CHANNELS_LAST)
    x_offsets = (rows + columns)[None, :, :] + x_h * x_stride_h + x_w * x_stride_w

    num_p = tl.cdiv(P, block_p)
    num_q = tl.cdiv(Q, block_q)
    begin = split * STEPS
    n = begin // (num_p * num_q) * block_n
    p = begin // num_q % num_p * block_p
    q = begin % num_q * block_q
    if CHANNELS_LAST:
        acc = tl.zeros((BLOCK_RS, BLOCK_NPQ, BLOCK_K), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_RS, BLOCK_K, BLOCK_NPQ), dtype=ACC)
    for _ in range(STEPS):
        mask_npq = (offs_n < N - n) & (offs_p < P - p) & (offs_q < Q - q)
        pixels, channels = tile_axes(mask_npq, mask_k, CHANNELS_LAST)
        mask = pixels & channels
        corner = corner_offset(n, p, q, grad_y_stride_n, grad_y_stride_p, grad_y_stride_q)
        grad_y = tl.load(grad_y_ptr + corner + grad_y_offsets, mask=mask, other=0.0)
        mask = (mask[None, :, :] & mask_rs[:, None, None]
                & inside(x_h + p * stride_h, H) & inside(x_w + q * stride_w, W))
        corner = corner_offset(n, p * stride_h, q * stride_w, x_stride_n, x_stride_h, x_stride_w)
        x = tl.load(x_ptr + corner + x_offsets, mask=mask, other=0.0)
        acc += x.to(ACC) * grad_y.to(ACC)[None, :, :]
        n, p, q = next_corner(n, p, q, P, Q, block_n, block_p, block_q)
    grad_w = tl.sum(acc, axis=1 if CHANNELS_LAST else 2)
    offsets = (split * GROUPS * K + offs_k)[None, :] * (R * S) + offs_rs[:, None]
    tl.store(partial_ptr + offsets, grad_w, mask=mask_rs[:, None] & mask_k[None, :])
