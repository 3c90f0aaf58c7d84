"""Helpers of every convolution: tiles of pixels, taps that reach a pixel, strides in units.

Letters are those of conv.py.
"""

import triton
import triton.language as tl


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
