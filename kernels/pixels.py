"""Helpers of every convolution: tiles of pixels, taps that reach a pixel, strides in units.

Letters are those of conv.py.
"""

import triton
import triton.language as tl

from tritorch.kernels.activation import activate


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
    """Whether 0 <= position < size, in one comparison: unsigned, a negative number is large."""
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
def taps_of_axis(residue, P, taps, stride, padding, dilation, tap_step, inverse,
                 TRANSPOSED: tl.constexpr):
    """Of one axis: the first tap of a program and how many it has, its pixels among the P written,
    the pixel that the first tap reads for the first of them, and the step from tap to tap.

    Transposed, these are the taps that reach the pixels of a residue, and read backwards.
    """
    if TRANSPOSED:
        first, number, origin = residue_taps(
            residue + padding, taps, stride, dilation, tap_step, inverse)
        return first, number, tl.cdiv(P - residue, stride), origin, -(dilation * tap_step // stride)
    else:
        return 0, taps, P, -padding, dilation


@triton.jit
def next_slice(i, j, c, num_s, C, BLOCK_C: tl.constexpr):
    """Tap (i, j) and first channel c of the next slice: through the channels of a tap, then the
    columns of taps, then their rows.
    """
    c += BLOCK_C
    tap_ends = c >= C
    c = tl.where(tap_ends, 0, c)
    j += tap_ends.to(tl.int32)
    row_ends = j == num_s
    j = tl.where(row_ends, 0, j)
    i += row_ends.to(tl.int32)
    return i, j, c


@triton.jit
def pixels_of_axis(position, residue, origin, stride, TRANSPOSED: tl.constexpr):
    """The pixels that the first tap reads, which may lie outside the image, and those written."""
    if TRANSPOSED:
        return origin + position, residue + position * stride
    else:
        return position * stride + origin, position


@triton.jit
def store_pixels(
    acc, y_ptr, preactivation_ptr, residual_ptr, residual_strides,
    n, p, q, y_rows, offs_k, y_stride_k, mask_npq, mask_k,
    CHANNELS_LAST: tl.constexpr, ACTIVATION: tl.constexpr,
):
    """Stores activation(acc + residual), and into `preactivation_ptr`, unless it is None, what the
    activation is of.

    `y_rows` are the offsets of the pixels (n, p, q) in y, and a tile has them as rows where
    CHANNELS_LAST, else as columns.  A residual is laid out as y, or has its own `residual_strides`
    along (n, k, p, q).
    """
    rows, columns = tile_axes(y_rows, offs_k * y_stride_k, CHANNELS_LAST)
    pixels, channels = tile_axes(mask_npq, mask_k, CHANNELS_LAST)
    mask = pixels & channels
    if residual_ptr is not None:
        if residual_strides is None:
            residual_ptrs = residual_ptr + (rows + columns)
        else:
            over_n, over_k, over_p, over_q = residual_strides
            over_rows, over_columns = tile_axes(
                n * over_n + p * over_p + q * over_q, offs_k * over_k, CHANNELS_LAST)
            residual_ptrs = residual_ptr + (over_rows + over_columns)
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(acc.dtype)
    if preactivation_ptr is not None:
        preactivation = acc.to(preactivation_ptr.dtype.element_ty)
        tl.store(preactivation_ptr + (rows + columns), preactivation, mask=mask)
    y = activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (rows + columns), y, mask=mask)


@triton.jit
def pixels_of_tile(offs_npq, block_p, block_q):
    """Image, row and column of the pixels of a tile, counted from its corner."""
    offs_n = offs_npq // (block_p * block_q)
    return offs_n, offs_npq // block_q % block_p, offs_npq % block_q


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
