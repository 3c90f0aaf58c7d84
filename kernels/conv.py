"""Convolution as an implicit matrix product: forward, gradients of the image and of the filter.

The letters follow the step that a kernel takes, in whatever direction: channels `C` are read and
`K` written, both per group; the image that is read is H x W, the one that is written P x Q.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.tiles import strided_offsets


def _tile(npq, k, crs, num_warps, num_stages, maxnreg=None):
    blocks = {"BLOCK_NPQ": npq, "BLOCK_K": k, "BLOCK_CRS": crs}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


# by bytes per element: 16-bit operands feed tensor cores, float32 runs TF32 or plain FMA; with a
# limit of 255 registers ptxas does not aim for an occupancy that would spill a few scalars
CONV2D_CONFIGS = {
    2: (
        _tile(128, 256, 32, 8, 4),
        _tile(128, 128, 64, 8, 3),
        _tile(128, 64, 64, 4, 3, 255),
        _tile(64, 64, 64, 4, 4),
        _tile(128, 32, 64, 4, 3),
    ),
    4: (
        _tile(128, 128, 32, 8, 3, 255),
        _tile(128, 64, 32, 8, 3, 255),
        _tile(64, 64, 32, 4, 3, 255),
        _tile(128, 32, 16, 8, 3, 255),
    ),
    8: (_tile(64, 32, 16, 4, 2),),
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

# for operands gathered element by element: each has an address of its own, so fewer per thread
CONV2D_GATHER_CONFIGS = {
    2: (_tile(128, 64, 32, 8, 3, 255), _tile(64, 32, 32, 4, 3, 255)),
    4: (_tile(64, 64, 16, 8, 3, 255), _tile(64, 32, 16, 4, 3, 255)),
    8: (_tile(32, 32, 16, 4, 2, 255),),
}

CONV2D_GRAD_WEIGHT_CONFIGS = {
    2: (_tile(64, 128, 128, 8, 3), _tile(64, 64, 128, 4, 3), _tile(64, 64, 64, 4, 4)),
    4: (_tile(32, 64, 64, 4, 3, 255),),
    8: (_tile(16, 32, 32, 4, 2, 255),),
}

CONV2D_GRAD_WEIGHT_GATHER_CONFIGS = {
    2: (_tile(32, 64, 64, 8, 3, 255), _tile(32, 32, 32, 8, 3, 255)),
    4: (_tile(32, 64, 64, 8, 3, 255), _tile(32, 32, 32, 8, 3, 255)),
    8: (_tile(16, 32, 32, 4, 2, 255),),
}

# weights per program of the sum over splits
BLOCK = 256
# tiles that keep most multiprocessors of a large GPU busy
ENOUGH_TILES = 96


def conv2d_config(npq, k, groups, itemsize):
    """The largest tile that is not mostly empty and of which there are enough."""
    configs = CONV2D_CONFIGS[itemsize]
    return configs[-1] if itemsize == 8 else _largest(configs, npq, k, groups)


def conv2d_full_config(npq, k, groups, itemsize):
    """The same of float32 in full precision."""
    return _largest(CONV2D_FULL_CONFIGS[itemsize], npq, k, groups)


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


def conv2d_grad_weight_config(k, crs, itemsize):
    """The largest tile that is not mostly empty: splitting the sum over pixels fills the GPU."""
    configs = CONV2D_GRAD_WEIGHT_CONFIGS[itemsize]
    for config in configs[:-1]:
        if k > config.kwargs["BLOCK_K"] // 2 and crs > config.kwargs["BLOCK_CRS"] // 2:
            return config
    return configs[-1]


def conv2d_grad_weight_gather_config(k, crs, itemsize):
    """The larger tile unless it is mostly empty."""
    return CONV2D_GRAD_WEIGHT_GATHER_CONFIGS[itemsize][-1 if k <= 32 or crs <= 32 else 0]


def pixel_blocks(n, p, q, block, min_q):
    """Rows and columns of a tile of `block` pixels, and how many tiles cover n images of p x q.

    The fewest tiles, and of those the squarest, where neighbouring taps share the most pixels;
    with `min_q` columns at least, unless the image has fewer.
    """
    best = None
    for log_q in range(block.bit_length()):
        block_q = 1 << log_q
        for log_p in range(block.bit_length() - log_q):
            block_p = 1 << log_p
            block_n = block // (block_p * block_q)
            tiles = triton.cdiv(n, block_n) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
            found = (block_q < min(min_q, q), tiles, block_p + block_q, block_p, block_q)
            best = found if best is None or found < best else best
    return best[3], best[4], best[1]


@triton.jit
def tile_axes(rows, columns, ROWS_FIRST: tl.constexpr):
    """`rows` and `columns` as the axes of a tile; threads walk along its last one."""
    if ROWS_FIRST:
        return rows[:, None], columns[None, :]
    else:
        return rows[None, :], columns[:, None]


@triton.jit
def inside(position, size):
    """Whether 0 <= position < size, at once: as an unsigned number a negative one is large."""
    return position.to(tl.uint32) < tl.full((), size, tl.uint32)


@triton.jit
def in_units(UNIT: tl.constexpr, INDEX_64: tl.constexpr, a, b, c):
    """Strides that come divided by UNIT, so that the compiler sees what divides them."""
    if INDEX_64:
        return tl.cast(a, tl.int64) * UNIT, tl.cast(b, tl.int64) * UNIT, tl.cast(c, tl.int64) * UNIT
    else:
        return a * UNIT, b * UNIT, c * UNIT


@triton.jit
def residue_taps(reach, taps, stride, dilation, tap_step, inverse):
    """First tap that reaches a residue class, how many do, and what the first reads at its origin.

    A transposed convolution takes pixel h from (h + padding - r * dilation) / stride, for those
    taps r where that is whole.  They are the same for all pixels of one residue modulo the stride,
    and lie `tap_step` = stride / gcd(stride, dilation) apart.  `inverse` is that of dilation / gcd
    modulo tap_step, `reach` is residue + padding.
    """
    gcd = stride // tap_step
    first = reach // gcd * inverse % tap_step
    number = tl.where(reach % gcd == 0, tl.cdiv(taps - first, tap_step), 0)
    return first, number, (reach - first * dilation) // stride


@triton.jit
def corner_offset(n, p, q, stride_n, stride_p, stride_q):
    """Where a tile of pixels starts."""
    return n.to(tl.int64) * stride_n + p.to(tl.int64) * stride_p + q.to(tl.int64) * stride_q


@triton.jit
def next_corner(n, p, q, P, Q, block_n, block_p, block_q):
    """The tile of pixels after the one at (n, p, q): along rows, then columns, then images."""
    q += block_q
    row_ends = q >= Q
    q = tl.where(row_ends, 0, q)
    p += tl.where(row_ends, block_p, 0)
    image_ends = p >= P
    p = tl.where(image_ends, 0, p)
    n += tl.where(image_ends, block_n, 0)
    return n, p, q


@triton.jit
def conv2d_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr,
    N, C, H, W, K, R, S, P, Q, STEPS, SPLITS, bias_stride,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    w_stride_group, w_stride_k, w_stride_c, w_stride_r, w_stride_s,
    y_stride_split, y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    TRANSPOSED: tl.constexpr, FLAT_C: tl.constexpr, UNIT: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr, Y_CHANNELS_LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_NPQ: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr,
):
    """One program computes BLOCK_NPQ pixels x BLOCK_K channels of y over STEPS slices of x and w.

    A slice is BLOCK_CRS channels of one tap or, where C = FLAT_C channels would leave much of it
    empty, of all (tap, channel) pairs.  Transposed, the pixels of a program share their residue
    modulo the stride: a convolution of unit stride over the taps that reach the residue.
    Numbers of channels, and strides along all else, come in units of UNIT.
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
        w_stride_c *= UNIT
    else:
        w_stride_k *= UNIT
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
        # and all offsets that follow from them
        offs_k = offs_k.to(tl.int64)
        slice_crs = slice_crs.to(tl.int64)
        offs_npq = offs_npq.to(tl.int64)
    mask_k = offs_k < K

    if TRANSPOSED:
        residue_h = pid_npq % (stride_h * stride_w) // stride_w
        residue_w = pid_npq % stride_w
        pid_npq = pid_npq // (stride_h * stride_w)
        first_r, num_r, x_h = residue_taps(
            residue_h + padding_h, R, stride_h, dilation_h, tap_step_h, inverse_h)
        first_s, num_s, x_w = residue_taps(
            residue_w + padding_w, S, stride_w, dilation_w, tap_step_w, inverse_w)
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
    # a residue may have no pixels and no taps: divisors are 1 at least
    n = offs_npq // max(num_p * num_q, 1)
    p = offs_npq // max(num_q, 1) % max(num_p, 1)
    q = offs_npq % max(num_q, 1)
    # the pixel that the first tap reads, which may lie outside the image
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
    if FLAT_C:
        # a constant: its divisions are cheap, and do not hide aligned vectors
        C = FLAT_C
        num_steps = tl.cdiv(C * num_r * num_s, BLOCK_CRS)
    else:
        num_steps = num_c * num_r * num_s
    begin = split * STEPS
    c = begin % num_c * BLOCK_CRS
    i = begin // num_c // max(num_s, 1)
    j = begin // num_c % max(num_s, 1)
    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), dtype=ACC)
    for step in range(begin, min(begin + STEPS, num_steps)):
        if FLAT_C:
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
        taps_h = offs_i * step_h
        taps_w = offs_j * step_w
        x_columns = offs_c * x_stride_c + taps_h * x_stride_h + taps_w * x_stride_w
        rows, columns = tile_axes(x_rows, x_columns, X_CHANNELS_LAST)
        rows_h, taps_h = tile_axes(x_h, taps_h, X_CHANNELS_LAST)
        rows_w, taps_w = tile_axes(x_w, taps_w, X_CHANNELS_LAST)
        _, channels = tile_axes(mask_npq, mask_crs, X_CHANNELS_LAST)
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
        if not FLAT_C:
            c += BLOCK_CRS
            tap_ends = c >= C
            c = tl.where(tap_ends, 0, c)
            j += tap_ends.to(tl.int32)
            row_ends = j == num_s
            j = tl.where(row_ends, 0, j)
            i += row_ends.to(tl.int32)

    if HAS_BIAS:
        bias_ptrs = bias_ptr + (group * K + offs_k) * bias_stride
        bias = tl.load(bias_ptrs, mask=mask_k & (split == 0), other=0.0)
        acc += bias.to(ACC)[None, :]
    if not Y_CHANNELS_LAST:
        acc = tl.trans(acc)
    y_rows = n * y_stride_n + p * y_stride_p + q * y_stride_q
    rows, columns = tile_axes(y_rows, offs_k * y_stride_k, Y_CHANNELS_LAST)
    pixels, channels = tile_axes(mask_npq, mask_k, Y_CHANNELS_LAST)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (rows + columns), y, mask=pixels & channels)


@triton.jit
def conv2d_grad_weight_kernel(
    grad_y_ptr, x_ptr, grad_w_ptr,
    C, H, W, K, R, S, N, P, Q, BLOCK_P, BLOCK_Q, STEPS, SPLITS,
    grad_y_stride_n, grad_y_stride_k, grad_y_stride_p, grad_y_stride_q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    grad_w_stride_split, grad_w_stride_k, grad_w_stride_c, grad_w_stride_r, grad_w_stride_s,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    FLAT_C: tl.constexpr, UNIT: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr, X_CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_CRS: tl.constexpr, BLOCK_NPQ: tl.constexpr,
):
    """One program sums BLOCK_K channels x BLOCK_CRS (tap, channel) pairs over STEPS pixel tiles.

    A tile is BLOCK_P x BLOCK_Q pixels of BLOCK_NPQ / (BLOCK_P * BLOCK_Q) images.  Its pixels keep
    their places around its corner, and the next tile moves the three numbers of the corner, where
    a flat index of pixels would be divided anew.  FLAT_C and UNIT are as in `conv2d_kernel`.
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
        # and all offsets that follow from them
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
    rows, columns = tile_axes(offs_n * x_stride_n, offs_c * x_stride_c, X_CHANNELS_LAST)
    rows_h, taps_h = tile_axes(offs_p * stride_h, offs_r * dilation_h - padding_h, X_CHANNELS_LAST)
    rows_w, taps_w = tile_axes(offs_q * stride_w, offs_s * dilation_w - padding_w, X_CHANNELS_LAST)
    x_h = rows_h + taps_h
    x_w = rows_w + taps_w
    x_offsets = (rows + rows_h * x_stride_h + rows_w * x_stride_w
                 + (columns + taps_h * x_stride_h + taps_w * x_stride_w))

    num_p = tl.cdiv(P, BLOCK_P)
    num_q = tl.cdiv(Q, BLOCK_Q)
    begin = split * STEPS
    n = begin // (num_p * num_q) * block_n
    p = begin // num_q % num_p * BLOCK_P
    q = begin % num_q * BLOCK_Q
    acc = tl.zeros((BLOCK_K, BLOCK_CRS), dtype=ACC)
    for _ in range(STEPS):
        mask_npq = (offs_n < N - n) & (offs_p < P - p) & (offs_q < Q - q)
        pixels, channels = tile_axes(mask_npq, mask_k, Y_CHANNELS_LAST)
        corner = corner_offset(n, p, q, grad_y_stride_n, grad_y_stride_p, grad_y_stride_q)
        grad_y = tl.load(grad_y_ptr + corner + grad_y_offsets, mask=pixels & channels, other=0.0)
        if Y_CHANNELS_LAST:
            grad_y = tl.trans(grad_y)
        pixels, channels = tile_axes(mask_npq, mask_crs, X_CHANNELS_LAST)
        mask = pixels & channels & inside(x_h + p * stride_h, H) & inside(x_w + q * stride_w, W)
        corner = corner_offset(n, p * stride_h, q * stride_w, x_stride_n, x_stride_h, x_stride_w)
        x = tl.load(x_ptr + corner + x_offsets, mask=mask, other=0.0)
        if not X_CHANNELS_LAST:
            x = tl.trans(x)
        acc = tl.dot(grad_y, x, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        n, p, q = next_corner(n, p, q, P, Q, block_n, BLOCK_P, BLOCK_Q)

    rows = offs_k * grad_w_stride_k
    columns = offs_c * grad_w_stride_c + offs_r * grad_w_stride_r + offs_s * grad_w_stride_s
    grad_w = acc.to(grad_w_ptr.dtype.element_ty)
    mask = mask_k[:, None] & mask_crs[None, :]
    tl.store(grad_w_ptr + (rows[:, None] + columns[None, :]), grad_w, mask=mask)


@triton.jit
def conv2d_sum_weight_kernel(
    partial_ptr, grad_w_ptr,
    NUMEL, SPLITS, R, S, C,
    grad_w_stride_k, grad_w_stride_c, grad_w_stride_r, grad_w_stride_s,
    BLOCK: tl.constexpr,
):
    """One program adds BLOCK elements of SPLITS sums (K, R, S, C), in order, and rounds once."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    acc = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for _ in range(SPLITS):
        acc += tl.load(partial_ptr + index, mask=mask, other=0.0)
        partial_ptr += NUMEL
    offsets = strided_offsets(
        index.to(tl.int64), R, S, C, 1,
        grad_w_stride_k, grad_w_stride_r, grad_w_stride_s, grad_w_stride_c, 0)
    tl.store(grad_w_ptr + offsets, acc.to(grad_w_ptr.dtype.element_ty), mask=mask)
