"""Which tile `matmul_tma_kernel` takes: its configurations, and an estimate of their cycles.

Measured tables come first (`tritorch.tuned`); the estimate is for sizes that nobody measured.
"""

import triton
from triton import Config

from tritorch.kernels.hopper import MULTIPROCESSORS, SHARED_MEMORY


def _tile(form, m, n, k, num_warps, num_stages, pieces=None):
    if pieces is None:
        # a large tile in one piece leaves no room for slices, and takes registers to arrange
        pieces = 2 if n > 128 or m * n > 128 * 128 else 1
    # neighbours share a band of rows, of which a product of few columns has enough
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "PIECES": pieces}
    return Config({**blocks, "FORM": form}, num_warps=num_warps, num_stages=num_stages)


# by bytes per element: 16-bit operands, or float32 as TF32, of which as many bytes are half as many
# numbers
MATMUL_TMA_CONFIGS = {
    2: (
        # in the order of preference; long sums over few tiles
        _tile("tile", 128, 128, 128, 8, 3),
        # two programs on a multiprocessor: one multiplies while the other stores
        _tile("tile", 128, 128, 64, 8, 3),
        _tile("persistent", 128, 128, 64, 8, 4),
        _tile("persistent", 128, 128, 64, 8, 3, pieces=2),
        _tile("tile", 128, 64, 64, 4, 3),
        _tile("persistent", 128, 256, 64, 8, 4),
        _tile("persistent", 256, 128, 64, 8, 4),
        _tile("tile", 128, 256, 64, 8, 4),
        _tile("tile", 256, 128, 64, 8, 4),
        _tile("tile", 64, 256, 64, 4, 4),
        _tile("tile", 256, 64, 64, 8, 4),
        _tile("tile", 64, 128, 64, 4, 4),
        _tile("tile", 64, 64, 128, 4, 4),
        # few columns, of which wgmma takes eight and more
        _tile("tile", 64, 32, 128, 4, 4),
        _tile("tile", 64, 16, 128, 4, 4),
        # a wave of tiles or less: what is under way to one multiprocessor hides its own latency
        _tile("tile", 64, 128, 64, 4, 8),
        _tile("tile", 64, 32, 128, 4, 7),
        _tile("tile", 128, 128, 64, 8, 6),
        # one slice: memory is the limit, and b stays where it is
        _tile("stationary", 64, 128, 128, 4, 3),
        _tile("stationary", 128, 64, 64, 4, 4),
        _tile("stationary", 128, 128, 64, 8, 3),
        _tile("stationary", 128, 256, 64, 8, 3),
        _tile("stationary", 128, 128, 128, 8, 3),
        # only with a residual
        _tile("persistent", 128, 256, 64, 8, 3),
        _tile("persistent", 256, 128, 64, 8, 3),
    ),
    4: (
        # the same, but that results take as many bytes as partial sums
        _tile("tile", 128, 128, 64, 8, 3),
        _tile("tile", 128, 128, 32, 8, 3),
        _tile("persistent", 128, 128, 32, 8, 4, pieces=2),
        _tile("tile", 128, 64, 32, 4, 3),
        _tile("persistent", 128, 256, 32, 8, 3),
        _tile("persistent", 256, 128, 32, 8, 3),
        _tile("tile", 128, 256, 32, 8, 4),
        _tile("tile", 256, 128, 32, 8, 4),
        _tile("tile", 64, 256, 32, 4, 4),
        _tile("tile", 256, 64, 32, 8, 4),
        _tile("tile", 64, 128, 32, 4, 4),
        _tile("tile", 64, 64, 64, 4, 4),
        _tile("tile", 64, 32, 64, 4, 4),
        _tile("tile", 64, 16, 64, 4, 4),
        _tile("stationary", 64, 128, 64, 4, 3, pieces=2),
        _tile("stationary", 128, 64, 32, 4, 4),
        _tile("stationary", 128, 128, 32, 8, 3, pieces=2),
    ),
}

# stream-K, programs that share tiles: for long sums of little more than a whole number of waves; in
# pieces that have room beside the operands of the next tile
MATMUL_TMA_STREAM_K_CONFIGS = {
    2: (
        _tile("stream-k", 128, 256, 64, 8, 4, pieces=4),
        _tile("stream-k", 128, 128, 64, 8, 3, pieces=4),
    ),
    4: (
        _tile("stream-k", 128, 256, 32, 8, 4, pieces=4),
        _tile("stream-k", 128, 128, 32, 8, 3, pieces=4),
    ),
}

# slices that one program must have before it pays to split a sum
MIN_SLICES = 8


def matmul_tma_config(m, n, k, batch, shared, itemsize):
    """The configuration with the fewest `_cycles`; `shared`: all entries of the batch have one b.
    An itemsize of 4 means TF32.
    """
    configs = [
        config
        for config in MATMUL_TMA_CONFIGS[itemsize]
        if config.kwargs["FORM"] != "stationary" or (shared and k <= config.kwargs["BLOCK_K"])
    ]
    return min(configs, key=lambda config: _cycles(config, m, n, k, batch, itemsize))


def matmul_tma_stream_k_config(m, n, k, batch, shared, itemsize):
    """What replaces it where programs may share tiles (stream-K); None where that would not pay."""

    def expected(config):
        return _cycles(config, m, n, k, batch, itemsize)

    config = min(MATMUL_TMA_STREAM_K_CONFIGS[itemsize], key=expected)
    other = matmul_tma_config(m, n, k, batch, shared, itemsize)
    return config if expected(config) < GAIN * expected(other) else None


def for_moments(config, itemsize):
    """What replaces a configuration where each column of a tile is summed: a tile of the same size
    with fewer columns, or one that leaves shared memory for the sums of its warps.
    """
    sizes = config.kwargs
    tile = sizes["FORM"], sizes["BLOCK_M"], sizes["BLOCK_N"]
    if tile[1:] == (128, 256):
        tile = sizes["FORM"], 256, 128
    elif tile != ("persistent", 128, 128) or sizes["PIECES"] == 1:
        return config
    for entry in MATMUL_TMA_CONFIGS[itemsize]:
        if tile == tuple(entry.kwargs[name] for name in ("FORM", "BLOCK_M", "BLOCK_N")):
            return entry
    return config


def for_residual(config, itemsize):
    """What replaces a configuration where a residual is added.

    For a persistent one, the same tile with the most stages that leave room for a residual beside
    the operands of the next tile; if none does, the same tile with one program each.
    """
    if config.kwargs["FORM"] != "persistent":
        return config
    tile = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    fitting = [
        entry
        for entry in MATMUL_TMA_CONFIGS[itemsize]
        if (entry.kwargs["BLOCK_M"], entry.kwargs["BLOCK_N"]) == tile
        and entry.kwargs["FORM"] != "stationary"
        and residents(entry, itemsize, True) > 0
    ]
    return min(
        fitting,
        key=lambda entry: (entry.kwargs["FORM"] != "persistent", -entry.num_stages),
        default=config,
    )


def for_sums(config):
    """What replaces a configuration where the rows of a are summed too: the same tile, in programs
    of one tile each; None if there is none.
    """
    sizes = config.kwargs
    tile = sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]
    if sizes["FORM"] == "tile":
        return config
    for entry in MATMUL_TMA_CONFIGS[2]:
        found = tuple(entry.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if entry.kwargs["FORM"] == "tile" and found == tile:
            return entry
    return None


def sums_pay(plain, summing, m, n, k):
    """Whether a product of 16-bit numbers that also sums the rows of a, in configuration `summing`,
    is estimated to take no longer than one in `plain` and two launches that read a once more.
    """
    read = 2 * m * k / ADDED / MULTIPROCESSORS
    # partial sums are added by one launch
    added = SUMS / 2 if num_splits(summing, m, n, k, 1) > 1 else 0
    apart = _cycles(plain, m, n, k, 1, 2) / (GAIN if plain.kwargs["FORM"] == "stream-k" else 1)
    apart += SUMS + read
    return _cycles(summing, m, n, k, 1, 2, sums=True) + added <= apart


def without_idle_stages(config, slices):
    """The configuration without the stages that so few slices never fill: another program can have
    their shared memory.
    """
    if config.kwargs["FORM"] != "tile" or config.num_stages <= slices + 1:
        return config
    return Config(config.kwargs, num_warps=config.num_warps, num_stages=slices + 1,
                  maxnreg=config.maxnreg)


def num_splits(config, m, n, k, batch):
    """Splits of the inner axis (split-K), so that most multiprocessors have work."""
    tiles = num_tiles(config, m, n) * batch
    if config.kwargs["FORM"] != "tile" or tiles > MULTIPROCESSORS // 2:
        return 1
    slices = triton.cdiv(k, config.kwargs["BLOCK_K"])
    return max(1, min(MULTIPROCESSORS // tiles, slices // MIN_SLICES))


def num_tiles(config, m, n):
    """Tiles of one entry of the batch."""
    return triton.cdiv(m, config.kwargs["BLOCK_M"]) * triton.cdiv(n, config.kwargs["BLOCK_N"])


def residents(config, itemsize, residual=False):
    """Programs that share a multiprocessor: as its registers and its shared memory allow."""
    form = config.kwargs["FORM"]
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    columns = block_m * config.num_stages
    columns += block_n * (1 if form == "stationary" else config.num_stages)
    piece = block_m * block_n // config.kwargs["PIECES"]
    stored = itemsize * piece * (2 if residual else 1)
    if form == "tile":
        # no loads for another tile are in flight: the result is staged where the operands were
        stored = 0
    elif form == "stream-k":
        # not with every compiler; a residual is added with the parts
        stored = 4 * piece
    threads = 32 * config.num_warps
    # of the accumulator, and of everything else
    registers = block_m * block_n // threads + 40
    shared = itemsize * columns * block_k + stored + 1024
    return min(SHARED_MEMORY // shared, 65536 // (registers * threads))


# what a multiprocessor of compute capability 9 does in a cycle: pairs of 16-bit numbers that it
# multiplies (of TF32 half as many), bytes that it receives from L2, that it sends there, and of
# partial sums that it adds
PAIRS = 1800
LOADED = 50
STORED = 40
ADDED = 12
# cycles from a load to its data; of a program's begin and end; of those of one tile alone on its
# multiprocessor; of the launch that adds up partial sums
LATENCY = 1800
START = 3000
ALONE = 2000
SUMS = 8000
# stream-K must be estimated to take no more than this part of what the best other form takes
GAIN = 0.95
# columns of b that multiply as long as SUMMED columns of ones: wgmma reads its rows of a in the
# time of 32 at least; no measurement of these kernels
SUMMING = 48


def _cycles(config, m, n, k, batch, itemsize, sums=False):
    """A rough count of cycles of the busiest multiprocessor; its constants are those that choose
    best among what was measured on an H100.
    """
    form = config.kwargs["FORM"]
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    splits = num_splits(config, m, n, k, batch)
    slices = triton.cdiv(triton.cdiv(k, block_k), splits)
    fitted = without_idle_stages(config, slices)
    all_tiles = num_tiles(config, m, n) * batch * splits
    tiles = triton.cdiv(all_tiles, MULTIPROCESSORS)
    together = min(tiles, residents(fitted, itemsize))
    if form == "stream-k":
        together = residents(fitted, itemsize)
        programs = MULTIPROCESSORS * together
        steps = together * triton.cdiv(all_tiles * slices, programs)
        # parts of tiles that each program writes
        parts = 1 + all_tiles / programs
    # with few columns rows are read from shared memory too often
    multiplied = itemsize * block_m * max(block_n, 96) * block_k / (2 * PAIRS)
    loaded = block_m + (0 if form == "stationary" else block_n)
    # a stage is loaded while the others of all programs are multiplied
    waits = LATENCY / (together * (config.num_stages - 1))
    others = max(itemsize * loaded * block_k / LOADED, waits)
    loop = slices * max(multiplied, others)
    if form == "stream-k":
        written = 4 * block_m * block_n * together * parts
        added = SUMS + written * (1 / STORED + 1 / ADDED)
        return steps * max(multiplied, others) + START + ALONE * parts + added
    stored = block_m * block_n * (4 if splits > 1 else itemsize) / STORED
    ends = START
    if form == "tile" and residents(fitted, itemsize) == 1:
        ends = tiles * ALONE
    elif form == "tile":
        # most of it overlaps with products of other programs
        stored /= 4
        ends *= triton.cdiv(tiles, residents(fitted, itemsize))
    if sums:
        # only in tiles of the first column
        summing = slices * max(multiplied + block_m * SUMMING * block_k / PAIRS, others)
        ends += triton.cdiv(tiles, triton.cdiv(n, block_n)) * (summing - loop)
    added = 0
    if splits > 1:
        # every partial sum is read once more, by all multiprocessors
        added = SUMS + 4 * splits * batch * m * n / ADDED / MULTIPROCESSORS
    return tiles * (loop + stored) + ends + added
