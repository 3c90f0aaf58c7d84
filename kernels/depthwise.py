"""Convolution with too few channels per group for a matrix product, depthwise above all; letters as in conv.py."""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.conv import inside, residue_taps, tile_axes

DEPTHWISE_CONV2D_CONFIGS = (
    # channels along memory
    Config({"BLOCK_NPQ": 64, "BLOCK_K": 64}, num_warps=4),
    Config({"BLOCK_NPQ": 128, "BLOCK_K": 32}, num_warps=4),
    # pixels along memory
    Config({"BLOCK_NPQ": 512, "BLOCK_K": 4}, num_warps=4),
)

DEPTHWISE_CONV2D_GRAD_WEIGHT_CONFIGS = (
    Config({"BLOCK_CRS": 16, "BLOCK_NPQ": 16, "BLOCK_K": 32}, num_warps=4),
    Config({"BLOCK_CRS": 16, "BLOCK_NPQ": 256, "BLOCK_K": 2}, num_warps=4),
)


def depthwise_conv2d_config(k, channels_last):
    """Along memory; of the two tiles along channels the wider one, unless its last tile is half empty."""
    if not channels_last:
        return DEPTHWISE_CONV2D_CONFIGS[2]
    return DEPTHWISE_CONV2D_CONFIGS[0 if (k - 1) % 64 >= 32 else 1]


def depthwise_conv2d_grad_weight_config(channels_last):
    """Along memory."""
    return DEPTHWISE_CONV2D_GRAD_WEIGHT_CONFIGS[0 if channels_last else 1]


@triton.jit
def depthwise_conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    N, C, H, W, GROUPS, K, R, S, P, Q, BLOCK_P, BLOCK_Q, bias_stride,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    w_stride_group, w_stride_k, w_stride_c, w_stride_r, w_stride_s,
    y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    TRANSPOSED: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_NPQ pixels x BLOCK_K channels of y, of any groups: a sum over taps, no matrix product.

    Its pixels are BLOCK_P x BLOCK_Q of BLOCK_NPQ / (BLOCK_P * BLOCK_Q) images, so that the taps of neighbours overlap in
    the cache; transposed, they belong to one residue class modulo the stride, as in `conv2d_kernel`.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_k = tl.cdiv(GROUPS * K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_npq = tl.program_id(0) // num_k
    if TRANSPOSED:
        residue = pid_npq % (stride_h * stride_w)
        pid_npq = pid_npq // (stride_h * stride_w)
        residue_h = residue // stride_w
        residue_w = residue % stride_w
        first_r, num_r, x_h = residue_taps(residue_h + padding_h, R, stride_h, dilation_h, tap_step_h, inverse_h)
        first_s, num_s, x_w = residue_taps(residue_w + padding_w, S, stride_w, dilation_w, tap_step_w, inverse_w)
        # those of the largest class, as on the host
        tiles_p = tl.cdiv(tl.cdiv(P, stride_h), BLOCK_P)
        tiles_q = tl.cdiv(tl.cdiv(Q, stride_w), BLOCK_Q)
        step_h = -(dilation_h * tap_step_h // stride_h)
        step_w = -(dilation_w * tap_step_w // stride_w)
    else:
        first_r = 0
        first_s = 0
        num_r = R
        num_s = S
        tiles_p = tl.cdiv(P, BLOCK_P)
        tiles_q = tl.cdiv(Q, BLOCK_Q)
        step_h = dilation_h
        step_w = dilation_w
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # all that follows from them
        offs_k = offs_k.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    group = offs_k // K
    n = pid_npq // (tiles_p * tiles_q) * (BLOCK_NPQ // (BLOCK_P * BLOCK_Q)) + offs_npq // (BLOCK_P * BLOCK_Q)
    p = pid_npq // tiles_q % tiles_p * BLOCK_P + offs_npq // BLOCK_Q % BLOCK_P
    q = pid_npq % tiles_q * BLOCK_Q + offs_npq % BLOCK_Q
    # the input pixel of the first tap, which may lie outside the image
    if TRANSPOSED:
        x_h += p
        x_w += q
        p = residue_h + p * stride_h
        q = residue_w + q * stride_w
    else:
        x_h = p * stride_h - padding_h
        x_w = q * stride_w - padding_w
    pixels, channels = tile_axes((n < N) & (p < P) & (q < Q), offs_k < GROUPS * K, CHANNELS_LAST)
    rows_h, _ = tile_axes(x_h, offs_k, CHANNELS_LAST)
    rows_w, _ = tile_axes(x_w, offs_k, CHANNELS_LAST)
    rows, columns = tile_axes(n * x_stride_n, group * (C * x_stride_c), CHANNELS_LAST)
    x_offsets = rows + columns + rows_h * x_stride_h + rows_w * x_stride_w
    _, w_offsets = tile_axes(x_h, group * w_stride_group + offs_k % K * w_stride_k, CHANNELS_LAST)
    w_offsets += first_r * w_stride_r + first_s * w_stride_s

    if CHANNELS_LAST:
        acc = tl.zeros((BLOCK_NPQ, BLOCK_K), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_NPQ), dtype=ACC)
    for i in range(0, num_r):
        for j in range(0, num_s):
            mask = pixels & channels & inside(rows_h + i * step_h, H) & inside(rows_w + j * step_w, W)
            for c in range(0, C):
                x_offset = i * step_h * x_stride_h + j * step_w * x_stride_w + c * x_stride_c
                x = tl.load(x_ptr + (x_offsets + x_offset), mask=mask, other=0.0)
                w_offset = i * tap_step_h * w_stride_r + j * tap_step_w * w_stride_s + c * w_stride_c
                w = tl.load(w_ptr + (w_offsets + w_offset), mask=channels, other=0.0)
                acc += x.to(ACC) * w.to(ACC)
    if HAS_BIAS:
        _, bias_offsets = tile_axes(x_h, offs_k * bias_stride, CHANNELS_LAST)
        acc += tl.load(bias_ptr + bias_offsets, mask=channels, other=0.0).to(ACC)
    rows, columns = tile_axes(n * y_stride_n + p * y_stride_p + q * y_stride_q, offs_k * y_stride_k, CHANNELS_LAST)
    tl.store(y_ptr + (rows + columns), acc.to(y_ptr.dtype.element_ty), mask=pixels & channels)


@triton.jit
def depthwise_conv2d_grad_weight_kernel(
    grad_y_ptr, x_ptr, partial_ptr,
    C, H, W, GROUPS, K, R, S, N, P, Q, BLOCK_P, BLOCK_Q, STEPS,
    grad_y_stride_n, grad_y_stride_k, grad_y_stride_p, grad_y_stride_q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_CRS: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program sums BLOCK_CRS (tap, channel) pairs of BLOCK_K channels over STEPS tiles of pixels into its split's partial.

    The tile is three-dimensional, so that a gradient of y is read once for every tap; pixels are added up at the end.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_k = tl.cdiv(GROUPS * K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_crs = tl.program_id(0) // num_k
    split = tl.program_id(1)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_crs = pid_crs * BLOCK_CRS + tl.arange(0, BLOCK_CRS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # all that follows from them
        offs_k = offs_k.to(tl.int64)
        offs_crs = offs_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < GROUPS * K
    mask_crs = offs_crs < C * R * S
    offs_c = offs_crs % C
    taps_h = offs_crs // C // S * dilation_h - padding_h
    taps_w = offs_crs // C % S * dilation_w - padding_w
    block_n = BLOCK_NPQ // (BLOCK_P * BLOCK_Q)
    offs_n = offs_npq // (BLOCK_P * BLOCK_Q)
    offs_p = offs_npq // BLOCK_Q % BLOCK_P
    offs_q = offs_npq % BLOCK_Q

    grad_y_rows = offs_n * grad_y_stride_n + offs_p * grad_y_stride_p + offs_q * grad_y_stride_q
    rows, columns = tile_axes(grad_y_rows, offs_k * grad_y_stride_k, CHANNELS_LAST)
    grad_y_offsets = rows + columns
    rows_h, _ = tile_axes(offs_p * stride_h, offs_k, CHANNELS_LAST)
    rows_w, _ = tile_axes(offs_q * stride_w, offs_k, CHANNELS_LAST)
    x_h = rows_h[None, :, :] + taps_h[:, None, None]
    x_w = rows_w[None, :, :] + taps_w[:, None, None]
    rows, columns = tile_axes(offs_n * x_stride_n, offs_k // K * (C * x_stride_c), CHANNELS_LAST)
    x_offsets = ((rows + columns)[None, :, :] + (offs_c * x_stride_c)[:, None, None]
                 + x_h * x_stride_h + x_w * x_stride_w)

    num_p = tl.cdiv(P, BLOCK_P)
    num_q = tl.cdiv(Q, BLOCK_Q)
    begin = split * STEPS
    n = begin // (num_p * num_q) * block_n
    p = begin // num_q % num_p * BLOCK_P
    q = begin % num_q * BLOCK_Q
    if CHANNELS_LAST:
        acc = tl.zeros((BLOCK_CRS, BLOCK_NPQ, BLOCK_K), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_CRS, BLOCK_K, BLOCK_NPQ), dtype=ACC)
    for _ in range(0, STEPS):
        mask_npq = (offs_n < N - n) & (offs_p < P - p) & (offs_q < Q - q)
        pixels, channels = tile_axes(mask_npq, mask_k, CHANNELS_LAST)
        corner = n.to(tl.int64) * grad_y_stride_n + p.to(tl.int64) * grad_y_stride_p + q.to(tl.int64) * grad_y_stride_q
        grad_y = tl.load(grad_y_ptr + corner + grad_y_offsets, mask=pixels & channels, other=0.0).to(ACC)
        mask = ((pixels & channels)[None, :, :] & mask_crs[:, None, None]
                & inside(x_h + p * stride_h, H) & inside(x_w + q * stride_w, W))
        corner = (n.to(tl.int64) * x_stride_n + (p * stride_h).to(tl.int64) * x_stride_h
                  + (q * stride_w).to(tl.int64) * x_stride_w)
        acc += tl.load(x_ptr + corner + x_offsets, mask=mask, other=0.0).to(ACC) * grad_y[None, :, :]
        q += BLOCK_Q
        next_p = q >= Q
        q = tl.where(next_p, 0, q)
        p += tl.where(next_p, BLOCK_P, 0)
        next_n = p >= P
        p = tl.where(next_n, 0, p)
        n += tl.where(next_n, block_n, 0)
    grad_w = tl.sum(acc, axis=1 if CHANNELS_LAST else 2)
    offsets = (split * GROUPS * K + offs_k)[None, :] * (C * R * S) + offs_crs[:, None]
    tl.store(partial_ptr + offsets, grad_w, mask=mask_crs[:, None] & mask_k[None, :])
