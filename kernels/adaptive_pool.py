"""Adaptive average pooling: one window for each output; windows may overlap.

Images are volumes of depth 1, whose arithmetic is compiled away.  D and Z are the depths of what is
read and of what is written, T R S the largest window.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.pool import tile_indices
from tritorch.kernels.pool3d import split_index
from tritorch.kernels.tiles import strided_offsets
from tritorch.kernels.windows import adaptive_end, adaptive_start


def _tile(r, c, num_warps, stages):
    blocks = {"BLOCK_R": r, "BLOCK_C": c, "STAGES": stages}
    return Config(blocks, num_warps=num_warps, num_stages=1, maxnreg=255)


SPATIAL_MEAN_CONFIGS = (
    # channels along memory: a row of 64 channels is one to four 128-byte lines
    _tile(64, 64, 4, 1),
    # pixels along memory: a large image, or many small ones
    _tile(512, 8, 4, 1),
    _tile(64, 32, 4, 1),
    # many channels along memory, whose rows follow each other to shared memory
    _tile(16, 512, 4, 3),
    # still more of them: each thread has all pixels of its channels, and sums them up by itself
    _tile(8, 1024, 4, 1),
    # candidates for tuning only
    _tile(16, 512, 4, 1),
    _tile(16, 256, 4, 3),
    _tile(16, 64, 4, 4),
    _tile(32, 64, 4, 3),
)
# programs with tiles of 512 channels that keep a GPU busy, and programs with tiles of 1024, which
# have half as many bytes in flight
MANY, MORE = 256, 512


def spatial_mean_config(channels_last, pixels, channels, images, itemsize):
    """Tile of the mean of whole images, along memory."""
    along_channels, large, small, many, more = SPATIAL_MEAN_CONFIGS[:5]
    if channels_last and itemsize == 2:
        if channels % 1024 == 0 and images * channels >= 1024 * MORE:
            return more
        if channels % 512 == 0 and images * channels >= 512 * MANY:
            return many
    if channels_last:
        return along_channels
    return small if pixels <= 64 else large


@triton.jit
def spatial_mean_kernel(
    x_ptr, y_ptr,
    N, C, R, STEPS, size_1, size_2,
    x_stride_n, x_stride_c, x_stride_0, x_stride_1, x_stride_2,
    INDEX_64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):
    """One program adds STEPS tiles of BLOCK_R of the R pixels of BLOCK_C channels of one image into
    row `split` of y, divided by R.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    split = tl.program_id(1)
    num_c = tl.cdiv(C, BLOCK_C)
    offs_c = pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = pid // num_c
    mask_c = offs_c < C
    if INDEX_64:
        n = n.to(tl.int64)
        split = split.to(tl.int64)
        offs_c = offs_c.to(tl.int64)
    offs_r = split * STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + n * x_stride_n + (offs_c * x_stride_c)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for _ in tl.range(0, STEPS, num_stages=STAGES):
        offsets = strided_offsets(offs_r, size_1, size_2, 1, 1,
                                  x_stride_0, x_stride_1, x_stride_2, 0, 0)
        mask = (offs_r < R)[:, None] & mask_c[None, :]
        acc += tl.load(x_ptrs + offsets[:, None], mask=mask, other=0.0).to(ACC)
        offs_r += BLOCK_R
    y = tl.sum(acc, axis=0) / R
    tl.store(y_ptr + (split * N + n) * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask_c)


# pixels of images of which several are read at once, and how many of these
MAX_SMALL = 256
SMALL_IMAGES = 16


@triton.jit
def small_mean_kernel(x_ptr, y_ptr, C, R, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program computes the means of BLOCK_C images of R pixels, one after the other in memory.

    No image alone begins on 16 bytes, but BLOCK_C of them do: they are read as one row of whole
    vectors, which is cut up after that.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    first_c = tl.program_id(0).to(tl.int64) * BLOCK_C
    index = tl.arange(0, BLOCK_C * BLOCK_R)
    mask = (index < BLOCK_C * R) & (index < (C - first_c) * R)
    x = tl.load(x_ptr + first_c * R + index, mask=mask, other=0.0)
    # (BLOCK_C, BLOCK_R), row-major
    offs_r = index % BLOCK_R
    x = tl.gather(x, index // BLOCK_R * R + offs_r, 0).to(ACC)
    x = tl.where(offs_r < R, x, 0.0).reshape(BLOCK_C, BLOCK_R)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    y = tl.sum(x, axis=1) / R
    tl.store(y_ptr + offs_c, y.to(y_ptr.dtype.element_ty), mask=offs_c < C)


# pixels and channels of a tile that is written with channels along memory; elements of a row else
SPREAD_R, SPREAD_C, SPREAD_ROW = 32, 128, 2048


@triton.jit
def spread_mean_kernel(
    x_ptr, y_ptr,
    NUMEL, C, R,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Writes x, divided by R, into the R pixels of each of C channels of dense images, of NUMEL
    numbers in all: the gradient of their means.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if CHANNELS_LAST:
        num_c, num_r = tl.cdiv(C, BLOCK_C), tl.cdiv(R, BLOCK_R)
        n = pid // num_c // num_r
        if INDEX_64:
            n = n.to(tl.int64)
        offs_c = pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
        offs_r = pid // num_c % num_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_c = offs_c < C
        y = tl.load(x_ptr + n * C + offs_c, mask=mask_c, other=0.0).to(ACC) / R
        y = tl.broadcast_to(y.to(y_ptr.dtype.element_ty)[None, :], (BLOCK_R, BLOCK_C))
        y_ptrs = y_ptr + (n * R + offs_r)[:, None] * C + offs_c[None, :]
        tl.store(y_ptrs, y, mask=(offs_r < R)[:, None] & mask_c[None, :])
    else:
        # whole vectors, wherever an image begins
        first = pid.to(tl.int64) * BLOCK_R if INDEX_64 else pid * BLOCK_R
        index = first + tl.arange(0, BLOCK_R)
        mask = index < NUMEL
        y = tl.load(x_ptr + index // R, mask=mask, other=0.0).to(ACC) / R
        tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def window_pixels(z, p, q, D, H, W, Z, P, Q):
    """Pixels of a D x H x W volume in the window number z, p, q of Z x P x Q."""
    slices = adaptive_end(z, D, Z) - adaptive_start(z, D, Z)
    rows = adaptive_end(p, H, P) - adaptive_start(p, H, P)
    columns = adaptive_end(q, W, Q) - adaptive_start(q, W, Q)
    return slices * rows * columns


@triton.jit
def adaptive_avg_pool_kernel(
    x_ptr, y_ptr,
    C, D, H, W, Z, P, Q, NZPQ,
    x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_z, y_stride_p, y_stride_q,
    T, R, S,
    GRADIENT: tl.constexpr,
    INDEX_64: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_PIXELS outputs of BLOCK_C channels.

    The windows that contain a pixel are those of the two sizes swapped: as GRADIENT the kernel
    reads windows and writes pixels, and each window is divided by its own pixels.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_nzpq, offs_c = tile_indices(C, BLOCK_PIXELS, BLOCK_C, INDEX_64)
    mask_nzpq = offs_nzpq < NZPQ
    mask_c = (offs_c < C)[None, :]
    n, z, p, q = split_index(offs_nzpq, Z, P, Q)
    first_d, d_end = adaptive_start(z, D, Z), adaptive_end(z, D, Z)
    first_h, h_end = adaptive_start(p, H, P), adaptive_end(p, H, P)
    first_w, w_end = adaptive_start(q, W, Q), adaptive_end(q, W, Q)
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (offs_c * x_stride_c)[None, :]
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_C), dtype=ACC)
    # each step of the gradient divides integers for its window's pixels, which takes registers
    for i in tl.range(0, T * R * S, loop_unroll_factor=2 if GRADIENT else 4):
        d = first_d + i // S // R
        h = first_h + i // S % R
        w = first_w + i % S
        inside = mask_nzpq & (d < d_end) & (h < h_end) & (w < w_end)
        offsets = d * x_stride_d + h * x_stride_h + w * x_stride_w
        x = tl.load(x_ptrs + offsets[:, None], mask=inside[:, None] & mask_c, other=0.0).to(ACC)
        if GRADIENT:
            x *= (1.0 / window_pixels(d, h, w, Z, P, Q, D, H, W).to(ACC))[:, None]
        acc += x
    if not GRADIENT:
        acc /= window_pixels(z, p, q, D, H, W, Z, P, Q).to(ACC)[:, None]
    offsets = n * y_stride_n + z * y_stride_z + p * y_stride_p + q * y_stride_q
    y_ptrs = y_ptr + offsets[:, None] + (offs_c * y_stride_c)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_nzpq[:, None] & mask_c)
