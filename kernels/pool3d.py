"""Max and average pooling of volumes: pool.py with one more axis.

D, T and Z are the depths of a volume, of a window and of an output.  A tap is a place
in a window, numbered slice by slice and row by row.
"""

import triton
import triton.language as tl

from tritorch.kernels.pool import POOL_CONFIGS, tile_indices
from tritorch.kernels.windows import window_extent

# 16 channels are one to four sectors of memory, and suit any number of channels
POOL3D_CONFIGS = {itemsize: configs[1:] for itemsize, configs in POOL_CONFIGS.items()}


def pool3d_config(channels_last, itemsize):
    """Tile of every kernel that writes volumes, along the contiguous axis of what it writes."""
    along_channels, along_pixels = POOL3D_CONFIGS[itemsize]
    return along_channels if channels_last else along_pixels


@triton.jit
def split_index(index, size_1, size_2, size_3):
    """Image and position of the element number `index` (row-major) of volumes of these sizes."""
    rows = index // size_3
    slices = rows // size_2
    return slices // size_1, slices % size_1, rows % size_2, index % size_3


@triton.jit
def max_pool3d_forward_kernel(
    x_ptr, y_ptr, taps_ptr, indices_ptr,
    C, D, H, W, Z, P, Q, NZPQ,
    x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_z, y_stride_p, y_stride_q,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    HAS_TAPS: tl.constexpr, HAS_INDICES: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of BLOCK_C channels.

    The taps and the indices have the strides of y.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_nzpq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_nzpq = offs_nzpq < NZPQ
    mask_c = (offs_c < C)[None, :]
    n, z, p, q = split_index(offs_nzpq, Z, P, Q)
    d = z * stride_d - padding_d
    h = p * stride_h - padding_h
    w = q * stride_w - padding_w
    x_offsets = n * x_stride_n + d * x_stride_d + h * x_stride_h + w * x_stride_w
    x_ptrs = x_ptr + x_offsets[:, None] + (offs_c * x_stride_c)[None, :]
    # where all is -inf, the first tap inside the volume wins
    first_t = tl.maximum(dilation_d - 1 - d, 0) // dilation_d
    first_r = tl.maximum(dilation_h - 1 - h, 0) // dilation_h
    first_s = tl.maximum(dilation_w - 1 - w, 0) // dilation_w
    first_tap = ((first_t * R + first_r) * S + first_s).to(tl.int32)
    best_tap = tl.broadcast_to(first_tap[:, None], (BLOCK_PIXELS, BLOCK_C))
    best = tl.full((BLOCK_PIXELS, BLOCK_C), float("-inf"), dtype=ACC)
    for tap in tl.range(0, T * R * S, loop_unroll_factor=UNROLL):
        t = tap // (R * S) * dilation_d
        r = tap // S % R * dilation_h
        s = tap % S * dilation_w
        if INDEX_64:
            t = tl.cast(t, tl.int64)
            r = tl.cast(r, tl.int64)
            s = tl.cast(s, tl.int64)
        inside = mask_nzpq & (d + t >= 0) & (d + t < D)
        inside &= (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        x = tl.load(x_ptrs + (t * x_stride_d + r * x_stride_h + s * x_stride_w),
                    mask=inside[:, None] & mask_c, other=float("-inf")).to(ACC)
        # the last NaN wins, as in torch; a maximum would drop NaN on a GPU
        better = (x > best) | (x != x)
        best = tl.where(better, x, best)
        best_tap = tl.where(better, tap, best_tap)
    y_offsets = n * y_stride_n + z * y_stride_z + p * y_stride_p + q * y_stride_q
    y_offsets = y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    mask = mask_nzpq[:, None] & mask_c
    tl.store(y_ptr + y_offsets, best.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_TAPS:
        tl.store(taps_ptr + y_offsets, best_tap.to(taps_ptr.dtype.element_ty), mask=mask)
    if HAS_INDICES:
        d_best = (d[:, None] + best_tap // (R * S) * dilation_d).to(tl.int64)
        h_best = h[:, None] + best_tap // S % R * dilation_h
        w_best = w[:, None] + best_tap % S * dilation_w
        tl.store(indices_ptr + y_offsets, (d_best * H + h_best) * W + w_best, mask=mask)


@triton.jit
def max_pool3d_backward_kernel(
    grad_y_ptr, taps_ptr, grad_x_ptr,
    C, D, H, W, Z, P, Q, NDHW,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_z, grad_y_stride_p, grad_y_stride_q,
    taps_stride_n, taps_stride_c, taps_stride_z, taps_stride_p, taps_stride_q,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_d, grad_x_stride_h, grad_x_stride_w,
    T, R, S, stride_d, stride_h, stride_w, padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    NUM_Z: tl.constexpr, NUM_P: tl.constexpr, NUM_Q: tl.constexpr, UNROLL: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS input pixels of BLOCK_C channels.

    At most NUM_Z x NUM_P x NUM_Q windows contain a pixel.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_ndhw, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_ndhw = offs_ndhw < NDHW
    mask_c = (offs_c < C)[None, :]
    n, d, h, w = split_index(offs_ndhw, D, H, W)
    first_z = (d + padding_d) // stride_d - (NUM_Z - 1)
    first_p = (h + padding_h) // stride_h - (NUM_P - 1)
    first_q = (w + padding_w) // stride_w - (NUM_Q - 1)
    grad_y_ptrs = grad_y_ptr + (offs_c * grad_y_stride_c)[None, :]
    taps_ptrs = taps_ptr + (offs_c * taps_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    # in the order of the outputs, as torch adds them
    for i in tl.range(0, NUM_Z * NUM_P * NUM_Q, loop_unroll_factor=UNROLL):
        z = first_z + i // (NUM_P * NUM_Q)
        p = first_p + i // NUM_Q % NUM_P
        q = first_q + i % NUM_Q
        # none below 0, since the window starts at or before the pixel
        t = d + padding_d - z * stride_d
        r = h + padding_h - p * stride_h
        s = w + padding_w - q * stride_w
        inside = mask_ndhw & (z >= 0) & (z < Z) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        inside &= (t % dilation_d == 0) & (t // dilation_d < T)
        inside &= (r % dilation_h == 0) & (r // dilation_h < R)
        inside &= (s % dilation_w == 0) & (s // dilation_w < S)
        mask = inside[:, None] & mask_c
        offsets = n * grad_y_stride_n + z * grad_y_stride_z
        offsets += p * grad_y_stride_p + q * grad_y_stride_q
        grad_y = tl.load(grad_y_ptrs + offsets[:, None], mask=mask, other=0.0).to(ACC)
        offsets = n * taps_stride_n + z * taps_stride_z + p * taps_stride_p + q * taps_stride_q
        taps = tl.load(taps_ptrs + offsets[:, None], mask=mask, other=0)
        tap = (t // dilation_d * R + r // dilation_h) * S + s // dilation_w
        acc += tl.where(taps == tap[:, None], grad_y, 0.0)
    offsets = n * grad_x_stride_n + d * grad_x_stride_d + h * grad_x_stride_h + w * grad_x_stride_w
    grad_x_ptrs = grad_x_ptr + offsets[:, None] + (offs_c * grad_x_stride_c)[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_ndhw[:, None] & mask_c)


@triton.jit
def max_pool3d_gather_kernel(
    x_ptr, taps_ptr, y_ptr,
    C, D, H, W, Z, P, Q, NZPQ,
    x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_z, y_stride_p, y_stride_q,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program reads x at the taps of BLOCK_PIXELS windows of BLOCK_C channels.

    The taps have the strides of y.
    """
    offs_nzpq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask = (offs_nzpq < NZPQ)[:, None] & (offs_c < C)[None, :]
    n, z, p, q = split_index(offs_nzpq, Z, P, Q)
    y_offsets = n * y_stride_n + z * y_stride_z + p * y_stride_p + q * y_stride_q
    y_offsets = y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    taps = tl.load(taps_ptr + y_offsets, mask=mask, other=0).to(tl.int32)
    d = (z * stride_d - padding_d)[:, None] + taps // (R * S) * dilation_d
    h = (p * stride_h - padding_h)[:, None] + taps // S % R * dilation_h
    w = (q * stride_w - padding_w)[:, None] + taps % S * dilation_w
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (offs_c * x_stride_c)[None, :]
    x_ptrs += d * x_stride_d + h * x_stride_h + w * x_stride_w
    # every tap of a dilated window may miss a small volume
    x = tl.load(x_ptrs, mask=mask & (d < D) & (h < H) & (w < W), other=0.0)
    tl.store(y_ptr + y_offsets, x, mask=mask)


@triton.jit
def volume_divisors(d, h, w, D, H, W, T, R, S, padding_d, padding_h, padding_w, divisor,
                    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr):
    """What the sum over the window that starts at d, h and w is divided by, of the shape of w."""
    if HAS_DIVISOR:
        divisors = tl.zeros_like(w) + divisor
    else:
        slices = window_extent(d, D, T, padding_d, COUNT_INCLUDE_PAD)
        rows = window_extent(h, H, R, padding_h, COUNT_INCLUDE_PAD)
        divisors = slices * rows * window_extent(w, W, S, padding_w, COUNT_INCLUDE_PAD)
    return divisors


@triton.jit
def avg_pool3d_forward_kernel(
    x_ptr, y_ptr,
    C, D, H, W, Z, P, Q, NZPQ,
    x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_z, y_stride_p, y_stride_q,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, divisor,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of BLOCK_C channels."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_nzpq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_nzpq = offs_nzpq < NZPQ
    mask_c = (offs_c < C)[None, :]
    n, z, p, q = split_index(offs_nzpq, Z, P, Q)
    d = z * stride_d - padding_d
    h = p * stride_h - padding_h
    w = q * stride_w - padding_w
    x_offsets = n * x_stride_n + d * x_stride_d + h * x_stride_h + w * x_stride_w
    x_ptrs = x_ptr + x_offsets[:, None] + (offs_c * x_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    for tap in tl.range(0, T * R * S, loop_unroll_factor=UNROLL):
        t = tap // (R * S)
        r = tap // S % R
        s = tap % S
        if INDEX_64:
            t = tl.cast(t, tl.int64)
            r = tl.cast(r, tl.int64)
            s = tl.cast(s, tl.int64)
        inside = mask_nzpq & (d + t >= 0) & (d + t < D)
        inside &= (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
        acc += tl.load(x_ptrs + (t * x_stride_d + r * x_stride_h + s * x_stride_w),
                       mask=inside[:, None] & mask_c, other=0.0).to(ACC)
    divisors = volume_divisors(d, h, w, D, H, W, T, R, S, padding_d, padding_h, padding_w, divisor,
                               COUNT_INCLUDE_PAD, HAS_DIVISOR)
    y = acc / divisors.to(ACC)[:, None]
    y_offsets = n * y_stride_n + z * y_stride_z + p * y_stride_p + q * y_stride_q
    y_ptrs = y_ptr + y_offsets[:, None] + (offs_c * y_stride_c)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_nzpq[:, None] & mask_c)


@triton.jit
def avg_pool3d_backward_kernel(
    grad_y_ptr, grad_x_ptr,
    C, D, H, W, Z, P, Q, NDHW,
    grad_y_stride_n, grad_y_stride_c, grad_y_stride_z, grad_y_stride_p, grad_y_stride_q,
    grad_x_stride_n, grad_x_stride_c, grad_x_stride_d, grad_x_stride_h, grad_x_stride_w,
    T, R, S, stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, divisor,
    NUM_Z: tl.constexpr, NUM_P: tl.constexpr, NUM_Q: tl.constexpr, UNROLL: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS input pixels of BLOCK_C channels.

    At most NUM_Z x NUM_P x NUM_Q windows contain a pixel; they are added in the order of the
    outputs.
    """
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_ndhw, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_ndhw = offs_ndhw < NDHW
    mask_c = (offs_c < C)[None, :]
    n, d, h, w = split_index(offs_ndhw, D, H, W)
    first_z = (d + padding_d) // stride_d - (NUM_Z - 1)
    first_p = (h + padding_h) // stride_h - (NUM_P - 1)
    first_q = (w + padding_w) // stride_w - (NUM_Q - 1)
    grad_y_ptrs = grad_y_ptr + (offs_c * grad_y_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    for i in tl.range(0, NUM_Z * NUM_P * NUM_Q, loop_unroll_factor=UNROLL):
        z = first_z + i // (NUM_P * NUM_Q)
        p = first_p + i // NUM_Q % NUM_P
        q = first_q + i % NUM_Q
        d_window = z * stride_d - padding_d
        h_window = p * stride_h - padding_h
        w_window = q * stride_w - padding_w
        inside = mask_ndhw & (z >= 0) & (z < Z) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        inside &= (d < d_window + T) & (h < h_window + R) & (w < w_window + S)
        offsets = n * grad_y_stride_n + z * grad_y_stride_z
        offsets += p * grad_y_stride_p + q * grad_y_stride_q
        grad_y = tl.load(grad_y_ptrs + offsets[:, None], mask=inside[:, None] & mask_c, other=0.0)
        divisors = volume_divisors(d_window, h_window, w_window, D, H, W, T, R, S,
                                   padding_d, padding_h, padding_w, divisor,
                                   COUNT_INCLUDE_PAD, HAS_DIVISOR)
        # a window that is not there may have a divisor of 0
        scale = 1.0 / tl.where(inside, divisors, 1).to(ACC)
        acc += grad_y.to(ACC) * scale[:, None]
    offsets = n * grad_x_stride_n + d * grad_x_stride_d + h * grad_x_stride_h + w * grad_x_stride_w
    grad_x_ptrs = grad_x_ptr + offsets[:, None] + (offs_c * grad_x_stride_c)[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_ndhw[:, None] & mask_c)
