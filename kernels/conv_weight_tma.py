"""The gradient of a filter through the tensor memory accelerator of Hopper.

Letters are those of conv.py.  A tile of pixels runs along one axis, images or columns, because only
a tile without a second axis feeds the tensor cores from shared memory on the side of the rows too.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.hopper import MULTIPROCESSORS, SHARED_MEMORY


def _tile(k, c, pixels, taps, num_warps, num_stages):
    blocks = {"BLOCK_K": k, "BLOCK_C": c, "BLOCK_PIXELS": pixels, "TAPS": taps}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages)


CONV2D_GRAD_WEIGHT_TMA_CONFIGS = {
    2: (
        _tile(128, 256, 64, 1, 8, 4),
        # several taps of one tile of y are not faster: their stages are fewer
        _tile(128, 128, 128, 1, 8, 3),
        _tile(128, 128, 64, 1, 8, 3),
        _tile(64, 64, 128, 1, 4, 3),
        _tile(64, 64, 64, 1, 4, 4),
        # half as many images, and a row of small batches
        _tile(128, 128, 32, 1, 8, 4),
        _tile(64, 64, 32, 3, 4, 4),
        _tile(64, 64, 16, 1, 4, 4),
    ),
}

# below these sizes the portable kernel is good enough; with three taps in a row and up to so many
# channels on both sides it was faster in every measurement
MIN_CHANNELS = 32
MIN_PIXELS = 1024
PORTABLE_CHANNELS = 128

# cycles from a load to its data
LATENCY = 1500
# stream-K must be estimated to take no more than this part of what separate sums take
GAIN = 0.97


def conv2d_grad_weight_tma_config(k, c, taps, along, n, p, q, stride):
    """The largest tile that is not mostly empty; None where all are, or the portable kernel is
    faster.

    A tile runs along `along` images or columns; `taps` are those of one row of the filter.
    `stride` only tells measured sizes apart.
    """
    if taps == 3 and c % 64 == 0 and max(c, k) <= PORTABLE_CHANNELS:
        return None
    if min(c, k) < MIN_CHANNELS or n * p * q < MIN_PIXELS:
        return None
    for config in CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2]:
        sizes = config.kwargs
        full = k > sizes["BLOCK_K"] // 2 and c > sizes["BLOCK_C"] // 2
        full = full and 4 * along >= 3 * triton.cdiv(along, sizes["BLOCK_PIXELS"]) * sizes[
            "BLOCK_PIXELS"]
        if full and taps % sizes["TAPS"] == 0:
            return config
    return None


def shares(config, tiles, steps, groups, weights):
    """Programs, splits, and whether by stream-K, as the estimate expects to be fastest.

    For each of `steps` there are `tiles` sums of so many steps.  Either every sum has a program for
    each of its splits, or (stream-K) programs with equal shares go on from one sum to the next, and
    up to `splits` of them have a part of one sum.
    """
    sums, total = tiles * len(steps), tiles * sum(steps)

    def taken(splits):
        # of all programs, and the most of one
        each = [triton.cdiv(one, splits) for one in steps]
        mean = tiles * groups * splits * sum(each) / MULTIPROCESSORS
        return cycles(config, sums * groups * splits, mean, max(each), weights, splits)

    split = min(range(1, min(*steps, 2 * MULTIPROCESSORS) + 1), key=taken)
    programs = max(residents(config) * MULTIPROCESSORS // groups, 1)
    # the kernel multiplies the two in int32
    if programs <= total < 2**31 // programs:
        splits, each = most_programs(tiles, steps, programs), triton.cdiv(total, programs)
        mean, parts = programs * groups * each / MULTIPROCESSORS, 1 + sums / programs
        stream_k = cycles(config, programs * groups, mean, each, weights, splits, parts)
        if stream_k < GAIN * taken(split):
            return programs, splits, True
    return sums, split, False


def stored_columns(config, stream_k):
    """Columns of a tile that are stored at once.

    Of stream-K there is little room beside the operands of the next tile; without it a whole tile
    would take more registers and shared memory than there are.
    """
    columns = config.kwargs["BLOCK_C"]
    return columns // 4 if stream_k else min(columns, 128)


def most_programs(tiles, steps, programs):
    """The most programs that share one sum, with equal shares of all sums."""
    total, first, most = tiles * sum(steps), 0, 1
    for each in steps:
        for _ in range(tiles):
            begins, ends = (
                ((at + 1) * programs - 1) // total for at in (first, first + each - 1)
            )
            most = max(most, ends - begins + 1)
            first += each
    return most


def residents(config):
    """Programs that share a multiprocessor: as its registers and its shared memory allow."""
    sizes, threads = config.kwargs, 32 * config.num_warps
    # of the accumulators, and of everything else
    registers = sizes["BLOCK_K"] * sizes["BLOCK_C"] * sizes["TAPS"] // threads + 40
    shared = _loaded(config) * config.num_stages
    return max(1, min(SHARED_MEMORY // shared, 65536 // (registers * threads)))


def cycles(config, programs, mean, most, weights, splits, parts=1):
    """An estimate of the cycles that the busiest multiprocessor is busy with programs of `most`
    steps or fewer, `mean` on each multiprocessor: products of 16-bit numbers or traffic of shared
    memory, whichever takes longer, the start and end of the `parts` of each, and the traffic of the
    partial sums, which are `weights` numbers each.
    """
    sizes = config.kwargs
    block_k, block_c, taps = sizes["BLOCK_K"], sizes["BLOCK_C"], sizes["TAPS"]
    # a warp group reads 64 channels of one side and all of the other
    read = 2 * triton.cdiv(block_k, 64) * (64 + block_c) * taps * sizes["BLOCK_PIXELS"]
    step = max(
        block_k * block_c * taps / 2048 * sizes["BLOCK_PIXELS"], (_loaded(config) + read) / 128
    )
    each = triton.cdiv(programs, MULTIPROCESSORS)
    together = min(each, residents(config))
    # a stage is loaded while the others of all residents are multiplied
    step = max(step, LATENCY / (together * (config.num_stages - 1)))
    steps = each * most
    if each > together:
        # what is free takes the next program, and the last ones to end are half of themselves late
        steps = min(steps, mean + together * most / 2)
    # written and read back once, 16 bytes a cycle and multiprocessor
    partial = weights * splits * 8 / (16 * MULTIPROCESSORS)
    ends = 5000 * parts * triton.cdiv(each, together)
    return steps * step + ends + partial


def _loaded(config):
    """Bytes of one step."""
    sizes = config.kwargs
    return 2 * (sizes["BLOCK_K"] + sizes["BLOCK_C"] * sizes["TAPS"]) * sizes["BLOCK_PIXELS"]


@triton.jit
def conv2d_grad_weight_tma_kernel(
    grad_y_desc, x_desc, grad_w_desc,
    K, C, R, S, P, Q, H, W, TILES, SPLITS, STEPS,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    ALONG_Q: tl.constexpr, STREAM_K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr, TAPS: tl.constexpr,
):
    """One program sums BLOCK_K x BLOCK_C weights of TAPS taps in a row (1, 3 or 4) over a share of
    the pixels.

    A tile is BLOCK_PIXELS images at one pixel, of which there are TILES, and the descriptors are
    (rows, columns, images, channels); or ALONG_Q that many columns of one image, and they are
    (images, rows, columns, channels).  Pixels whose tap lies outside the image are left out.

    Every sum is split into SPLITS equal shares.  Or (STREAM_K) programs have equal shares of the
    STEPS tiles of pixels of all sums, one sum after the other, and may have parts of several; a sum
    in fewer than SPLITS parts gets zeros for the rest.
    """
    num_k = tl.cdiv(K, BLOCK_K)
    num_kc = num_k * tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    image = (P, Q, R, S, H, W, TILES)
    geometry = (stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    if STREAM_K:
        programs = tl.num_programs(0)
        group = tl.program_id(1)
        begin = pid * STEPS // programs
        end = (pid + 1) * STEPS // programs
        # the first sum of the tap in which the share begins, and then the sum itself
        first = 0
        tap = 0
        steps = _steps(tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
        while first + num_kc * steps <= begin:
            first += num_kc * steps
            tap += TAPS
            steps = _steps(tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
        kc = (begin - first) // steps
        first += kc * steps
        while begin < end:
            count = tl.minimum(end, first + steps) - begin
            # counted from the first program that has a part of this sum
            split = pid - ((first + 1) * programs - 1) // STEPS
            _share(
                grad_y_desc, x_desc, grad_w_desc, split, group * K, group * C,
                kc % num_k * BLOCK_K, kc // num_k * BLOCK_C, tap, begin - first, count,
                image, geometry, ALONG_Q, BLOCK_K, BLOCK_C, BLOCK_PIXELS, TAPS)
            begin += count
            if begin == first + steps:
                for empty in range(split + 1, SPLITS):
                    zeros = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
                    for each in tl.static_range(TAPS):
                        _store(grad_w_desc, empty, group * K + kc % num_k * BLOCK_K, tap + each,
                               kc // num_k * BLOCK_C, zeros, BLOCK_K, BLOCK_C)
                first += steps
                kc += 1
                if kc == num_kc:
                    kc = 0
                    tap += TAPS
                    steps = _steps(tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
    else:
        kc = pid % num_kc
        tap = pid // num_kc * TAPS
        split = tl.program_id(1) % SPLITS
        group = tl.program_id(1) // SPLITS
        steps = _steps(tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
        begin = split * steps // SPLITS
        count = (split + 1) * steps // SPLITS - begin
        _share(
            grad_y_desc, x_desc, grad_w_desc, split, group * K, group * C,
            kc % num_k * BLOCK_K, kc // num_k * BLOCK_C, tap, begin, count,
            image, geometry, ALONG_Q, BLOCK_K, BLOCK_C, BLOCK_PIXELS, TAPS)


@triton.jit
def _reached(
    tap, image, geometry,
    ALONG_Q: tl.constexpr, BLOCK_PIXELS: tl.constexpr, TAPS: tl.constexpr,
):
    """Rows of pixels whose taps lie inside the image, then the axes of such tiles, the last one
    innermost: where they begin and how many there are.
    """
    P, Q, _, S, H, W, TILES = image
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w = geometry
    row = tap // S * dilation_h - padding_h
    column = tap % S * dilation_w - padding_w
    first_p = tl.maximum(tl.cdiv(-row, stride_h), 0)
    num_p = tl.minimum(tl.cdiv(H - row, stride_h), P) - first_p
    if ALONG_Q:
        first_0 = 0
        num_0 = TILES
        first_1 = first_p
        num_1 = num_p
        num_2 = Q // BLOCK_PIXELS
    else:
        first_0 = first_p
        num_0 = num_p
        first_1 = 0
        num_1 = Q
        if TAPS == 1:
            first_1 = tl.maximum(tl.cdiv(-column, stride_w), 0)
            num_1 = tl.minimum(tl.cdiv(W - column, stride_w), Q) - first_1
        num_2 = TILES
    return row, column, first_0, num_0, first_1, num_1, num_2


@triton.jit
def _steps(
    tap, image, geometry,
    ALONG_Q: tl.constexpr, BLOCK_PIXELS: tl.constexpr, TAPS: tl.constexpr,
):
    """Tiles of pixels that one sum is over."""
    _, _, _, num_0, _, num_1, num_2 = _reached(tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
    return num_0 * num_1 * num_2


@triton.jit
def _share(
    grad_y_desc, x_desc, grad_w_desc, split, group_k, group_c, k, c, tap, begin, steps,
    image, geometry,
    ALONG_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr, TAPS: tl.constexpr,
):
    """Sums up so many steps of a sum and stores them as this split of it."""
    stride_h, stride_w, _, _, _, dilation_w = geometry
    row, column, first_0, _, first_1, num_1, num_2 = _reached(
        tap, image, geometry, ALONG_Q, BLOCK_PIXELS, TAPS)
    # as in conv_tma.py
    tl.assume(steps > 0)
    i2 = begin % num_2 * BLOCK_PIXELS
    i1 = begin // num_2 % num_1 + first_1
    i0 = begin // num_2 // num_1 + first_0
    ks = group_k + k
    cs = group_c + c
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    if TAPS > 1:
        acc_1 = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        acc_2 = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
        acc_3 = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for _ in range(steps):
        grad_y = tl.reshape(grad_y_desc.load([i0, i1, i2, ks]), (BLOCK_PIXELS, BLOCK_K)).T
        if ALONG_Q:
            n = i0
            h = i1 + row
            w = i2 + column
        else:
            h = i0 * stride_h + row
            w = i1 * stride_w + column
            n = i2
        x = _pixels(x_desc, n, h, w, cs, ALONG_Q, BLOCK_PIXELS, BLOCK_C)
        acc = tl.dot(grad_y, x, acc)
        if TAPS > 1:
            x = _pixels(x_desc, n, h, w + dilation_w, cs, ALONG_Q, BLOCK_PIXELS, BLOCK_C)
            acc_1 = tl.dot(grad_y, x, acc_1)
            x = _pixels(x_desc, n, h, w + 2 * dilation_w, cs, ALONG_Q, BLOCK_PIXELS, BLOCK_C)
            acc_2 = tl.dot(grad_y, x, acc_2)
        if TAPS > 3:
            x = _pixels(x_desc, n, h, w + 3 * dilation_w, cs, ALONG_Q, BLOCK_PIXELS, BLOCK_C)
            acc_3 = tl.dot(grad_y, x, acc_3)
        i2 += BLOCK_PIXELS
        row_ends = i2 >= num_2 * BLOCK_PIXELS
        i2 = tl.where(row_ends, 0, i2)
        i1 += row_ends.to(tl.int32)
        plane_ends = i1 == first_1 + num_1
        i1 = tl.where(plane_ends, first_1, i1)
        i0 += plane_ends.to(tl.int32)

    _store(grad_w_desc, split, ks, tap, c, acc, BLOCK_K, BLOCK_C)
    if TAPS > 1:
        _store(grad_w_desc, split, ks, tap + 1, c, acc_1, BLOCK_K, BLOCK_C)
        _store(grad_w_desc, split, ks, tap + 2, c, acc_2, BLOCK_K, BLOCK_C)
    if TAPS > 3:
        _store(grad_w_desc, split, ks, tap + 3, c, acc_3, BLOCK_K, BLOCK_C)


@triton.jit
def _pixels(
    x_desc, n, h, w, c,
    ALONG_Q: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    if ALONG_Q:
        x = x_desc.load([n, h, w, c])
    else:
        x = x_desc.load([h, w, n, c])
    return tl.reshape(x, (BLOCK_PIXELS, BLOCK_C))


@triton.jit
def _store(
    grad_w_desc, split, k, tap, c, acc, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Weights of one tap, in pieces of as many columns as the descriptor has."""
    if grad_w_desc.block_shape[3] < BLOCK_C:
        HALF: tl.constexpr = BLOCK_C // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_K, 2, HALF)), (0, 2, 1)))
        _store(grad_w_desc, split, k, tap, c, left, BLOCK_K, HALF)
        _store(grad_w_desc, split, k, tap, c + HALF, right, BLOCK_K, HALF)
    else:
        y = tl.reshape(acc.to(grad_w_desc.dtype), (1, BLOCK_K, 1, BLOCK_C))
        grad_w_desc.store([split, k, tap, c], y)
