"""Cross-entropy of logits: one pass over any number of classes in bounded memory, and gradients.

Each of N rows has logits x of C classes and target weights q.  Where the target is a class y of
weights w, label smoothing a makes them q_c = (1 - a) w_y [c = y] + a / C w_c, where it is the
probabilities t they are q_c = w_c ((1 - a) t_c + a / C).  With p = softmax(x) the loss of a row is
the sum of -q_c log(p_c), and its gradient sum(q) p_c - q_c.  In the code `kept` is 1 - a, `spread`
is a / C, and SPREAD says that every class has a target weight: t is given, or a is not 0.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.tiles import strided_offsets

# 8 elements per thread: more of them, each with its running values, would leave room for few warps
CROSS_ENTROPY_CONFIGS = (
    # few classes: many whole rows
    Config({"BLOCK_N": 64, "BLOCK_C": 16}, num_warps=4),
    Config({"BLOCK_N": 32, "BLOCK_C": 32}, num_warps=4),
    Config({"BLOCK_N": 16, "BLOCK_C": 64}, num_warps=4),
    Config({"BLOCK_N": 8, "BLOCK_C": 128}, num_warps=4),
    # a warp for each row, along which it walks if there are more classes
    Config({"BLOCK_N": 4, "BLOCK_C": 256}, num_warps=4, maxnreg=255),
    # long rows, or too few of them
    Config({"BLOCK_N": 1, "BLOCK_C": 2048}, num_warps=8),
    # classes apart in memory: rows side by side
    Config({"BLOCK_N": 128, "BLOCK_C": 8}, num_warps=4),
)
# programs that keep a large GPU busy; more of them would repeat what each does once
PROGRAMS = 4096


def cross_entropy_config(rows, classes, contiguous):
    """The least tile that holds all classes, else a walk; `contiguous`: they are so in memory."""
    *whole_rows, row, apart = CROSS_ENTROPY_CONFIGS
    if not contiguous:
        return apart
    for config in whole_rows:
        if classes <= config.kwargs["BLOCK_C"]:
            return config
    return row if classes > row.kwargs["BLOCK_C"] or rows < 1024 else whole_rows[-1]


def holds_rows(classes, contiguous):
    """Whether a tile has all classes, however many rows there are."""
    *_, whole_row, _, apart = CROSS_ENTROPY_CONFIGS
    return classes <= (whole_row if contiguous else apart).kwargs["BLOCK_C"]


def num_steps(tiles_n, tiles_c):
    """Tiles along the classes that one program of the gradient writes."""
    return min(tiles_c, max(1, tiles_n * tiles_c // PROGRAMS))


@triton.jit
def align_rows(x_rows, ALIGN: tl.constexpr, SHIFTED: tl.constexpr):
    """Where the tiles of rows start, a multiple of ALIGN elements, and how far before the rows."""
    # without SHIFTED the division only tells the compiler what the host knows
    starts = x_rows // ALIGN * ALIGN
    shift = (x_rows - starts).to(tl.int32) if SHIFTED else tl.zeros_like(x_rows).to(tl.int32)
    return starts, shift


@triton.jit
def load_classes(
    y_ptr, weight_ptr, y_rows, mask_n, C, ignore_index, weight_stride, ACC: tl.constexpr,
):
    """Class of each row, whether it is ignored, weight: 0 if so, NaN for a class out of range."""
    y = tl.load(y_ptr + y_rows, mask=mask_n, other=0).to(tl.int64)
    ignored = (y == ignore_index) | (mask_n == 0)
    valid = (y >= 0) & (y < C)
    y = tl.where(valid, y, 0).to(tl.int32)
    if weight_ptr is None:
        weight = tl.full(y.shape, 1.0, ACC)
    else:
        weight = tl.load(weight_ptr + y * weight_stride, mask=mask_n & valid, other=0.0).to(ACC)
    weight = tl.where(valid, weight, float("nan"))
    return y, ignored, tl.where(ignored, 0.0, weight)


@triton.jit
def spread_weights(
    y_ptr, weight_ptr, y_starts, lanes, c, mask, kept, spread, y_stride_c, weight_stride,
    PROBABILITIES: tl.constexpr,
):
    """Target weights of a tile: of the probabilities, or what smoothing takes from the class y."""
    ACC: tl.constexpr = kept.dtype
    q = spread
    if PROBABILITIES:
        offsets = y_starts[:, None] + lanes.to(y_starts.dtype) * y_stride_c
        t = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        q = kept * t + spread
    if weight_ptr is not None:
        q = q * tl.load(weight_ptr + c * weight_stride, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, q, 0.0)


@triton.jit
def empty_lanes(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Running values of `add_tile` before the first tile."""
    # the least number in place of -inf, so that no difference is NaN where logits are -inf
    LEAST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    zeros = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    return tl.full((BLOCK_N, BLOCK_C), LEAST, ACC), zeros, zeros, zeros


@triton.jit
def add_tile(
    largest, total, cost, q_sum,
    x_ptr, y_ptr, weight_ptr, starts, shift, y_starts, mask_n, first, end, kept, spread,
    x_stride_c, y_stride_c, weight_stride,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, EDGE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Adds BLOCK_C classes to the running values of each lane.

    They are the largest logit, the sum of exp(x - largest), the sum of q (largest - x), that of q.
    """
    ACC: tl.constexpr = kept.dtype
    lanes = first + tl.arange(0, BLOCK_C)[None, :]
    c = lanes - shift[:, None]
    mask = mask_n[:, None]
    if EDGE:
        mask = mask & (c >= 0) & (c < end)
    offsets = starts[:, None] + lanes.to(starts.dtype) * x_stride_c
    x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(ACC)
    # one exponential serves both cases: of the two logits compared the larger becomes the reference
    below = tl.exp(-tl.abs(x - largest))
    rises = x > largest
    total = tl.where(rises, total * below + 1.0, total + below)
    new_largest = tl.where(rises, x, largest)
    if SPREAD:
        q = spread_weights(y_ptr, weight_ptr, y_starts, lanes, c, mask, kept, spread,
                           y_stride_c, weight_stride, PROBABILITIES)
        # what has no weight has no cost: the first rise is infinite
        cost += tl.where(q_sum != 0.0, q_sum * (new_largest - largest), 0.0)
        cost += tl.where(mask, q * (new_largest - x), 0.0)
        q_sum += q
    return new_largest, total, cost, q_sum


@triton.jit
def row_statistics(largest, total):
    """The largest logit of each row and log of its sum of exp(x - largest), from its lanes'."""
    row_largest = tl.max(largest, axis=1)
    return row_largest, tl.log(tl.sum(total * tl.exp(largest - row_largest[:, None]), axis=1))


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr, y_ptr, weight_ptr, loss_ptr, rows_ptr,
    N, C, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_c, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    weight_stride,
    ignore_index, smoothing: tl.float64,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, REDUCED: tl.constexpr,
    ALIGN: tl.constexpr, SHIFTED: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes the losses of BLOCK_N rows, or (REDUCED) their sum and the weights'.

    What the gradients need goes to the three rows of rows_ptr, if any: the largest logit, log of
    the sum of exp(x - largest), and the sum of the target weights.  Without them the gradients
    compute it again.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    n = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    x_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    # the host shifts logits and probabilities alike, or not at all
    y_starts, _ = align_rows(y_rows, ALIGN, SHIFTED)
    starts, shift = align_rows(x_rows, ALIGN, SHIFTED)
    # without SHIFTED this too only tells the compiler what divides C
    end = C if SHIFTED else C // ALIGN * ALIGN
    kept = (1.0 - smoothing).to(ACC)
    spread = (smoothing / C).to(ACC)

    largest, total, cost, q_sum = empty_lanes(BLOCK_N, BLOCK_C, ACC)
    # only the first tile can begin before its rows, and only the last ones end after them: all
    # others are read without a mask, which would cost the wide loads
    inner = 0
    if SHIFTED:
        largest, total, cost, q_sum = add_tile(
            largest, total, cost, q_sum,
            x_ptr, y_ptr, weight_ptr, starts, shift, y_starts, mask_n, 0, end, kept, spread,
            x_stride_c, y_stride_c, weight_stride, SPREAD, PROBABILITIES, True, BLOCK_C)
        inner = BLOCK_C
    for first in range(inner, C - BLOCK_C + 1, BLOCK_C):
        largest, total, cost, q_sum = add_tile(
            largest, total, cost, q_sum,
            x_ptr, y_ptr, weight_ptr, starts, shift, y_starts, mask_n, first, end, kept, spread,
            x_stride_c, y_stride_c, weight_stride, SPREAD, PROBABILITIES, False, BLOCK_C)
    outer = C // BLOCK_C * BLOCK_C
    for first in range(outer, C + ALIGN - 1 if SHIFTED else C, BLOCK_C):
        largest, total, cost, q_sum = add_tile(
            largest, total, cost, q_sum,
            x_ptr, y_ptr, weight_ptr, starts, shift, y_starts, mask_n, first, end, kept, spread,
            x_stride_c, y_stride_c, weight_stride, SPREAD, PROBABILITIES, True, BLOCK_C)

    row_largest, log_total = row_statistics(largest, total)
    loss = tl.zeros((BLOCK_N,), ACC)
    weight = tl.zeros((BLOCK_N,), ACC)
    if SPREAD:
        rise = row_largest[:, None] - largest
        loss = tl.sum(cost + tl.where(q_sum != 0.0, q_sum * rise, 0.0), axis=1)
        q_total = tl.sum(q_sum, axis=1)
        loss += q_total * log_total
    if not PROBABILITIES:
        y, ignored, weight = load_classes(
            y_ptr, weight_ptr, y_rows, mask_n, C, ignore_index, weight_stride, ACC)
        offsets = x_rows + y.to(x_rows.dtype) * x_stride_c
        x_y = tl.load(x_ptr + offsets, mask=mask_n, other=0.0).to(ACC)
        loss += kept * weight * ((row_largest - x_y) + log_total)
        loss = tl.where(ignored, 0.0, loss)
        if SPREAD:
            q_total = tl.where(ignored, 0.0, kept * weight + q_total)

    if rows_ptr is not None:
        tl.store(rows_ptr + n, row_largest, mask=mask_n)
        tl.store(rows_ptr + N + n, log_total, mask=mask_n)
        if SPREAD:
            tl.store(rows_ptr + N + N + n, q_total, mask=mask_n)
    if REDUCED:
        tl.store(loss_ptr + pid, tl.sum(tl.where(mask_n, loss, 0.0)))
        if not PROBABILITIES:
            tl.store(loss_ptr + tl.num_programs(0) + pid, tl.sum(weight))
    else:
        tl.store(loss_ptr + n, loss.to(loss_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def store_gradients(
    x_ptr, y_ptr, weight_ptr, grad_ptr,
    starts, shift, y_starts, grad_starts, mask_n, first, end,
    y, row_largest, log_total, q_y, q_total, scale, kept, spread,
    x_stride_c, y_stride_c, weight_stride, grad_stride_c,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, OF_INPUT: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes one tile of a gradient."""
    ACC: tl.constexpr = kept.dtype
    lanes = first + tl.arange(0, BLOCK_C)[None, :]
    c = lanes - shift[:, None]
    mask = mask_n[:, None]
    if EDGE:
        mask = mask & (c >= 0) & (c < end)
    offsets = starts[:, None] + lanes.to(starts.dtype) * x_stride_c
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    log_p = (x - row_largest[:, None]) - log_total[:, None]
    if OF_INPUT:
        grad = q_total[:, None] * tl.exp(log_p)
        if SPREAD:
            grad -= spread_weights(y_ptr, weight_ptr, y_starts, lanes, c, mask, kept, spread,
                                   y_stride_c, weight_stride, PROBABILITIES)
        if not PROBABILITIES:
            grad -= tl.where(c == y[:, None], q_y[:, None], 0.0)
    else:
        grad = -kept * log_p
        if weight_ptr is not None:
            grad *= tl.load(weight_ptr + c * weight_stride, mask=mask, other=0.0).to(ACC)
    grad = (scale[:, None] * grad).to(grad_ptr.dtype.element_ty)
    offsets = grad_starts[:, None] + lanes.to(grad_starts.dtype) * grad_stride_c
    tl.store(grad_ptr + offsets, grad, mask=mask)


@triton.jit
def cross_entropy_backward_kernel(
    x_ptr, y_ptr, weight_ptr, rows_ptr, grad_loss_ptr, denominator_ptr, grad_ptr,
    N, C, STEPS, SPLITS, divisor, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_c, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    grad_stride_c, grad_stride_0, grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4,
    grad_loss_stride_0, grad_loss_stride_1, grad_loss_stride_2,
    grad_loss_stride_3, grad_loss_stride_4,
    weight_stride,
    ignore_index, smoothing: tl.float64,
    SPREAD: tl.constexpr, PROBABILITIES: tl.constexpr, OF_INPUT: tl.constexpr,
    ONE_GRAD_LOSS: tl.constexpr, ALIGN: tl.constexpr, SHIFTED: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program writes STEPS tiles of BLOCK_N rows of one gradient, of x or (not OF_INPUT) t."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid_n = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    n = (pid_n.to(tl.int64) if INDEX_64 else pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    x_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    grad_rows = strided_offsets(n, size_1, size_2, size_3, size_4, grad_stride_0,
                                grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4)
    starts, shift = align_rows(x_rows, ALIGN, SHIFTED)
    y_starts, _ = align_rows(y_rows, ALIGN, SHIFTED)
    grad_starts, _ = align_rows(grad_rows, ALIGN, SHIFTED)
    # without SHIFTED this too only tells the compiler what divides C
    end = C if SHIFTED else C // ALIGN * ALIGN
    kept = (1.0 - smoothing).to(ACC)
    spread = (smoothing / C).to(ACC)

    if ONE_GRAD_LOSS:
        scale = tl.load(grad_loss_ptr).to(ACC) + tl.zeros((BLOCK_N,), ACC)
    else:
        grad_loss_rows = strided_offsets(
            n, size_1, size_2, size_3, size_4, grad_loss_stride_0,
            grad_loss_stride_1, grad_loss_stride_2, grad_loss_stride_3, grad_loss_stride_4)
        scale = tl.load(grad_loss_ptr + grad_loss_rows, mask=mask_n, other=0.0).to(ACC)
    if denominator_ptr is None:
        scale = scale / divisor
    else:
        scale = scale / tl.load(denominator_ptr)
    if PROBABILITIES:
        y, q_y = tl.zeros_like(mask_n).to(tl.int32), tl.zeros_like(scale)
    else:
        y, ignored, weight = load_classes(
            y_ptr, weight_ptr, y_rows, mask_n, C, ignore_index, weight_stride, ACC)
        # the denominator is 0 where all rows are ignored, and their gradient still is
        scale = tl.where(ignored, 0.0, scale)
        q_y = kept * weight
    q_total = q_y
    if rows_ptr is None:
        # a tile has all classes
        largest, total, cost, q_sum = empty_lanes(BLOCK_N, BLOCK_C, ACC)
        largest, total, cost, q_sum = add_tile(
            largest, total, cost, q_sum,
            x_ptr, y_ptr, weight_ptr, starts, shift, y_starts, mask_n, 0, end, kept, spread,
            x_stride_c, y_stride_c, weight_stride, SPREAD, PROBABILITIES, True, BLOCK_C)
        row_largest, log_total = row_statistics(largest, total)
        if SPREAD:
            q_total += tl.sum(q_sum, axis=1)
            if not PROBABILITIES:
                q_total = tl.where(ignored, 0.0, q_total)
    else:
        row_largest = tl.load(rows_ptr + n, mask=mask_n, other=0.0)
        log_total = tl.load(rows_ptr + N + n, mask=mask_n, other=0.0)
        if SPREAD:
            q_total = tl.load(rows_ptr + N + N + n, mask=mask_n, other=0.0)

    for step in range(STEPS):
        first = (split * STEPS + step) * BLOCK_C
        inner = first + BLOCK_C <= C
        if SHIFTED:
            inner = inner & (first > 0)
        if inner:
            store_gradients(
                x_ptr, y_ptr, weight_ptr, grad_ptr,
                starts, shift, y_starts, grad_starts, mask_n, first, end,
                y, row_largest, log_total, q_y, q_total, scale, kept, spread,
                x_stride_c, y_stride_c, weight_stride, grad_stride_c,
                SPREAD, PROBABILITIES, OF_INPUT, False, BLOCK_C)
        else:
            store_gradients(
                x_ptr, y_ptr, weight_ptr, grad_ptr,
                starts, shift, y_starts, grad_starts, mask_n, first, end,
                y, row_largest, log_total, q_y, q_total, scale, kept, spread,
                x_stride_c, y_stride_c, weight_stride, grad_stride_c,
                SPREAD, PROBABILITIES, OF_INPUT, True, BLOCK_C)
