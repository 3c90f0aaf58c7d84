"""Convolution through the tensor memory accelerator of Hopper, and the transposed one.

Letters are those of conv.py.  All tensors come as descriptors whose tiles are pixels x channels:
what a tap reads outside the image comes as zeros, and what a tile has past the end is not stored.
"""

import functools

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.activation import activate
from tritorch.kernels.pixels import residue_taps


def _tile(k, npq, c, num_warps, num_stages):
    blocks = {"BLOCK_K": k, "BLOCK_NPQ": npq, "BLOCK_C": c}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages)


# wide filters, of which two programs share a multiprocessor or one has it, then 64 channels
CONV2D_TMA_CONFIGS = {
    2: (
        _tile(128, 128, 64, 8, 3),
        _tile(128, 256, 64, 8, 4),
        _tile(64, 256, 64, 4, 2),
        _tile(64, 128, 64, 4, 3),
    ),
}

# what the portable kernels are good enough for
MIN_CHANNELS = 32
MIN_PIXELS = 1024

# {(C, K, P, taps, strided, transposed): configuration} where a GPU has decided
MEASURED = {}

# of the GPUs that these kernels are for
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 * 1024


def conv2d_tma_config(n, p, q, k, c, taps, strided, transposed):
    """What a GPU has measured, else what the estimate takes for the fastest; None where most of a
    tile or of the GPU would be idle.
    """
    found = MEASURED.get((c, k, p, taps, strided, transposed))
    if found is not None:
        return found
    if min(c, k) < MIN_CHANNELS or n * p * q < MIN_PIXELS:
        return None
    narrow = k <= 64
    configs = [each for each in CONV2D_TMA_CONFIGS[2] if narrow == (each.kwargs["BLOCK_K"] == 64)]
    return min(configs, key=lambda config: cycles(config, n, p, q, k, c, taps))


def cycles(config, n, p, q, k, c, taps):
    """An estimate of the cycles that one multiprocessor is busy: products of 16-bit numbers, or
    traffic of shared memory, whichever takes longer, and what is not overlapped at a tile's ends.
    """
    block_k, block_npq, block_c = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "NPQ", "C"))
    block_n, block_p, block_q = tile_of_pixels(n, p, q, block_npq)
    pixel_tiles = triton.cdiv(n, block_n) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
    tiles = triton.cdiv(pixel_tiles * triton.cdiv(k, block_k), MULTIPROCESSORS)
    products = block_k * block_npq * block_c / 2048
    # a warp group reads 64 channels and all pixels of the tile
    reads = triton.cdiv(block_k, 64) * (64 + block_npq)
    step = max(products, 2 * block_c * (block_k + block_npq + reads) / 128)
    stage = 2 * block_c * (block_k + block_npq)
    together = min(SHARED_MEMORY // (stage * config.num_stages), 16 // config.num_warps)
    ends = 6000 * triton.cdiv(tiles, together)
    return tiles * triton.cdiv(c, block_c) * taps * step + ends


@functools.lru_cache(maxsize=1024)
def tile_of_pixels(n, p, q, block):
    """Images, rows and columns of a tile of `block` pixels.

    The fewest tiles, of those the ones with the fewest images.  A tile of single pixels takes a
    third longer to fetch, as measured: neighbours share nothing.
    """
    best = None
    for log_q in range(block.bit_length()):
        for log_p in range(block.bit_length() - log_q):
            block_p, block_q = 1 << log_p, 1 << log_q
            block_n = block >> log_p + log_q
            tiles = triton.cdiv(n, block_n) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
            effort = tiles * (4 if block_n == block else 3)
            found = (effort, block_n, abs(log_p - log_q), block_p, block_q)
            best = found if best is None or found < best else best
    return best[1], best[3], best[4]


@triton.jit
def conv2d_tma_kernel(
    x_desc, w_desc, bias_ptr, y_desc, before_desc,
    N, C, K, R, S, P, Q, STEPS, SPLITS, bias_stride,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, KEEPS_BEFORE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """One program computes BLOCK_N x BLOCK_P x BLOCK_Q pixels x BLOCK_K channels of y over STEPS
    slices of BLOCK_C channels of one tap.

    The tile of pixels is the right operand, so that it goes from shared memory to the tensor cores
    as it came.  A stride is 1, or BLOCK_P = BLOCK_Q = 1, or it is 2 and PAIRS: the side that the
    stride walks over, x or transposed y, is described as (N, H / 2, 2, W / 2, 2 * channels), whose
    tiles are pixels of one parity.  Transposed, the pixels of a program share their residue modulo
    the stride, as in `conv2d_kernel`.  The sums of a split are images of their own in y.
    """
    num_k = tl.cdiv(K, BLOCK_K)
    # the programs of one pixel tile run together, so that its pixels are fetched from memory once
    pid_k = tl.program_id(0) % num_k
    tile = tl.program_id(0) // num_k
    split = tl.program_id(1) % SPLITS
    group = tl.program_id(1) // SPLITS
    if TRANSPOSED:
        residue_h = tile % (stride_h * stride_w) // stride_w
        residue_w = tile % stride_w
        tile = tile // (stride_h * stride_w)
        first_r, num_r, x_h = residue_taps(
            residue_h + padding_h, R, stride_h, dilation_h, tap_step_h, inverse_h)
        first_s, num_s, x_w = residue_taps(
            residue_w + padding_w, S, stride_w, dilation_w, tap_step_w, inverse_w)
        # of the smallest residue, which has the most
        num_p = tl.cdiv(P, stride_h)
        num_q = tl.cdiv(Q, stride_w)
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
    tiles_p = tl.cdiv(num_p, BLOCK_P)
    tiles_q = tl.cdiv(num_q, BLOCK_Q)
    n = tile // (tiles_p * tiles_q) * BLOCK_N
    p = tile // tiles_q % tiles_p * BLOCK_P
    q = tile % tiles_q * BLOCK_Q
    k = pid_k * BLOCK_K
    # the pixel that the first tap reads, which may lie outside the image
    if TRANSPOSED:
        x_h += p
        x_w += q
    else:
        x_h = p * stride_h - padding_h
        x_w = q * stride_w - padding_w

    num_c = tl.cdiv(C, BLOCK_C)
    begin = split * STEPS
    steps = min(STEPS, num_c * num_r * num_s - begin)
    # known to the compiler, or it waits for every product before the next one
    tl.assume(steps > 0)
    c = begin % num_c * BLOCK_C
    i = begin // num_c // num_s
    j = begin // num_c % num_s
    first_c = group * C
    acc = tl.zeros((BLOCK_K, BLOCK_NPQ), dtype=tl.float32)
    for _ in range(steps):
        h = x_h + i * step_h
        w = x_w + j * step_w
        if PAIRS and not TRANSPOSED:
            # shift and mask take the floor, below zero too
            columns = (w & 1) * (C * (tl.num_programs(1) // SPLITS)) + first_c + c
            x = x_desc.load([n, h >> 1, h & 1, w >> 1, columns])
        else:
            x = x_desc.load([n, h, w, first_c + c])
        x = tl.reshape(x, (BLOCK_NPQ, BLOCK_C))
        tap = (first_r + i * tap_step_h) * S + first_s + j * tap_step_w
        if TRANSPOSED:
            filters = w_desc.load([tap, first_c + c, k])
            filters = tl.reshape(filters, (BLOCK_C, BLOCK_K)).T
        else:
            filters = w_desc.load([tap, group * K + k, c])
            filters = tl.reshape(filters, (BLOCK_K, BLOCK_C))
        acc = tl.dot(filters, x.T, acc)
        c += BLOCK_C
        tap_ends = c >= C
        c = tl.where(tap_ends, 0, c)
        j += tap_ends.to(tl.int32)
        row_ends = j == num_s
        j = tl.where(row_ends, 0, j)
        i += row_ends.to(tl.int32)

    k += group * K
    if HAS_BIAS:
        offs_k = k + tl.arange(0, BLOCK_K)
        bias = tl.load(bias_ptr + offs_k * bias_stride,
                       mask=(offs_k < group * K + K) & (split == 0), other=0.0)
        acc += bias.to(tl.float32)[:, None]
    n += split * N
    if TRANSPOSED and not PAIRS:
        p = residue_h + p * stride_h
        q = residue_w + q * stride_w
    if PAIRS and TRANSPOSED:
        k += residue_w * (K * (tl.num_programs(1) // SPLITS))
    else:
        residue_h = 0
    if KEEPS_BEFORE:
        store_pixels(before_desc, n, p, residue_h, q, k, acc,
                     PAIRS and TRANSPOSED, BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)
    acc = activate(acc, ACTIVATION)
    store_pixels(y_desc, n, p, residue_h, q, k, acc,
                 PAIRS and TRANSPOSED, BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)


@triton.jit
def store_pixels(
    y_desc, n, p, parity, q, k, acc,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A tile that has channels as rows, transposed on its way through shared memory."""
    y = acc.T.to(y_desc.dtype)
    if PAIRS:
        y_desc.store([n, p, parity, q, k], tl.reshape(y, (BLOCK_N, BLOCK_P, 1, BLOCK_Q, BLOCK_K)))
    else:
        y_desc.store([n, p, q, k], tl.reshape(y, (BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)))
