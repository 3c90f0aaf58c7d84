"""Convolution as an implicit matrix product: forward, input gradient (the transposed convolution), weight gradient.

Letters follow one convolution step of whatever direction: channels `C` are read and `K` written (both per group), the
image that is read is H x W, the one written P x Q.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.tiles import strided_offsets

# by bytes per element: 16-bit operands feed tensor cores, float32 runs TF32 or plain FMA, float64 its own units
CONV2D_CONFIGS = {
    2: (
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 256, "BLOCK_CRS": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 128, "BLOCK_CRS": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 64, "BLOCK_CRS": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 32, "BLOCK_CRS": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_NPQ": 64, "BLOCK_K": 64, "BLOCK_CRS": 64}, num_warps=4, num_stages=4),
        # few input channels: the inner axis is gathered element by element, which takes threads, not depth
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 64, "BLOCK_CRS": 32}, num_warps=8, num_stages=3),
    ),
    4: (
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 128, "BLOCK_CRS": 32}, num_warps=8, num_stages=3),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 64, "BLOCK_CRS": 32}, num_warps=8, num_stages=3),
        Config({"BLOCK_NPQ": 64, "BLOCK_K": 64, "BLOCK_CRS": 32}, num_warps=4, num_stages=3),
        Config({"BLOCK_NPQ": 128, "BLOCK_K": 32, "BLOCK_CRS": 32}, num_warps=4, num_stages=3),
    ),
    8: (
        Config({"BLOCK_NPQ": 64, "BLOCK_K": 32, "BLOCK_CRS": 16}, num_warps=4, num_stages=2),
    ),
}

CONV2D_GRAD_WEIGHT_CONFIGS = {
    2: (
        Config({"BLOCK_K": 128, "BLOCK_CRS": 128, "BLOCK_NPQ": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_K": 64, "BLOCK_CRS": 128, "BLOCK_NPQ": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_K": 64, "BLOCK_CRS": 64, "BLOCK_NPQ": 64}, num_warps=4, num_stages=4),
        Config({"BLOCK_K": 32, "BLOCK_CRS": 64, "BLOCK_NPQ": 64}, num_warps=4, num_stages=4),
    ),
    4: (
        Config({"BLOCK_K": 64, "BLOCK_CRS": 64, "BLOCK_NPQ": 32}, num_warps=4, num_stages=3),
        Config({"BLOCK_K": 32, "BLOCK_CRS": 64, "BLOCK_NPQ": 32}, num_warps=4, num_stages=3),
    ),
    8: (
        Config({"BLOCK_K": 32, "BLOCK_CRS": 32, "BLOCK_NPQ": 16}, num_warps=4, num_stages=2),
    ),
}

# weights per program of the sum over splits
BLOCK = 256
# programs that fill a GPU about once
_FULL = 96


def conv2d_config(npq, k, c, groups, itemsize):
    """The widest tile of channels that is not mostly empty, on as many pixels as still give a GPU enough programs."""
    configs = CONV2D_CONFIGS[itemsize]
    if itemsize == 8:
        return configs[0]
    if itemsize == 2 and c < 16:
        return configs[5]
    if k <= 32:
        return configs[3]
    for config in configs[:3] if itemsize == 2 else configs[:2]:
        block_npq, block_k = config.kwargs["BLOCK_NPQ"], config.kwargs["BLOCK_K"]
        tiles = triton.cdiv(npq, block_npq) * triton.cdiv(k, block_k) * groups
        if tiles >= _FULL and k > block_k // 2:
            return config
    return configs[4 if itemsize == 2 else 2]


def conv2d_grad_weight_config(k, crs, itemsize):
    """The largest tile of weights that is not mostly empty: the number of pixels fills the GPU, by splitting."""
    configs = CONV2D_GRAD_WEIGHT_CONFIGS[itemsize]
    for config in configs[:-1]:
        if k > config.kwargs["BLOCK_K"] // 2 and crs > config.kwargs["BLOCK_CRS"] // 2:
            return config
    return configs[-1]


def pixel_blocks(n, p, q, block, min_q=1):
    """BLOCK_P, BLOCK_Q, and the number of tiles of `block` pixels (images x rows x columns) that cover n x p x q.

    The shape with the fewest tiles, and of those the squarest, whose neighbouring taps share the most pixels.
    """
    best = None
    for log_q in range(block.bit_length()):
        block_q = 1 << log_q
        for log_p in range(block.bit_length() - log_q):
            block_p = 1 << log_p
            tiles = triton.cdiv(n, block // (block_p * block_q)) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
            found = (block_q < min(min_q, q), tiles, block_p + block_q, block_p, block_q)
            best = found if best is None or found < best else best
    return best[3], best[4], best[1]


@triton.jit
def tile_axes(rows, columns, ROWS_FIRST: tl.constexpr):
    """`rows` and `columns` shaped to broadcast to a tile whose second axis, the one threads walk, is the last."""
    if ROWS_FIRST:
        return rows[:, None], columns[None, :]
    else:
        return rows[None, :], columns[:, None]


@triton.jit
def inside(position, size):
    """Whether 0 <= position < size, in one comparison: a negative position is a large unsigned number."""
    return position.to(tl.uint32) < tl.full((), size, tl.uint32)


@triton.jit
def residue_taps(reach, taps, stride, dilation, tap_step, inverse):
    """First tap that reaches a residue class, number of those taps, and what the first one reads at the class's origin.

    In a transposed convolution pixel h is reached by tap r from (h + padding - r * dilation) / stride, where that is
    whole.  All pixels of one residue modulo the stride share those taps, which are `tap_step` = stride / gcd(stride,
    dilation) apart; `inverse` is that of dilation / gcd modulo tap_step, and `reach` is residue + padding.
    """
    gcd = stride // tap_step
    first = reach // gcd * inverse % tap_step
    number = tl.where(reach % gcd == 0, tl.cdiv(taps - first, tap_step), 0)
    return first, number, (reach - first * dilation) // stride


@triton.jit
def conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    N, C, H, W, K, R, S, P, Q, STEPS, SPLITS, bias_stride,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    w_stride_group, w_stride_k, w_stride_c, w_stride_r, w_stride_s,
    y_stride_split, y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    TRANSPOSED: tl.constexpr, FLAT: tl.constexpr, X_CHANNELS_LAST: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
):
    """One program computes BLOCK_NPQ pixels x BLOCK_K channels of y over STEPS slices of the inner axis.

    A slice is BLOCK_CRS channels of one tap, or with FLAT, for few channels, BLOCK_CRS of all (tap, channel) pairs.
    Transposed, the pixels of a program belong to one residue class modulo the stride: a convolution of unit stride
    over those taps alone that reach the class.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_k = tl.cdiv(K, BLOCK_K)
    # the programs of one pixel tile run together, so that its pixels are fetched from memory once
    pid_k = tl.program_id(0) % num_k
    pid_npq = tl.program_id(0) // num_k
    split = tl.program_id(1) % SPLITS
    group = (tl.program_id(1) // SPLITS).to(tl.int64)
    x_ptr += group * C * x_stride_c
    w_ptr += group * w_stride_group
    y_ptr += split.to(tl.int64) * y_stride_split + group * K * y_stride_k
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    slice_crs = tl.arange(0, BLOCK_CRS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # all that follows from them
        offs_k = offs_k.to(tl.int64)
        slice_crs = slice_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < K

    if TRANSPOSED:
        residue = pid_npq % (stride_h * stride_w)
        pid_npq = pid_npq // (stride_h * stride_w)
        residue_h = residue // stride_w
        residue_w = residue % stride_w
        first_r, num_r, x_h = residue_taps(residue_h + padding_h, R, stride_h, dilation_h, tap_step_h, inverse_h)
        first_s, num_s, x_w = residue_taps(residue_w + padding_w, S, stride_w, dilation_w, tap_step_w, inverse_w)
        num_p = tl.cdiv(P - residue_h, stride_h)
        num_q = tl.cdiv(Q - residue_w, stride_w)
        step_h = -(dilation_h * tap_step_h // stride_h)
        step_w = -(dilation_w * tap_step_w // stride_w)
    else:
        first_r = 0
        first_s = 0
        num_r = R
        num_s = S
        num_p = P
        num_q = Q
        step_h = dilation_h
        step_w = dilation_w
    offs_npq += pid_npq * BLOCK_NPQ
    mask_npq = offs_npq < N * num_p * num_q
    n = offs_npq // max(num_p * num_q, 1)
    p = offs_npq // max(num_q, 1) % max(num_p, 1)
    q = offs_npq % max(num_q, 1)
    # the input pixel of the first tap, which may lie outside the image
    if TRANSPOSED:
        x_h += p
        x_w += q
        p = residue_h + p * stride_h
        q = residue_w + q * stride_w
    else:
        x_h = p * stride_h - padding_h
        x_w = q * stride_w - padding_w
    x_rows = n * x_stride_n + x_h * x_stride_h + x_w * x_stride_w
    # no tap brings a row past the last pixel into the image
    x_h = tl.where(mask_npq, x_h, -(1 << 30))

    num_c = tl.cdiv(C, BLOCK_CRS)
    if FLAT:
        num_steps = tl.cdiv(C * num_r * num_s, BLOCK_CRS)
    else:
        num_steps = num_c * num_r * num_s
    begin = split * STEPS
    c = begin % num_c * BLOCK_CRS
    i = begin // num_c // max(num_s, 1)
    j = begin // num_c % max(num_s, 1)
    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), dtype=ACC)
    for step in range(begin, min(begin + STEPS, num_steps)):
        if FLAT:
            offs_crs = step * BLOCK_CRS + slice_crs
            mask_crs = offs_crs < C * num_r * num_s
            offs_c = offs_crs % C
            offs_i = offs_crs // C // max(num_s, 1)
            offs_j = offs_crs // C % max(num_s, 1)
        else:
            offs_c = c + slice_crs
            mask_crs = offs_c < C
            offs_i = i + tl.zeros_like(offs_c)
            offs_j = j + tl.zeros_like(offs_c)
        x_columns = offs_c * x_stride_c + offs_i * step_h * x_stride_h + offs_j * step_w * x_stride_w
        rows, columns = tile_axes(x_rows, x_columns, X_CHANNELS_LAST)
        rows_h, taps_h = tile_axes(x_h, offs_i * step_h, X_CHANNELS_LAST)
        rows_w, taps_w = tile_axes(x_w, offs_j * step_w, X_CHANNELS_LAST)
        _, channels = tile_axes(x_h, mask_crs, X_CHANNELS_LAST)
        mask = inside(rows_h + taps_h, H) & inside(rows_w + taps_w, W) & channels
        x = tl.load(x_ptr + (rows + columns), mask=mask, other=0.0)
        if not X_CHANNELS_LAST:
            x = tl.trans(x)
        w_rows = (offs_c * w_stride_c + (first_r + offs_i * tap_step_h) * w_stride_r
                  + (first_s + offs_j * tap_step_w) * w_stride_s)
        # a weight meets the zeros of the padding as it is: infinity times zero is NaN, as in torch
        w = tl.load(w_ptr + (w_rows[:, None] + offs_k[None, :] * w_stride_k),
                    mask=mask_crs[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if not FLAT:
            c += BLOCK_CRS
            next_j = c >= C
            c = tl.where(next_j, 0, c)
            j += next_j.to(tl.int32)
            next_i = j == num_s
            j = tl.where(next_i, 0, j)
            i += next_i.to(tl.int32)

    if HAS_BIAS:
        bias_ptr += group * K * bias_stride
        bias = tl.load(bias_ptr + offs_k * bias_stride, mask=mask_k & (split == 0), other=0.0)
        acc += bias.to(ACC)[None, :]
    if not Y_CHANNELS_LAST:
        acc = tl.trans(acc)
    rows, columns = tile_axes(n * y_stride_n + p * y_stride_p + q * y_stride_q, offs_k * y_stride_k, Y_CHANNELS_LAST)
    pixels, channels = tile_axes(mask_npq, mask_k, Y_CHANNELS_LAST)
    tl.store(y_ptr + (rows + columns), acc.to(y_ptr.dtype.element_ty), mask=pixels & channels)


@triton.jit
def conv2d_grad_weight_kernel(
    grad_y_ptr, x_ptr, grad_w_ptr,
    C, H, W, K, R, S, N, P, Q, BLOCK_P, BLOCK_Q, STEPS, SPLITS,
    grad_y_stride_n, grad_y_stride_k, grad_y_stride_p, grad_y_stride_q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    grad_w_stride_split, grad_w_stride_k, grad_w_stride_c, grad_w_stride_r, grad_w_stride_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    Y_CHANNELS_LAST: tl.constexpr, X_CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr, BLOCK_NPQ: tl.constexpr,
):
    """One program sums BLOCK_K channels x BLOCK_CRS (tap, channel) pairs of the weight's gradient over STEPS tiles of pixels.

    A tile is BLOCK_P x BLOCK_Q pixels of BLOCK_NPQ / (BLOCK_P * BLOCK_Q) images: its pixels keep their places relative
    to its corner, and stepping to the next tile moves three scalars, where a flat pixel index would be divided anew.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % num_k
    pid_crs = tl.program_id(0) // num_k
    split = tl.program_id(1) % SPLITS
    group = (tl.program_id(1) // SPLITS).to(tl.int64)

    grad_y_ptr += group * K * grad_y_stride_k
    x_ptr += group * C * x_stride_c
    grad_w_ptr += split.to(tl.int64) * grad_w_stride_split + group * K * grad_w_stride_k
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_crs = pid_crs * BLOCK_CRS + tl.arange(0, BLOCK_CRS)
    offs_npq = tl.arange(0, BLOCK_NPQ)
    if INDEX_64:
        # all that follows from them
        offs_k = offs_k.to(tl.int64)
        offs_crs = offs_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < K
    mask_crs = offs_crs < C * R * S
    offs_c = offs_crs % C
    offs_r = offs_crs // C // S
    offs_s = offs_crs // C % S
    block_n = BLOCK_NPQ // (BLOCK_P * BLOCK_Q)
    offs_n = offs_npq // (BLOCK_P * BLOCK_Q)
    offs_p = offs_npq // BLOCK_Q % BLOCK_P
    offs_q = offs_npq % BLOCK_Q

    grad_y_rows = offs_n * grad_y_stride_n + offs_p * grad_y_stride_p + offs_q * grad_y_stride_q
    rows, columns = tile_axes(grad_y_rows, offs_k * grad_y_stride_k, Y_CHANNELS_LAST)
    grad_y_offsets = rows + columns
    rows_h, taps_h = tile_axes(offs_p * stride_h, offs_r * dilation_h - padding_h, X_CHANNELS_LAST)
    rows_w, taps_w = tile_axes(offs_q * stride_w, offs_s * dilation_w - padding_w, X_CHANNELS_LAST)
    x_h = rows_h + taps_h
    x_w = rows_w + taps_w
    rows, columns = tile_axes(offs_n * x_stride_n, offs_c * x_stride_c, X_CHANNELS_LAST)
    x_offsets = rows + columns + x_h * x_stride_h + x_w * x_stride_w

    num_p = tl.cdiv(P, BLOCK_P)
    num_q = tl.cdiv(Q, BLOCK_Q)
    begin = split * STEPS
    n = begin // (num_p * num_q) * block_n
    p = begin // num_q % num_p * BLOCK_P
    q = begin % num_q * BLOCK_Q
    acc = tl.zeros((BLOCK_K, BLOCK_CRS), dtype=ACC)
    for _ in range(0, STEPS):
        mask_npq = (offs_n < N - n) & (offs_p < P - p) & (offs_q < Q - q)
        pixels, channels = tile_axes(mask_npq, mask_k, Y_CHANNELS_LAST)
        corner = n.to(tl.int64) * grad_y_stride_n + p.to(tl.int64) * grad_y_stride_p + q.to(tl.int64) * grad_y_stride_q
        grad_y = tl.load(grad_y_ptr + corner + grad_y_offsets, mask=pixels & channels, other=0.0)
        if Y_CHANNELS_LAST:
            grad_y = tl.trans(grad_y)
        pixels, channels = tile_axes(mask_npq, mask_crs, X_CHANNELS_LAST)
        mask = pixels & channels & inside(x_h + p * stride_h, H) & inside(x_w + q * stride_w, W)
        corner = (n.to(tl.int64) * x_stride_n + (p * stride_h).to(tl.int64) * x_stride_h
                  + (q * stride_w).to(tl.int64) * x_stride_w)
        x = tl.load(x_ptr + corner + x_offsets, mask=mask, other=0.0)
        if not X_CHANNELS_LAST:
            x = tl.trans(x)
        acc = tl.dot(grad_y, x, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        q += BLOCK_Q
        next_p = q >= Q
        q = tl.where(next_p, 0, q)
        p += tl.where(next_p, BLOCK_P, 0)
        next_n = p >= P
        p = tl.where(next_n, 0, p)
        n += tl.where(next_n, block_n, 0)

    rows = offs_k * grad_w_stride_k
    columns = offs_c * grad_w_stride_c + offs_r * grad_w_stride_r + offs_s * grad_w_stride_s
    tl.store(grad_w_ptr + (rows[:, None] + columns[None, :]), acc.to(grad_w_ptr.dtype.element_ty),
             mask=mask_k[:, None] & mask_crs[None, :])


@triton.jit
def conv2d_sum_weight_kernel(
    partial_ptr, grad_w_ptr,
    NUMEL, SPLITS, R, S, C,
    grad_w_stride_k, grad_w_stride_c, grad_w_stride_r, grad_w_stride_s,
    BLOCK: tl.constexpr,
):
    """One program adds BLOCK elements of the SPLITS partial gradients, (K, R, S, C) each, in order, and rounds once."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    acc = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for _ in range(0, SPLITS):
        acc += tl.load(partial_ptr + index, mask=mask, other=0.0)
        partial_ptr += NUMEL
    offsets = strided_offsets(index.to(tl.int64), R, S, C, 1,
                              grad_w_stride_k, grad_w_stride_r, grad_w_stride_s, grad_w_stride_c, 0)
    tl.store(grad_w_ptr + offsets, acc.to(grad_w_ptr.dtype.element_ty), mask=mask)
