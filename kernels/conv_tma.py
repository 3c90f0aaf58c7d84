"""Convolution through the tensor memory accelerator of Hopper, and the transposed one.

Letters are those of conv.py.  All tensors come as descriptors whose tiles are pixels x channels:
what a tap reads outside the image comes as zeros, and what a tile has past the end is not stored.
"""

import triton
import triton.language as tl

from tritorch.kernels.activation import activate
from tritorch.kernels.moments import store_moments
from tritorch.kernels.pixels import next_slice, residue_taps


@triton.jit
def conv2d_tma_kernel(
    x_desc, w_desc, bias_ptr, y_desc, preactivation_desc, moments_ptr, residual_desc,
    N, C, K, R, S, P, Q, H, W, TILES, STEPS, SPLITS, bias_stride,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    tap_step_h, tap_step_w, inverse_h, inverse_w,
    TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr, ACTIVATION: tl.constexpr,
    SKIPS: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """One program computes BLOCK_N x BLOCK_P x BLOCK_Q pixels x BLOCK_K channels of y over STEPS
    slices of BLOCK_C channels of one tap.

    The tile of pixels is the right operand, so that it goes from shared memory to the tensor cores
    as it came.  A stride is 1, or BLOCK_P = BLOCK_Q = 1, or it is 2 and PAIRS: the side that the
    stride walks over, x or transposed y, is described as (N, H / 2, 2, W / 2, 2 * channels), whose
    tiles are pixels of one parity.  Transposed, the pixels of a program share their residue modulo
    the stride, as in `conv2d_kernel`.  Each split writes its sums as images of their own in y.

    Products of float32 are TF32's, of filters whose channels read lie along memory: transposed,
    they are described as (taps, K, C) and not as (taps, C, K).

    SKIPS: rows and columns of taps that read nothing of the H x W image for any pixel of a tile are
    left out, all but one, and STEPS is that of the tiles with most.

    PERSISTENT: a program goes on to others of the TILES in the same loop, so that loads never
    pause; for one split.

    A residual, for one split and not transposed, is loaded in whole tiles.

    With moments_ptr, for one split, without bias and not transposed, it writes mean, squared
    deviations and count of each channel of each tile of pixels as they are stored.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1) % SPLITS
    group = tl.program_id(1) // SPLITS
    groups = tl.num_programs(1) // SPLITS
    channels = (C, K, group, groups)
    image = (P, Q, R, S, H, W)
    geometry = (stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
                tap_step_h, tap_step_w, inverse_h, inverse_w)
    # pixels from one tap to the next that reaches the tile, and the taps between them
    step_h = dilation_h
    step_w = dilation_w
    if TRANSPOSED:
        step_h = -(dilation_h * tap_step_h // stride_h)
        step_w = -(dilation_w * tap_step_w // stride_w)
    walk = (step_h, step_w, tap_step_h * S, tap_step_w)
    outputs = (bias_ptr, y_desc, preactivation_desc, moments_ptr, residual_desc, bias_stride)
    sizes = (N, P, Q)
    k, n, p, q, parity_h, parity_w, first_tap, num_r, num_s, h, w = _place(
        pid, K, image, geometry, walk, TRANSPOSED, PAIRS, SKIPS,
        BLOCK_K, BLOCK_N, BLOCK_P, BLOCK_Q)
    num_c = tl.cdiv(C, BLOCK_C)
    acc = tl.zeros((BLOCK_K, BLOCK_NPQ), dtype=tl.float32)
    if PERSISTENT:
        programs = tl.num_programs(0)
        steps = tl.cdiv(TILES - pid, programs) * STEPS
        if TRANSPOSED or SKIPS:
            # tiles have different numbers of taps
            steps = 0
            for tile in range(pid, TILES, programs):
                _, _, _, _, _, _, _, rows, columns, _, _ = _place(
                    tile, K, image, geometry, walk, TRANSPOSED, PAIRS, SKIPS,
                    BLOCK_K, BLOCK_N, BLOCK_P, BLOCK_Q)
                steps += num_c * rows * columns
        # if the loop might not run, the compiler would wait for every product before the next one
        tl.assume(steps > 0)
        t = pid - programs
        c = 0
        i = 0
        j = 0
        for _ in range(steps):
            if (c == 0) & (i == 0) & (j == 0):
                t += programs
                k, n, p, q, parity_h, parity_w, first_tap, num_r, num_s, h, w = _place(
                    t, K, image, geometry, walk, TRANSPOSED, PAIRS, SKIPS,
                    BLOCK_K, BLOCK_N, BLOCK_P, BLOCK_Q)
            filters, x = _operands(
                x_desc, w_desc, channels, walk, k, n, h, w, first_tap, c, i, j,
                TRANSPOSED, PAIRS, BLOCK_K, BLOCK_NPQ, BLOCK_C)
            acc = tl.dot(filters, x.T, acc, input_precision="tf32")
            i, j, c = next_slice(i, j, c, num_s, C, BLOCK_C)
            if i == num_r:
                i = 0
                _finish(acc, outputs, channels, sizes, t, 0, k, n, p, q, parity_h, parity_w,
                        TRANSPOSED and PAIRS, ACTIVATION, BLOCK_K, BLOCK_N, BLOCK_P, BLOCK_Q)
                acc = tl.zeros((BLOCK_K, BLOCK_NPQ), dtype=tl.float32)
    else:
        begin = split * STEPS
        steps = num_c * num_r * num_s
        if SKIPS:
            # what is left of them, in shares
            begin = split * steps // SPLITS
            steps = (split + 1) * steps // SPLITS - begin
        else:
            steps = min(STEPS, steps - begin)
        tl.assume(steps > 0)
        c = begin % num_c * BLOCK_C
        i = begin // num_c // num_s
        j = begin // num_c % num_s
        for _ in range(steps):
            filters, x = _operands(
                x_desc, w_desc, channels, walk, k, n, h, w, first_tap, c, i, j,
                TRANSPOSED, PAIRS, BLOCK_K, BLOCK_NPQ, BLOCK_C)
            acc = tl.dot(filters, x.T, acc, input_precision="tf32")
            i, j, c = next_slice(i, j, c, num_s, C, BLOCK_C)
        _finish(acc, outputs, channels, sizes, pid, split, k, n + split * N, p, q,
                parity_h, parity_w, TRANSPOSED and PAIRS, ACTIVATION,
                BLOCK_K, BLOCK_N, BLOCK_P, BLOCK_Q)


@triton.jit
def _place(
    tile, K, image, geometry, walk,
    TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr, SKIPS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """First channel, image and pixel that a tile writes, and the parities of PAIRS; the first tap
    that reaches the tile, how many rows and columns of taps do, and the pixel that the first tap
    reads, which may lie outside the image.
    """
    P, Q, R, S, H, W = image
    (stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
     tap_step_h, tap_step_w, inverse_h, inverse_w) = geometry
    num_k = tl.cdiv(K, BLOCK_K)
    # the tiles of the same pixels run together, so that those are fetched from memory once
    k = tile % num_k * BLOCK_K
    tile = tile // num_k
    residue_h = 0
    residue_w = 0
    if TRANSPOSED:
        residue_h = tile % (stride_h * stride_w) // stride_w
        residue_w = tile % stride_w
        tile = tile // (stride_h * stride_w)
        # those of residue 0, which has the most
        P = tl.cdiv(P, stride_h)
        Q = tl.cdiv(Q, stride_w)
    tiles_p = tl.cdiv(P, BLOCK_P)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    n = tile // (tiles_p * tiles_q) * BLOCK_N
    p = tile // tiles_q % tiles_p * BLOCK_P
    q = tile % tiles_q * BLOCK_Q
    first_tap = 0
    num_r = R
    num_s = S
    if TRANSPOSED:
        first_r, num_r, h = residue_taps(
            residue_h + padding_h, R, stride_h, dilation_h, tap_step_h, inverse_h)
        first_s, num_s, w = residue_taps(
            residue_w + padding_w, S, stride_w, dilation_w, tap_step_w, inverse_w)
        first_tap = first_r * S + first_s
        h += p
        w += q
        if not PAIRS:
            p = residue_h + p * stride_h
            q = residue_w + q * stride_w
    else:
        h = p * stride_h - padding_h
        w = q * stride_w - padding_w
    if SKIPS:
        step_h, step_w, tap_row, tap_column = walk
        # from the first pixel that a tap reads to its last
        last_h = h + (BLOCK_P - 1) * (1 if TRANSPOSED else stride_h)
        last_w = w + (BLOCK_Q - 1) * (1 if TRANSPOSED else stride_w)
        skipped_r, num_r = _reaching(h, last_h, H, step_h, num_r, TRANSPOSED)
        skipped_s, num_s = _reaching(w, last_w, W, step_w, num_s, TRANSPOSED)
        first_tap += skipped_r * tap_row + skipped_s * tap_column
        h += skipped_r * step_h
        w += skipped_s * step_w
    return k, n, p, q, residue_h, residue_w, first_tap, num_r, num_s, h, w


@triton.jit
def _reaching(first, last, size, step, taps, TRANSPOSED: tl.constexpr):
    """How many taps come before those that read any of an axis of this size, and how many these
    are; at least one.  The first tap reads the pixels from `first` to `last`.
    """
    if TRANSPOSED:
        # from high to low
        before = tl.maximum(first - size - step, 0) // -step
        end = tl.maximum(last - step, 0) // -step
    else:
        before = tl.cdiv(tl.maximum(-last, 0), step)
        end = tl.cdiv(tl.maximum(size - first, 0), step)
    before = tl.minimum(before, taps - 1)
    return before, tl.maximum(tl.minimum(end, taps) - before, 1)


@triton.jit
def _operands(
    x_desc, w_desc, channels, walk, k, n, h, w, tap, c, i, j,
    TRANSPOSED: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_NPQ: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Channels c of the tap in row i and column j of those that reach the tile: filters and pixels,
    as rows.
    """
    C, K, group, groups = channels
    step_h, step_w, tap_row, tap_column = walk
    h += i * step_h
    w += j * step_w
    tap += i * tap_row + j * tap_column
    if PAIRS and not TRANSPOSED:
        # shift and mask are floor division and modulo, below zero too
        x = x_desc.load([n, h >> 1, h & 1, w >> 1, (w & 1) * (C * groups) + group * C + c])
    else:
        x = x_desc.load([n, h, w, group * C + c])
    if TRANSPOSED and w_desc.dtype == tl.float32:
        # wgmma transposes only 16-bit operands
        filters = tl.reshape(w_desc.load([tap, k, group * C + c]), (BLOCK_K, BLOCK_C))
    elif TRANSPOSED:
        filters = tl.reshape(w_desc.load([tap, group * C + c, k]), (BLOCK_C, BLOCK_K)).T
    else:
        filters = tl.reshape(w_desc.load([tap, group * K + k, c]), (BLOCK_K, BLOCK_C))
    return filters, tl.reshape(x, (BLOCK_NPQ, BLOCK_C))


@triton.jit
def _finish(
    acc, outputs, channels, sizes, tile, split, k, n, p, q, parity_h, parity_w,
    PAIRS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    bias_ptr, y_desc, preactivation_desc, moments_ptr, residual_desc, bias_stride = outputs
    _, K, group, groups = channels
    k += group * K
    if bias_ptr is not None:
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = (offs_k < (group + 1) * K) & (split == 0)
        bias = tl.load(bias_ptr + offs_k * bias_stride, mask=mask, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    if residual_desc is not None:
        residual = tl.reshape(residual_desc.load([n, p, q, k]), (acc.shape[1], BLOCK_K))
        acc += residual.T.to(tl.float32)
    if PAIRS:
        k += parity_w * (K * groups)
    if preactivation_desc is not None:
        _store(preactivation_desc, n, p, parity_h, q, k, acc, PAIRS,
               BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)
    acc = activate(acc, ACTIVATION)
    _store(y_desc, n, p, parity_h, q, k, acc, PAIRS, BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)
    if moments_ptr is not None:
        part = (tile // tl.cdiv(K, BLOCK_K)).to(tl.int64)
        _store_moments(moments_ptr + part * 3 * K * groups, acc.to(y_desc.dtype), sizes,
                       n, p, q, k, (group + 1) * K, K * groups,
                       BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K)


@triton.jit
def _store_moments(
    moments_ptr, y, sizes, n, p, q, k, end, channels,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Statistics of the pixels inside the images, for channels up to the end of their group."""
    N, P, Q = sizes
    pixels = tl.arange(0, BLOCK_N * BLOCK_P * BLOCK_Q)
    inside = (n + pixels // (BLOCK_P * BLOCK_Q) < N) & (p + pixels // BLOCK_Q % BLOCK_P < P)
    inside &= q + pixels % BLOCK_Q < Q
    count = tl.minimum(N - n, BLOCK_N) * tl.minimum(P - p, BLOCK_P) * tl.minimum(Q - q, BLOCK_Q)
    offs_k = k + tl.arange(0, BLOCK_K)
    store_moments(moments_ptr, y, inside, count, offs_k, offs_k < end, channels, 1)


@triton.jit
def _store(
    y_desc, n, p, parity, q, k, acc,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Stores a tile, whose rows are channels, as images: transposed on its way through shared
    memory, in halves where the descriptor has half of the pixels.
    """
    STORED: tl.constexpr = y_desc.block_shape[0] * y_desc.block_shape[1] * y_desc.block_shape[-2]
    y = acc.to(y_desc.dtype)
    if STORED < BLOCK_N * BLOCK_P * BLOCK_Q:
        # halves the first axis longer than 1
        HALF_N: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 1 else 1
        HALF_P: tl.constexpr = BLOCK_P // 2 if BLOCK_N == 1 and BLOCK_P > 1 else BLOCK_P
        HALF_Q: tl.constexpr = BLOCK_Q // 2 if BLOCK_N == 1 and BLOCK_P == 1 else BLOCK_Q
        halves = tl.permute(tl.reshape(y, (BLOCK_K, 2, STORED)), (0, 2, 1))
        first, second = tl.split(halves)
        _store(y_desc, n, p, parity, q, k, first, PAIRS, HALF_N, HALF_P, HALF_Q, BLOCK_K)
        n += BLOCK_N - HALF_N
        p += BLOCK_P - HALF_P
        q += BLOCK_Q - HALF_Q
        _store(y_desc, n, p, parity, q, k, second, PAIRS, HALF_N, HALF_P, HALF_Q, BLOCK_K)
    elif PAIRS:
        y = tl.reshape(y.T, (BLOCK_N, BLOCK_P, 1, BLOCK_Q, BLOCK_K))
        y_desc.store([n, p, parity, q, k], y)
    else:
        y = tl.reshape(y.T, (BLOCK_N, BLOCK_P, BLOCK_Q, BLOCK_K))
        y_desc.store([n, p, q, k], y)
