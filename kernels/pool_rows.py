"""Pooling of dense rows whose windows step by a power of two, in whole vectors of memory.

Outputs are numbered as they lie in memory, whatever their channel.  With W = Q * STRIDE_W the
output number i steps over the columns i * STRIDE_W, ... of the rows that it reads, which are read
as they lie in memory and deinterleaved into columns.  Columns that a window takes from the steps
of its neighbours are not aligned and are read one by one.

A tile is BLOCK outputs, in spans of SPAN that are side by side in one row.  Other letters are those
of pool3d.py; images are volumes of depth 1, whose arithmetic is compiled away.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.pool3d import split_index, volume_divisors

# by bytes per element: with two columns to each output a thread has two 128-bit accesses of them
POOL_ROWS_CONFIGS = {
    itemsize: (Config({"BLOCK": 2048 // itemsize}, num_warps=4, num_stages=1),)
    for itemsize in (2, 4, 8)
}
# strides along a row that the kernels take: `deinterleave` splits in two or in four
STEPS = (2, 4)


def pool_rows_config(itemsize):
    """Tile of every kernel of rows."""
    (config,) = POOL_ROWS_CONFIGS[itemsize]
    return config


def column_windows(s, stride_w, padding_w, dilation_w):
    """The first of the windows that reach into a step, counted from its own, and their number."""
    first = -(((s - 1) * dilation_w - padding_w) // stride_w)
    return first, (stride_w - 1 + padding_w) // stride_w - first + 1


@triton.jit
def tile_spans(Z, P, Q, SPAN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of the tile's elements, of the first in each span, and the place of that one."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    spans = pid * (BLOCK // SPAN) + tl.arange(0, BLOCK // SPAN)
    n, z, p, span = split_index(spans, Z, P, Q // SPAN)
    return pid * BLOCK + tl.arange(0, BLOCK), spans * SPAN, n, z, p, span * SPAN


@triton.jit
def deinterleave(columns, SPANS: tl.constexpr, SPAN: tl.constexpr, STRIDE_W: tl.constexpr):
    """The columns number 0, 1, ... of each step."""
    if STRIDE_W == 2:
        parts = tl.split(columns.reshape(SPANS, SPAN, 2))
    else:
        even, odd = tl.split(columns.reshape(SPANS, SPAN, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def interleave(parts, SPANS: tl.constexpr, SPAN: tl.constexpr, STRIDE_W: tl.constexpr):
    """The inverse of `deinterleave`."""
    if STRIDE_W == 2:
        columns = tl.join(parts[0], parts[1])
    else:
        columns = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return columns.reshape(SPANS, SPAN * STRIDE_W)


@triton.jit
def load_taps(
    x_ptr, rows, q, inside, Q, OTHER: tl.constexpr,
    S: tl.constexpr, STRIDE_W: tl.constexpr, PADDING_W: tl.constexpr, DILATION_W: tl.constexpr,
    SPANS: tl.constexpr, SPAN: tl.constexpr,
):
    """S columns of each window, from the rows that start at `rows`; OTHER outside."""
    x_ptrs = x_ptr + (rows + q * STRIDE_W)[:, None]
    steps = tl.arange(0, SPAN)[None, :]
    inside = inside[:, None]
    whole = tl.load(x_ptrs + tl.arange(0, SPAN * STRIDE_W)[None, :], mask=inside, other=OTHER)
    own = deinterleave(whole, SPANS, SPAN, STRIDE_W)
    columns = ()
    for s in tl.static_range(S):
        # of the window's own step, or of another one
        if (s * DILATION_W - PADDING_W) // STRIDE_W == 0:
            columns += (own[s * DILATION_W - PADDING_W],)
        else:
            step = q[:, None] + steps + (s * DILATION_W - PADDING_W) // STRIDE_W
            # one to the left or to the right
            exists = step >= 0 if s * DILATION_W < PADDING_W else step < Q
            columns += (tl.load(x_ptrs + steps * STRIDE_W + (s * DILATION_W - PADDING_W),
                                mask=inside & exists, other=OTHER),)
    return columns


@triton.jit
def max_pool_rows_forward_kernel(
    x_ptr, y_ptr, taps_ptr, indices_ptr,
    D, H, W, Z, P, Q, OUTPUTS,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_TAPS: tl.constexpr, HAS_INDICES: tl.constexpr,
    SPAN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK outputs."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPANS: tl.constexpr = BLOCK // SPAN
    index, starts, n, z, p, q = tile_spans(Z, P, Q, SPAN, INDEX_64, BLOCK)
    mask = starts < OUTPUTS
    # the division only tells the compiler what the host knows
    W = W // (SPAN * STRIDE_W) * (SPAN * STRIDE_W)
    first_d = z * STRIDE_D - PADDING_D
    first_h = p * STRIDE_H - PADDING_H
    first_w = (q[:, None] + tl.arange(0, SPAN)[None, :]) * STRIDE_W - PADDING_W
    # where all is -inf, the first tap inside the volume wins
    first_t = tl.maximum(DILATION_D - 1 - first_d, 0) // DILATION_D
    first_r = tl.maximum(DILATION_H - 1 - first_h, 0) // DILATION_H
    first_s = tl.maximum(DILATION_W - 1 - first_w, 0) // DILATION_W
    best_tap = (((first_t * R + first_r) * S)[:, None] + first_s).to(tl.int32)
    best = tl.full((SPANS, SPAN), float("-inf"), dtype=ACC)
    for row in tl.static_range(T * R):
        d = first_d + row // R * DILATION_D
        h = first_h + row % R * DILATION_H
        inside = mask & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        xs = load_taps(x_ptr, ((n * D + d) * H + h) * W, q, inside, Q, float("-inf"),
                       S, STRIDE_W, PADDING_W, DILATION_W, SPANS, SPAN)
        for s in tl.static_range(S):
            x = xs[s].to(ACC)
            # the last NaN wins, as in torch; a maximum would drop NaN on a GPU
            better = (x > best) | (x != x)
            best = tl.where(better, x, best)
            best_tap = tl.where(better, row * S + s, best_tap)
    mask = index < OUTPUTS
    tl.store(y_ptr + index, best.to(y_ptr.dtype.element_ty).reshape(BLOCK), mask=mask)
    if HAS_TAPS:
        taps = best_tap.to(taps_ptr.dtype.element_ty)
        tl.store(taps_ptr + index, taps.reshape(BLOCK), mask=mask)
    if HAS_INDICES:
        d = first_d[:, None] + best_tap // (R * S) * DILATION_D
        h = first_h[:, None] + best_tap // S % R * DILATION_H
        w = first_w + best_tap % S * DILATION_W
        indices = (d.to(tl.int64) * H + h) * W + w
        tl.store(indices_ptr + index, indices.reshape(BLOCK), mask=mask)


@triton.jit
def avg_pool_rows_forward_kernel(
    x_ptr, y_ptr,
    D, H, W, Z, P, Q, OUTPUTS, divisor,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    SPAN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK outputs."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPANS: tl.constexpr = BLOCK // SPAN
    index, starts, n, z, p, q = tile_spans(Z, P, Q, SPAN, INDEX_64, BLOCK)
    mask = starts < OUTPUTS
    # the division only tells the compiler what the host knows
    W = W // (SPAN * STRIDE_W) * (SPAN * STRIDE_W)
    first_d = z * STRIDE_D - PADDING_D
    first_h = p * STRIDE_H - PADDING_H
    first_w = (q[:, None] + tl.arange(0, SPAN)[None, :]) * STRIDE_W - PADDING_W
    acc = tl.zeros((SPANS, SPAN), dtype=ACC)
    for row in tl.static_range(T * R):
        d = first_d + row // R
        h = first_h + row % R
        inside = mask & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        xs = load_taps(x_ptr, ((n * D + d) * H + h) * W, q, inside, Q, 0.0,
                       S, STRIDE_W, PADDING_W, 1, SPANS, SPAN)
        for s in tl.static_range(S):
            acc += xs[s].to(ACC)
    divisors = volume_divisors(first_d[:, None], first_h[:, None], first_w, D, H, W, T, R, S,
                               PADDING_D, PADDING_H, PADDING_W, divisor,
                               COUNT_INCLUDE_PAD, HAS_DIVISOR)
    y = (acc / divisors.to(ACC)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + index, y.reshape(BLOCK), mask=index < OUTPUTS)


@triton.jit
def pool_rows_backward_kernel(
    grad_y_ptr, taps_ptr, grad_x_ptr,
    D, H, W, Z, P, Q, cells_d, cells_h, CELLS, divisor,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    NUM_Z: tl.constexpr, NUM_P: tl.constexpr, NUM_Q: tl.constexpr, FIRST_Q: tl.constexpr,
    APART: tl.constexpr, COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    SPAN: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK cells: of a maximum where taps_ptr is given, else of a mean.

    A cell is STRIDE_D x STRIDE_H x STRIDE_W input pixels, along a row those of one step.  The
    windows that reach into it are read once; which of their taps meet which pixel is known at
    compile time.  APART: each window has the cell of its own number.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPANS: tl.constexpr = BLOCK // SPAN
    WINDOWS: tl.constexpr = NUM_Z * NUM_P * NUM_Q
    index, starts, n, cell_d, cell_h, cell_w = tile_spans(
        cells_d, cells_h, Q, SPAN, INDEX_64, BLOCK)
    mask_cells = starts < CELLS
    # the division only tells the compiler what the host knows
    Q = Q // SPAN * SPAN
    W = W // (SPAN * STRIDE_W) * (SPAN * STRIDE_W)
    grad_ys = ()
    taps = ()
    for i in tl.static_range(WINDOWS):
        z = cell_d + i // (NUM_P * NUM_Q) - (NUM_Z - 1)
        p = cell_h + i // NUM_Q % NUM_P - (NUM_P - 1)
        q = (cell_w + FIRST_Q + i % NUM_Q)[:, None] + tl.arange(0, SPAN)[None, :]
        if APART:
            mask = (index < CELLS).reshape(SPANS, SPAN)
            grad_y = tl.load(grad_y_ptr + index, mask=index < CELLS, other=0.0)
            grad_y = grad_y.reshape(SPANS, SPAN).to(ACC)
        else:
            inside = mask_cells & (z >= 0) & (z < Z) & (p >= 0) & (p < P)
            mask = inside[:, None] & (q >= 0) & (q < Q)
            offsets = (((n * Z + z) * P + p) * Q)[:, None] + q
            grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        if taps_ptr is None:
            divisors = volume_divisors(
                (z * STRIDE_D - PADDING_D)[:, None], (p * STRIDE_H - PADDING_H)[:, None],
                q * STRIDE_W - PADDING_W, D, H, W, T, R, S, PADDING_D, PADDING_H, PADDING_W,
                divisor, COUNT_INCLUDE_PAD, HAS_DIVISOR)
            # a window that is not there may have a divisor of 0
            grad_y *= 1.0 / tl.where(mask, divisors, 1).to(ACC)
        elif APART:
            taps_here = tl.load(taps_ptr + index, mask=index < CELLS, other=0)
            taps += (taps_here.reshape(SPANS, SPAN),)
        else:
            taps += (tl.load(taps_ptr + offsets, mask=mask, other=0),)
        grad_ys += (grad_y,)

    for row in tl.static_range(STRIDE_D * STRIDE_H):
        columns = ()
        for column in tl.static_range(STRIDE_W):
            acc = tl.zeros((SPANS, SPAN), dtype=ACC)
            # in the order of the outputs, as torch adds them
            for i in tl.static_range(WINDOWS):
                t = row // STRIDE_H + (NUM_Z - 1 - i // (NUM_P * NUM_Q)) * STRIDE_D
                r = row % STRIDE_H + (NUM_P - 1 - i // NUM_Q % NUM_P) * STRIDE_H
                s = column + PADDING_W - (FIRST_Q + i % NUM_Q) * STRIDE_W
                if (t % DILATION_D == 0 and t // DILATION_D < T
                        and r % DILATION_H == 0 and r // DILATION_H < R
                        and s >= 0 and s % DILATION_W == 0 and s // DILATION_W < S):
                    if taps_ptr is None:
                        acc += grad_ys[i]
                    else:
                        tap = (t // DILATION_D * R + r // DILATION_H) * S + s // DILATION_W
                        acc += tl.where(taps[i] == tap, grad_ys[i], 0.0)
            columns += (acc.to(grad_x_ptr.dtype.element_ty),)
        d = cell_d * STRIDE_D + row // STRIDE_H - PADDING_D
        h = cell_h * STRIDE_H + row % STRIDE_H - PADDING_H
        inside = mask_cells & (d >= 0) & (d < D) & (h >= 0) & (h < H)
        offsets = (((n * D + d) * H + h) * W + cell_w * STRIDE_W)[:, None]
        tl.store(grad_x_ptr + offsets + tl.arange(0, SPAN * STRIDE_W)[None, :],
                 interleave(columns, SPANS, SPAN, STRIDE_W), mask=inside[:, None])
