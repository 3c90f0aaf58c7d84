"""Matrix products for GPUs with a tensor memory accelerator and wgmma (compute capability 9).

Operands and results are descriptors of three dimensions, the first of which is a batch: of
matrices, of partial sums, or of the columns of an image.  A tile of one entry goes from global to
shared memory and into wgmma as it is, whichever of its two axes is contiguous: 16-bit numbers are,
float32 as TF32 only along the inner axis.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.activation import activate
from tritorch.kernels.moments import store_moments
from tritorch.kernels.tiles import grouped_programs


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

# of programs that share tiles: for a wave of them and a bit, of long sums; in pieces that have room
# beside the operands of the next tile
MATMUL_TMA_EVEN_CONFIGS = {
    2: (_tile("even", 128, 256, 64, 8, 4, pieces=4), _tile("even", 128, 128, 64, 8, 3, pieces=4)),
    4: (_tile("even", 128, 256, 32, 8, 4, pieces=4), _tile("even", 128, 128, 32, 8, 3, pieces=4)),
}

# of an H100 SXM and an H200: one constant, so that sums are split alike on every GPU
MULTIPROCESSORS = 132
# slices that one program must have before it pays to split a sum
MIN_SLICES = 8


def matmul_tma_config(m, n, k, batch, shared, itemsize):
    """The configuration that takes fewest cycles by `_cycles`; `shared` where all entries of the
    batch have one b.  An itemsize of 4 is TF32.
    """
    configs = [
        config
        for config in MATMUL_TMA_CONFIGS[itemsize]
        if config.kwargs["FORM"] != "stationary" or (shared and k <= config.kwargs["BLOCK_K"])
    ]
    return min(configs, key=lambda config: _cycles(config, m, n, k, batch, itemsize))


def matmul_tma_even_config(m, n, k, batch, shared, itemsize):
    """What takes its place where tiles may be shared by programs; None where that would not pay."""

    def expected(config):
        return _cycles(config, m, n, k, batch, itemsize)

    config = min(MATMUL_TMA_EVEN_CONFIGS[itemsize], key=expected)
    other = matmul_tma_config(m, n, k, batch, shared, itemsize)
    return config if expected(config) < GAIN * expected(other) else None


def for_moments(config, itemsize):
    """What takes the place of a configuration where each column of a tile is summed up: as large a
    tile of fewer columns, or one whose multiprocessor has room for the sums of its warps.
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
    """What takes the place of a configuration where a residual is added: of what is persistent, the
    same tile with most stages that has room for one beside the operands of the next, or where none
    has, the same tile of one program.
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
    """What takes the place of a configuration where the rows of a are summed up: the same tile, of
    programs that have one tile each.
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
    """Whether a product of 16-bit numbers by configuration `summing`, which sums up the rows of a,
    is expected to take no longer than one by `plain` and two launches that read a once more.
    """
    read = 2 * m * k / ADDED / MULTIPROCESSORS
    # partial sums are added by one launch
    added = SUMS / 2 if num_splits(summing, m, n, k, 1) > 1 else 0
    apart = _cycles(plain, m, n, k, 1, 2) / (GAIN if plain.kwargs["FORM"] == "even" else 1)
    apart += SUMS + read
    return _cycles(summing, m, n, k, 1, 2, sums=True) + added <= apart


def num_splits(config, m, n, k, batch):
    """Into how many sums each of the result is split, so that most multiprocessors have work."""
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
        # with no loads for another tile on the way it goes where the operands were
        stored = 0
    elif form == "even":
        # with some compilers it does not; a residual is added with the parts
        stored = 4 * piece
    threads = 32 * config.num_warps
    # of the accumulator, and of everything else
    registers = block_m * block_n // threads + 40
    shared = itemsize * columns * block_k + stored + 1024
    return min(232448 // shared, 65536 // (registers * threads))


# what a multiprocessor of compute capability 9 does in a cycle: pairs of 16-bit numbers that it
# multiplies (of TF32 half as many), bytes that it receives from L2, that it sends there, and of
# partial sums that it adds
PAIRS = 1800
LOADED = 50
STORED = 40
ADDED = 12
# cycles from a load to its data; of a program's begin and end, of one tile alone on its
# multiprocessor; of the launch that adds up partial sums
LATENCY = 1800
START = 3000
ALONE = 2000
SUMS = 8000
# of what the best of the others takes, the most that programs which share tiles may be expected to
GAIN = 0.95
# columns of b that multiply as long as SUMMED columns of ones: wgmma reads its rows of a in the
# time of 32 at least; no measurement of these kernels
SUMMING = 48


def _cycles(config, m, n, k, batch, itemsize, sums=False):
    """A rough count for the busiest multiprocessor, whose constants are those that choose best
    among what an H100 measured.
    """
    form = config.kwargs["FORM"]
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    splits = num_splits(config, m, n, k, batch)
    slices = triton.cdiv(triton.cdiv(k, block_k), splits)
    all_tiles = num_tiles(config, m, n) * batch * splits
    tiles = triton.cdiv(all_tiles, MULTIPROCESSORS)
    together = min(tiles, residents(config, itemsize))
    if form == "even":
        together = residents(config, itemsize)
        programs = MULTIPROCESSORS * together
        steps = together * triton.cdiv(all_tiles * slices, programs)
        # of tiles, that each of them writes
        parts = 1 + all_tiles / programs
    # of few columns the rows are read from shared memory too often
    multiplied = itemsize * block_m * max(block_n, 96) * block_k / (2 * PAIRS)
    loaded = block_m + (0 if form == "stationary" else block_n)
    # a stage is loaded while the others of all programs are multiplied
    waits = LATENCY / (together * (config.num_stages - 1))
    others = max(itemsize * loaded * block_k / LOADED, waits)
    loop = slices * max(multiplied, others)
    if form == "even":
        written = 4 * block_m * block_n * together * parts
        added = SUMS + written * (1 / STORED + 1 / ADDED)
        return steps * max(multiplied, others) + START + ALONE * parts + added
    stored = block_m * block_n * (4 if splits > 1 else itemsize) / STORED
    ends = START
    if form == "tile" and residents(config, itemsize) == 1:
        ends = tiles * ALONE
    elif form == "tile":
        # most of it while others multiply
        stored /= 4
        ends *= triton.cdiv(tiles, residents(config, itemsize))
    if sums:
        # only in tiles of the first column
        summing = slices * max(multiplied + block_m * SUMMING * block_k / PAIRS, others)
        ends += triton.cdiv(tiles, triton.cdiv(n, block_n)) * (summing - loop)
    added = 0
    if splits > 1:
        # every partial sum is read once more, by all multiprocessors
        added = SUMS + 4 * splits * batch * m * n / ADDED / MULTIPROCESSORS
    return tiles * (loop + stored) + ends + added


# columns of ones that rows are summed up with: of eight, the fewest of wgmma, Triton 3.6 makes
# products of single warps, whose operands pass through registers
SUMMED = tl.constexpr(16)


@triton.jit
def matmul_tma_kernel(
    a_desc, b_desc, bias_ptr, y_desc, before_desc, moments_ptr, residual_desc, sums_ptr,
    N, num_m, num_n, TILES, STEPS, BATCH, ENTRIES, a_step, b_step, y_step, y_row, bias_stride, M,
    ACTIVATION: tl.constexpr, A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    SWAPPED: tl.constexpr, SUMS_BATCH: tl.constexpr, BATCH_FIRST: tl.constexpr,
    FILLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PIECES: tl.constexpr, FORM: tl.constexpr,
):
    """One program computes BLOCK_M x BLOCK_N tiles of a @ b.T, each over STEPS slices of BLOCK_K.

    a is (batch, M, K), or TRANSPOSED (batch, K, M); b is (batch, N, K) or (batch, K, N).  Tile t is
    one of num_m x num_n of entry z of the result: of batch entry z % BATCH, and of its slices those
    that begin at z // BATCH * STEPS.  A step of 0 takes one entry for all, y_step is where the next
    one is stored.  BATCH_FIRST: neighbours have the same tile of different entries.  SUMS_BATCH:
    the same slice of all ENTRIES of a and b comes before the next slice.

    FORM: "tile" has one tile a program.  "persistent" goes on to the next tile while the one before
    is stored, in one loop over all slices, so that loads never pause.  "stationary" has one slice,
    and keeps its tile of b for all of its tiles of a.  "even" has as many slices as every other
    program, of all TILES one after the other: what it has of tile t is stored as entry
    program + t of y, (parts, BLOCK_M, BLOCK_N), for `matmul_tma_parts_kernel` to add up.

    PIECES of a tile pass through shared memory one after the other, and so do those of a residual,
    which is described as the result.  SWAPPED: the result is stored transposed, N being its columns
    still.  FILLS: zeros go to the entries after z, after z + y_row and to that one itself.

    Products of float32 are TF32's, which wgmma truncates its operands to.

    With moments_ptr, for results that are neither split nor SWAPPED nor filled, it writes mean,
    squared deviations and count of each column of each tile as it is stored, of the M rows alone.

    With sums_ptr, for results of one entry that are not SWAPPED and for FORM "tile", programs of
    the first column of tiles write the sums of the M rows of a too, each over its slices: row z of
    sums_ptr.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    moments = (moments_ptr, M, num_m)
    outputs = (bias_ptr, y_desc, before_desc, residual_desc, N, y_step, y_row, bias_stride, moments)
    if FORM == "tile":
        m, n, z = _place(pid, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # without it no step at all is one more definition of the accumulator, for which ptxas waits
        # after every wgmma
        tl.assume(STEPS > 0)
        # two loops, since a product inside of a condition would be waited for
        if sums_ptr is not None and n == 0:
            # stays in shared memory
            ones = tl.full((SUMMED, BLOCK_K), 1.0, dtype=a_desc.dtype)
            sums = tl.zeros((BLOCK_M, SUMMED), dtype=tl.float32)
            for step in range(STEPS):
                a, b = _operands(a_desc, b_desc, m, n, z, step, STEPS, BATCH, ENTRIES, a_step,
                                 b_step, A_TRANSPOSED, B_TRANSPOSED, SUMS_BATCH,
                                 BLOCK_M, BLOCK_N, BLOCK_K)
                acc = tl.dot(a, b.T, acc, input_precision="tf32")
                sums = tl.dot(a, ones.T, sums)
            _store_sums(sums, m, z, sums_ptr, M)
        else:
            for step in range(STEPS):
                a, b = _operands(a_desc, b_desc, m, n, z, step, STEPS, BATCH, ENTRIES, a_step,
                                 b_step, A_TRANSPOSED, B_TRANSPOSED, SUMS_BATCH,
                                 BLOCK_M, BLOCK_N, BLOCK_K)
                acc = tl.dot(a, b.T, acc, input_precision="tf32")
        _finish(acc, m, n, z, outputs, ACTIVATION, SWAPPED, FILLS, PIECES)
    elif FORM == "persistent":
        t = pid - programs
        step = STEPS - 1
        m, n, z = _place(pid, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        total = tl.cdiv(TILES - pid, programs) * STEPS
        tl.assume(total > 0)
        for _ in range(total):
            step = tl.where(step == STEPS - 1, 0, step + 1)
            if step == 0:
                t += programs
                m, n, z = _place(t, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
            a, b = _operands(a_desc, b_desc, m, n, z, step, STEPS, BATCH, ENTRIES, a_step, b_step,
                             A_TRANSPOSED, B_TRANSPOSED, SUMS_BATCH, BLOCK_M, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision="tf32")
            if step == STEPS - 1:
                _finish(acc, m, n, z, outputs, ACTIVATION, SWAPPED, FILLS, PIECES)
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    elif FORM == "even":
        begin = pid * (TILES * STEPS) // programs
        end = (pid + 1) * (TILES * STEPS) // programs
        while begin < end:
            t = begin // STEPS
            first = begin % STEPS
            count = tl.minimum(STEPS - first, end - begin)
            m, n, z = _place(t, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            tl.assume(count > 0)
            for step in range(first, first + count):
                a, b = _operands(a_desc, b_desc, m, n, z, step, STEPS, BATCH, ENTRIES, a_step,
                                 b_step, A_TRANSPOSED, B_TRANSPOSED, SUMS_BATCH,
                                 BLOCK_M, BLOCK_N, BLOCK_K)
                acc = tl.dot(a, b.T, acc, input_precision="tf32")
            _finish(acc, 0, 0, pid + t, outputs, ACTIVATION, SWAPPED, FILLS, PIECES)
            begin += count
    else:
        tl.static_assert(FORM == "stationary", "unknown form")
        n = pid % num_n * BLOCK_N
        b = _load(b_desc, 0, n, 0, B_TRANSPOSED, BLOCK_N, BLOCK_K)
        for t in range(pid // num_n, TILES // num_n, programs // num_n):
            m, _, z = _place(t, num_m, 1, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, 1)
            a = _load(a_desc, z * a_step, m, 0, A_TRANSPOSED, BLOCK_M, BLOCK_K)
            acc = tl.dot(a, b.T, input_precision="tf32")
            _finish(acc, m, n, z, outputs, ACTIVATION, SWAPPED, FILLS, PIECES)


@triton.jit
def matmul_tma_parts_kernel(
    parts_ptr, bias_ptr, y_desc, before_desc, residual_desc,
    N, num_m, num_n, STEPS, BATCH, PROGRAMS, bias_stride,
    ACTIVATION: tl.constexpr, BATCH_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Adds up the parts of a tile by PROGRAMS that have even shares, in their order: one program
    COLUMNS of it.
    """
    t = tl.program_id(0) // (BLOCK_N // COLUMNS)
    column = tl.program_id(0) % (BLOCK_N // COLUMNS) * COLUMNS
    total = num_m * num_n * BATCH * STEPS
    # the programs that have its first and its last slice
    first = ((t * STEPS + 1) * PROGRAMS - 1) // total
    last = ((t + 1) * STEPS * PROGRAMS - 1) // total
    rows = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
    offsets = rows + (column + tl.arange(0, COLUMNS))[None, :]
    acc = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    for program in range(first, last + 1):
        part = (program + t).to(tl.int64) * (BLOCK_M * BLOCK_N)
        acc += tl.load(parts_ptr + part + offsets)
    m, n, z = _place(t, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
    outputs = (bias_ptr, y_desc, before_desc, residual_desc, N, 1, 0, bias_stride, (None, 0, 0))
    _store(acc, m, n + column, z, outputs, ACTIVATION, False)


@triton.jit
def _place(
    t, num_m, num_n, BATCH,
    BATCH_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):
    if BATCH_FIRST:
        z = t % BATCH
        t = t // BATCH
    else:
        z = t // (num_m * num_n)
        t = t % (num_m * num_n)
    pid_m, pid_n = grouped_programs(t, num_m, num_n, GROUP_M)
    return pid_m * BLOCK_M, pid_n * BLOCK_N, z


@triton.jit
def _operands(
    a_desc, b_desc, m, n, z, step, STEPS, BATCH, ENTRIES, a_step, b_step,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, SUMS_BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    step += z // BATCH * STEPS
    entry = z % BATCH
    if SUMS_BATCH:
        entry = step % ENTRIES
        step = step // ENTRIES
    k = step * BLOCK_K
    a = _load(a_desc, entry * a_step, m, k, A_TRANSPOSED, BLOCK_M, BLOCK_K)
    b = _load(b_desc, entry * b_step, n, k, B_TRANSPOSED, BLOCK_N, BLOCK_K)
    return a, b


@triton.jit
def _load(desc, entry, row, k, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """ROWS x BLOCK_K, zeros where there is nothing."""
    if TRANSPOSED:
        tile = tl.reshape(desc.load([entry, k, row]), (BLOCK_K, ROWS)).T
    else:
        tile = tl.reshape(desc.load([entry, row, k]), (ROWS, BLOCK_K))
    return tile


@triton.jit
def _store_sums(sums, m, z, sums_ptr, M):
    """All columns are the same sums."""
    ROWS: tl.constexpr = sums.shape[0]
    COLUMNS: tl.constexpr = sums.shape[1]
    first = tl.arange(0, COLUMNS)[None, :] == 0
    column = tl.sum(tl.where(first, sums, 0.0), axis=1)
    offs_m = m + tl.arange(0, ROWS)
    tl.store(sums_ptr + z * M + offs_m, column.to(sums_ptr.dtype.element_ty), mask=offs_m < M)


@triton.jit
def _finish(
    acc, m, n, z, outputs,
    ACTIVATION: tl.constexpr, SWAPPED: tl.constexpr, FILLS: tl.constexpr, PIECES: tl.constexpr,
):
    if SWAPPED:
        acc = acc.T
        m, n = n, m
    _store_pieces(acc, m, n, z, outputs, ACTIVATION, FILLS, PIECES)


@triton.jit
def _store_pieces(
    acc, m, n, z, outputs, ACTIVATION: tl.constexpr, FILLS: tl.constexpr, PIECES: tl.constexpr
):
    if PIECES > 1:
        WIDTH: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDTH)), (0, 2, 1)))
        _store_pieces(left, m, n, z, outputs, ACTIVATION, FILLS, PIECES // 2)
        _store_pieces(right, m, n + WIDTH, z, outputs, ACTIVATION, FILLS, PIECES // 2)
    else:
        _store(acc, m, n, z, outputs, ACTIVATION, FILLS)


@triton.jit
def _store(acc, m, n, z, outputs, ACTIVATION: tl.constexpr, FILLS: tl.constexpr):
    bias_ptr, y_desc, before_desc, residual_desc, N, y_step, y_row, bias_stride, moments = outputs
    moments_ptr, M, num_m = moments
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    z *= y_step
    if bias_ptr is not None:
        offs_n = n + tl.arange(0, COLUMNS)
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * bias_stride, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if residual_desc is not None:
        residual = tl.reshape(residual_desc.load([z, m, n]), (ROWS, COLUMNS))
        acc += residual.to(tl.float32)
    if before_desc is not None:
        before_desc.store([z, m, n], tl.reshape(acc.to(before_desc.dtype), (1, ROWS, COLUMNS)))
    acc = activate(acc, ACTIVATION)
    y = acc.to(y_desc.dtype)
    y_desc.store([z, m, n], tl.reshape(y, (1, ROWS, COLUMNS)))
    if moments_ptr is not None:
        part = (z * num_m + m // ROWS).to(tl.int64)
        inside = m + tl.arange(0, ROWS) < M
        offs_n = n + tl.arange(0, COLUMNS)
        store_moments(moments_ptr + part * 3 * N, y, inside, tl.minimum(M - m, ROWS),
                      offs_n, offs_n < N, N, 0)
    if FILLS:
        zeros = tl.zeros((1, ROWS, COLUMNS), dtype=y_desc.dtype)
        # past an odd row begins the next one, which has its own zeros
        if z + 1 < y_row:
            y_desc.store([z + 1, m, n], zeros)
        y_desc.store([z + y_row, m, n], zeros)
        y_desc.store([z + y_row + 1, m, n], zeros)


# of `matmul_tma_sum_kernel`: elements of the result, and partial sums that are read at once
BLOCK = 64
ROWS = 32


@triton.jit
def matmul_tma_sum_kernel(
    x_ptr, y_ptr, NUMEL, SPLITS, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds BLOCK elements of the SPLITS rows of x, and rounds once.

    Of many rows and few columns: each of ROWS is added up by itself, so that many loads are under
    way.  The order depends on SPLITS alone.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < NUMEL
    rows = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, SPLITS, ROWS):
        offsets = (first + rows).to(tl.int64)[:, None] * NUMEL + columns[None, :]
        inside = (first + rows < SPLITS)[:, None] & mask[None, :]
        acc += tl.load(x_ptr + offsets, mask=inside, other=0.0)
    y = tl.sum(acc, axis=0)
    tl.store(y_ptr + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
