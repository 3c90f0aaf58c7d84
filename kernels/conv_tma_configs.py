"""Which tile `conv2d_tma_kernel` takes: its configurations, and an estimate of their cycles.

Letters are those of conv.py.  Measured tables come first (`tritorch.tuned`); the estimate is for
sizes that nobody measured.
"""

import functools

import triton
from triton import Config

from tritorch.kernels.hopper import MULTIPROCESSORS, SHARED_MEMORY


def _tile(k, npq, c, num_warps, num_stages, persistent=False):
    blocks = {"BLOCK_K": k, "BLOCK_NPQ": npq, "BLOCK_C": c, "PERSISTENT": persistent}
    return Config(blocks, num_warps=num_warps, num_stages=num_stages)


# by bytes per element, 4 being float32 as TF32; wide filters, of which two programs share a
# multiprocessor or one has it, then 64 channels
CONV2D_TMA_CONFIGS = {
    2: (
        _tile(128, 128, 64, 8, 3),
        _tile(128, 256, 64, 8, 4),
        _tile(128, 256, 64, 8, 4, persistent=True),
        _tile(64, 256, 64, 4, 2),
        _tile(64, 256, 64, 4, 2, persistent=True),
        _tile(64, 128, 64, 4, 3),
        # a wave of tiles or less: a program alone hides its own latency
        _tile(128, 128, 64, 8, 6),
        _tile(64, 128, 64, 4, 8),
        # three quarters of the stages are under way, where it is one half of two
        _tile(64, 256, 32, 4, 4),
        _tile(64, 256, 32, 4, 4, persistent=True),
    ),
    4: (
        _tile(128, 128, 32, 8, 3),
        _tile(128, 256, 32, 8, 4),
        # results take twice the room
        _tile(128, 256, 32, 8, 3, persistent=True),
        _tile(64, 256, 32, 4, 2),
        _tile(64, 128, 32, 4, 3),
        _tile(128, 128, 32, 8, 6),
        _tile(64, 128, 32, 4, 8),
    ),
}

# what the portable kernels are good enough for
MIN_CHANNELS = 32
MIN_PIXELS = 1024

# cycles from a load to its data, and from one of single pixels
LATENCY = 1800
SINGLE_PIXELS = 3500


def conv2d_tma_config(n, p, q, k, c, taps, stride, transposed, itemsize=2, groups=1):
    """The configuration with the least estimated time; None where most of a tile or of the GPU
    would be idle.

    k and c are channels of one group.  `stride` and `transposed` only tell measured sizes apart.
    Measured tables leave out an itemsize of 2 and a single group, and so do callers.
    """
    if min(c, k) < MIN_CHANNELS or n * p * q < MIN_PIXELS:
        return None
    narrow = k <= 64
    configs = [
        each
        for each in CONV2D_TMA_CONFIGS[itemsize]
        if narrow == (each.kwargs["BLOCK_K"] == 64)
    ]
    return min(configs, key=lambda config: cycles(config, n, p, q, k, c, taps, itemsize, groups))


def for_residual(config, computes, itemsize):
    """What replaces a configuration where a residual is added.

    Persistent programs have no room for a residual beside the operands of the next tile, and the
    largest tile has no registers for one beside an activation that computes.
    """
    block_k, block_npq, block_c = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "NPQ", "C"))
    if computes and block_k * block_npq > 128 * 128:
        block_npq = 128
    elif not config.kwargs["PERSISTENT"]:
        return config
    for entry in CONV2D_TMA_CONFIGS[itemsize]:
        if all(
            entry.kwargs[f"BLOCK_{axes}"] == size
            for axes, size in (("K", block_k), ("NPQ", block_npq), ("C", block_c))
        ):
            # of equal tiles the one that is not persistent comes first
            return entry
    return config


def cycles(config, n, p, q, k, c, taps, itemsize, groups=1):
    """An estimate of the cycles that one multiprocessor is busy: products of 16-bit numbers (half
    as many of TF32), or traffic of shared memory, whichever takes longer, and what is not
    overlapped at a tile's ends.
    """
    block_k, block_npq, block_c = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "NPQ", "C"))
    block_n, block_p, block_q = tile_of_pixels(n, p, q, block_npq)
    pixel_tiles = triton.cdiv(n, block_n) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
    tiles = triton.cdiv(pixel_tiles * triton.cdiv(k, block_k) * groups, MULTIPROCESSORS)
    products = itemsize * block_k * block_npq * block_c / 4096
    # a warp group reads 64 channels and all pixels of the tile
    reads = triton.cdiv(block_k, 64) * (64 + block_npq)
    step = max(products, itemsize * block_c * (block_k + block_npq + reads) / 128)
    together = min(tiles, residents(config, itemsize))
    # a stage is loaded while all other stages are multiplied; tiles of single pixels, which share
    # nothing, wait longest
    latency = SINGLE_PIXELS if block_n == block_npq else LATENCY
    step = max(step, latency / ((config.num_stages - 1) * together))
    # the part of a tile's first loads and of its stores that nothing overlaps
    ends = 6000
    if config.kwargs["PERSISTENT"]:
        ends = 5000
    elif together == 1:
        ends = 9000
    return tiles * triton.cdiv(c, block_c) * taps * step + triton.cdiv(tiles, together) * ends


def residents(config, itemsize):
    """Programs that share a multiprocessor."""
    return max(1, min(SHARED_MEMORY // _shared_memory(config, itemsize), 16 // config.num_warps))


def stored_pixels(config, itemsize, block_n, block_p, block_q):
    """The tile of pixels that is stored at once: half of it, along its first axis longer than 1,
    where a persistent program has no room for all of it beside the operands of the next tile.
    """
    if _shared_memory(config, itemsize) <= SHARED_MEMORY:
        return block_n, block_p, block_q
    if block_n > 1:
        return block_n // 2, block_p, block_q
    return (1, block_p // 2, block_q) if block_p > 1 else (1, 1, block_q // 2)


def _shared_memory(config, itemsize):
    sizes = config.kwargs
    block_k, block_npq = sizes["BLOCK_K"], sizes["BLOCK_NPQ"]
    operands = config.num_stages * sizes["BLOCK_C"] * (block_k + block_npq)
    # elements, and barriers
    return itemsize * (operands + block_k * block_npq * sizes["PERSISTENT"]) + 256


@functools.lru_cache(maxsize=1024)
def pixels_of(config):
    """Images, rows and columns of a tile, or None if no table names them; the rest of `config`."""
    sizes = dict(config.kwargs)
    pixels = tuple(sizes.pop(f"BLOCK_{axis}", 0) for axis in "NPQ")
    if not any(pixels):
        return None, config
    rest = Config(sizes, num_warps=config.num_warps, num_stages=config.num_stages,
                  maxnreg=config.maxnreg)
    return pixels, rest


def tile_of_pixels(n, p, q, block):
    """Images, rows and columns of a tile of `block` pixels.

    The fewest tiles, of those the ones with the fewest images.  A tile of single pixels takes an
    eighth longer, as measured: neighbours share nothing.
    """
    best = None
    for log_q in range(block.bit_length()):
        for log_p in range(block.bit_length() - log_q):
            block_p, block_q = 1 << log_p, 1 << log_q
            block_n = block >> log_p + log_q
            tiles = triton.cdiv(n, block_n) * triton.cdiv(p, block_p) * triton.cdiv(q, block_q)
            effort = tiles * (9 if block_n == block else 8)
            found = (effort, block_n, abs(log_p - log_q), block_p, block_q)
            best = found if best is None or found < best else best
    return best[1], best[3], best[4]
