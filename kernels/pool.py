"""Max and average pooling of images, without atomics: outputs and gradients are gathered.

A tap is a place in a window, numbered row by row.  The maximum's tap is kept for backward, in
one byte where that is enough, and is compared there with the tap that meets a pixel.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.windows import adaptive_end, adaptive_start, window_divisors

# by bytes per element, so that a thread has one 128-bit access along contiguous channels
POOL_CONFIGS = {
    itemsize: (
        # channels along memory
        Config({"BLOCK_PIXELS": 16 // itemsize, "BLOCK_C": 64}, num_warps=2, num_stages=1),
        Config({"BLOCK_PIXELS": 64 // itemsize, "BLOCK_C": 16}, num_warps=2, num_stages=1),
        # pixels along memory, one a thread: its offsets serve four channels
        Config({"BLOCK_PIXELS": 128, "BLOCK_C": 4}, num_warps=4, num_stages=1),
    )
    for itemsize in (2, 4, 8)
}


def pool_config(channels_last, channels, itemsize):
    """Tile of every pooling kernel, along the contiguous axis of the tensor that it writes."""
    along_channels, few_channels, along_pixels = POOL_CONFIGS[itemsize]
    if not channels_last:
        return along_pixels
    # at most a quarter of the channels computed in vain
    return along_channels if -channels % 64 <= channels // 4 else few_channels


@triton.jit
def tile_indices(C, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr, INDEX_64: tl.constexpr):
    """Pixels and channels of this program: neighbours in the grid are neighbours in channels."""
    pid = tl.program_id(0)
    num_c = tl.cdiv(C, BLOCK_C)
    offs_c = pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid_pixels = pid // num_c
    if INDEX_64:
        offs_c = offs_c.to(tl.int64)
        pid_pixels = pid_pixels.to(tl.int64)
    return pid_pixels * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS), offs_c


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, y_ptr, taps_ptr, indices_ptr,
    C, H, W, P, Q, NPQ,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    HAS_TAPS: tl.constexpr, HAS_INDICES: tl.constexpr, ADAPTIVE: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of BLOCK_C channels.

    The taps and the indices have the strides of y.  ADAPTIVE windows cover the image and have R x S
    pixels at most.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_npq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_npq = offs_npq < NPQ
    mask_c = (offs_c < C)[None, :]
    q = offs_npq % Q
    p = offs_npq // Q % P
    n = offs_npq // Q // P
    if ADAPTIVE:
        h, w = adaptive_start(p, H, P), adaptive_start(q, W, Q)
        h_end, w_end = adaptive_end(p, H, P), adaptive_end(q, W, Q)
    else:
        h, w = p * stride_h - padding_h, q * stride_w - padding_w
        h_end, w_end = H, W
    x_offsets = n * x_stride_n + h * x_stride_h + w * x_stride_w
    x_ptrs = x_ptr + x_offsets[:, None] + (offs_c * x_stride_c)[None, :]
    # where all is -inf, the first tap inside the image wins
    first_r = tl.maximum(dilation_h - 1 - h, 0) // dilation_h
    first_s = tl.maximum(dilation_w - 1 - w, 0) // dilation_w
    first_tap = (first_r * S + first_s).to(tl.int32)
    best_tap = tl.broadcast_to(first_tap[:, None], (BLOCK_PIXELS, BLOCK_C))
    best = tl.full((BLOCK_PIXELS, BLOCK_C), float("-inf"), dtype=ACC)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        r = tap // S * dilation_h
        s = tap % S * dilation_w
        if INDEX_64:
            r = tl.cast(r, tl.int64)
            s = tl.cast(s, tl.int64)
        inside = mask_npq & (h + r >= 0) & (h + r < h_end) & (w + s >= 0) & (w + s < w_end)
        x = tl.load(x_ptrs + (r * x_stride_h + s * x_stride_w),
                    mask=inside[:, None] & mask_c, other=float("-inf")).to(ACC)
        # the last NaN wins, as in torch; a maximum would drop NaN on a GPU
        better = (x > best) | (x != x)
        best = tl.where(better, x, best)
        best_tap = tl.where(better, tap, best_tap)
    y_offsets = n * y_stride_n + p * y_stride_p + q * y_stride_q
    y_offsets = y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    mask = mask_npq[:, None] & mask_c
    tl.store(y_ptr + y_offsets, best.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_TAPS:
        tl.store(taps_ptr + y_offsets, best_tap.to(taps_ptr.dtype.element_ty), mask=mask)
    if HAS_INDICES:
        h_best = h[:, None] + best_tap // S * dilation_h
        w_best = w[:, None] + best_tap % S * dilation_w
        tl.store(indices_ptr + y_offsets, h_best.to(tl.int64) * W + w_best, mask=mask)


@triton.jit
def max_pool2d_backward_kernel(
    grad_y_ptr, taps_ptr, grad_x_ptr,
    C, H, W, P, Q, cells_h, cells_w, CELLS,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_p, grad_y_stride_q,
    taps_stride_n, taps_stride_c, taps_stride_p, taps_stride_q,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_h, grad_x_stride_w,
    padding_h, padding_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS cells of BLOCK_C channels.

    A cell is STRIDE_H x STRIDE_W input pixels that lie alike in the windows around them: these are
    read once, and which of their taps meets which pixel is known at compile time.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    # windows along each axis that reach into a cell
    NUM_P: tl.constexpr = ((R - 1) * DILATION_H + STRIDE_H) // STRIDE_H
    NUM_Q: tl.constexpr = ((S - 1) * DILATION_W + STRIDE_W) // STRIDE_W
    offs_cells, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_cells = offs_cells < CELLS
    mask_c = (offs_c < C)[None, :]
    cell_w = offs_cells % cells_w
    cell_h = offs_cells // cells_w % cells_h
    n = offs_cells // cells_w // cells_h
    grad_y_ptrs = grad_y_ptr + (offs_c * grad_y_stride_c)[None, :]
    taps_ptrs = taps_ptr + (offs_c * taps_stride_c)[None, :]
    grad_x_ptrs = grad_x_ptr + (offs_c * grad_x_stride_c)[None, :]
    grad_ys = ()
    taps = ()
    for i in tl.static_range(NUM_P * NUM_Q):
        p = cell_h + i // NUM_Q - (NUM_P - 1)
        q = cell_w + i % NUM_Q - (NUM_Q - 1)
        mask = (mask_cells & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None] & mask_c
        offsets = n * grad_y_stride_n + p * grad_y_stride_p + q * grad_y_stride_q
        grad_ys += (tl.load(grad_y_ptrs + offsets[:, None], mask=mask, other=0.0).to(ACC),)
        offsets = n * taps_stride_n + p * taps_stride_p + q * taps_stride_q
        taps += (tl.load(taps_ptrs + offsets[:, None], mask=mask, other=0),)
    for pixel in tl.static_range(STRIDE_H * STRIDE_W):
        acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
        # in the order of the outputs, as torch adds them
        for i in tl.static_range(NUM_P * NUM_Q):
            r = pixel // STRIDE_W + (NUM_P - 1 - i // NUM_Q) * STRIDE_H
            s = pixel % STRIDE_W + (NUM_Q - 1 - i % NUM_Q) * STRIDE_W
            if (r % DILATION_H == 0 and r // DILATION_H < R
                    and s % DILATION_W == 0 and s // DILATION_W < S):
                tap = r // DILATION_H * S + s // DILATION_W
                acc += tl.where(taps[i] == tap, grad_ys[i], 0.0)
        h = cell_h * STRIDE_H + pixel // STRIDE_W - padding_h
        w = cell_w * STRIDE_W + pixel % STRIDE_W - padding_w
        inside = mask_cells & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        offsets = n * grad_x_stride_n + h * grad_x_stride_h + w * grad_x_stride_w
        tl.store(grad_x_ptrs + offsets[:, None], acc.to(grad_x_ptr.dtype.element_ty),
                 mask=inside[:, None] & mask_c)


@triton.jit
def max_pool2d_backward_loop_kernel(
    grad_y_ptr, taps_ptr, grad_x_ptr,
    C, H, W, P, Q, NHW,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_p, grad_y_stride_q,
    taps_stride_n, taps_stride_c, taps_stride_p, taps_stride_q,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_h, grad_x_stride_w,
    R, S, num_p, num_q, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    ADAPTIVE: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS input pixels of BLOCK_C channels, for any window.

    At most num_p x num_q windows contain a pixel.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_nhw, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_nhw = offs_nhw < NHW
    mask_c = (offs_c < C)[None, :]
    w = offs_nhw % W
    h = offs_nhw // W % H
    n = offs_nhw // W // H
    if ADAPTIVE:
        first_p, first_q = adaptive_start(h, P, H), adaptive_start(w, Q, W)
        p_end, q_end = adaptive_end(h, P, H), adaptive_end(w, Q, W)
    else:
        first_p = (h + padding_h) // stride_h - (num_p - 1)
        first_q = (w + padding_w) // stride_w - (num_q - 1)
        p_end, q_end = P, Q
    grad_y_ptrs = grad_y_ptr + (offs_c * grad_y_stride_c)[None, :]
    taps_ptrs = taps_ptr + (offs_c * taps_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    # in the order of the outputs, as torch adds them
    for i in tl.range(0, num_p * num_q, loop_unroll_factor=4):
        p = first_p + i // num_q
        q = first_q + i % num_q
        # both at least 0, since the window starts at or before the pixel
        if ADAPTIVE:
            r, s = h - adaptive_start(p, H, P), w - adaptive_start(q, W, Q)
        else:
            r, s = h + padding_h - p * stride_h, w + padding_w - q * stride_w
        inside = mask_nhw & (p >= 0) & (p < p_end) & (q >= 0) & (q < q_end)
        inside &= (r % dilation_h == 0) & (r // dilation_h < R)
        inside &= (s % dilation_w == 0) & (s // dilation_w < S)
        mask = inside[:, None] & mask_c
        offsets = n * grad_y_stride_n + p * grad_y_stride_p + q * grad_y_stride_q
        grad_y = tl.load(grad_y_ptrs + offsets[:, None], mask=mask, other=0.0).to(ACC)
        offsets = n * taps_stride_n + p * taps_stride_p + q * taps_stride_q
        taps = tl.load(taps_ptrs + offsets[:, None], mask=mask, other=0)
        tap = r // dilation_h * S + s // dilation_w
        acc += tl.where(taps == tap[:, None], grad_y, 0.0)
    offsets = n * grad_x_stride_n + h * grad_x_stride_h + w * grad_x_stride_w
    grad_x_ptrs = grad_x_ptr + offsets[:, None] + (offs_c * grad_x_stride_c)[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_nhw[:, None] & mask_c)


@triton.jit
def max_pool2d_gather_kernel(
    x_ptr, taps_ptr, y_ptr,
    C, H, W, P, Q, NPQ,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    S: tl.constexpr, ADAPTIVE: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program reads x at the taps of BLOCK_PIXELS windows of BLOCK_C channels.

    The taps have the strides of y.
    """
    offs_npq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask = (offs_npq < NPQ)[:, None] & (offs_c < C)[None, :]
    q = offs_npq % Q
    p = offs_npq // Q % P
    n = offs_npq // Q // P
    y_offsets = n * y_stride_n + p * y_stride_p + q * y_stride_q
    y_offsets = y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    taps = tl.load(taps_ptr + y_offsets, mask=mask, other=0).to(tl.int32)
    if ADAPTIVE:
        h, w = adaptive_start(p, H, P), adaptive_start(q, W, Q)
    else:
        h, w = p * stride_h - padding_h, q * stride_w - padding_w
    h = h[:, None] + taps // S * dilation_h
    w = w[:, None] + taps % S * dilation_w
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (offs_c * x_stride_c)[None, :]
    x_ptrs += h * x_stride_h + w * x_stride_w
    # every tap of a dilated window may miss a small image
    x = tl.load(x_ptrs, mask=mask & (h < H) & (w < W), other=0.0)
    tl.store(y_ptr + y_offsets, x, mask=mask)


@triton.jit
def avg_pool2d_forward_kernel(
    x_ptr, y_ptr,
    C, H, W, P, Q, NPQ,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_p, y_stride_q,
    stride_h, stride_w, padding_h, padding_w, divisor,
    R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of BLOCK_C channels."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_npq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_npq = offs_npq < NPQ
    mask_c = (offs_c < C)[None, :]
    q = offs_npq % Q
    p = offs_npq // Q % P
    n = offs_npq // Q // P
    h = p * stride_h - padding_h
    w = q * stride_w - padding_w
    x_offsets = n * x_stride_n + h * x_stride_h + w * x_stride_w
    x_ptrs = x_ptr + x_offsets[:, None] + (offs_c * x_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        r = tap // S
        s = tap % S
        if INDEX_64:
            r = tl.cast(r, tl.int64)
            s = tl.cast(s, tl.int64)
        inside = mask_npq & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        acc += tl.load(x_ptrs + (r * x_stride_h + s * x_stride_w),
                       mask=inside[:, None] & mask_c, other=0.0).to(ACC)
    divisors = window_divisors(h, w, H, W, R, S, padding_h, padding_w, divisor,
                               COUNT_INCLUDE_PAD, HAS_DIVISOR)
    y = acc / divisors.to(ACC)[:, None]
    y_offsets = n * y_stride_n + p * y_stride_p + q * y_stride_q
    y_ptrs = y_ptr + y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_npq[:, None] & mask_c)


@triton.jit
def avg_pool2d_backward_kernel(
    grad_y_ptr, grad_x_ptr,
    C, H, W, P, Q, NHW,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_p, grad_y_stride_q,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_h, grad_x_stride_w,
    R, S, stride_h, stride_w, padding_h, padding_w, divisor,
    NUM_P: tl.constexpr, NUM_Q: tl.constexpr, UNROLL: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS input pixels of BLOCK_C channels.

    At most NUM_P x NUM_Q windows contain a pixel; they are added in the order of the outputs.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_nhw, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_nhw = offs_nhw < NHW
    mask_c = (offs_c < C)[None, :]
    w = offs_nhw % W
    h = offs_nhw // W % H
    n = offs_nhw // W // H
    first_p = (h + padding_h) // stride_h - (NUM_P - 1)
    first_q = (w + padding_w) // stride_w - (NUM_Q - 1)
    grad_y_ptrs = grad_y_ptr + (offs_c * grad_y_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    for i in tl.range(0, NUM_P * NUM_Q, loop_unroll_factor=UNROLL):
        p = first_p + i // NUM_Q
        q = first_q + i % NUM_Q
        h_window = p * stride_h - padding_h
        w_window = q * stride_w - padding_w
        inside = mask_nhw & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        inside &= (h < h_window + R) & (w < w_window + S)
        offsets = n * grad_y_stride_n + p * grad_y_stride_p + q * grad_y_stride_q
        grad_y = tl.load(grad_y_ptrs + offsets[:, None], mask=inside[:, None] & mask_c, other=0.0)
        divisors = window_divisors(h_window, w_window, H, W, R, S, padding_h, padding_w, divisor,
                                   COUNT_INCLUDE_PAD, HAS_DIVISOR)
        # a window that is not there may have a divisor of 0
        scale = 1.0 / tl.where(inside, divisors, 1).to(ACC)
        acc += grad_y.to(ACC) * scale[:, None]
    offsets = n * grad_x_stride_n + h * grad_x_stride_h + w * grad_x_stride_w
    grad_x_ptrs = grad_x_ptr + offsets[:, None] + (offs_c * grad_x_stride_c)[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_nhw[:, None] & mask_c)
