"""Matrix products for GPUs with a tensor memory accelerator and wgmma (compute capability 9).

Operands and results are descriptors of three dimensions, the first of which is a batch: of
matrices, of partial sums, or of the columns of an image.  A tile of one entry goes from global to
shared memory and into wgmma as it is, whichever of its two axes is contiguous: 16-bit numbers are,
float32 as TF32 only along the inner axis.  `matmul_tma_configs.py` chooses the tile.
"""

import triton
import triton.language as tl

from tritorch.kernels.activation import activate
from tritorch.kernels.moments import store_moments
from tritorch.kernels.tiles import grouped_programs

# columns of ones that the rows of a are multiplied by to sum them: wgmma could do with 8, but for
# those Triton 3.6 makes products of single warps, whose operands pass through registers
SUMMED = tl.constexpr(16)
# splits that are summed side by side: of few columns
SPLITS_AT_ONCE = 32


@triton.jit
def matmul_tma_kernel(
    a_desc, b_desc, bias_ptr, y_desc, preactivation_desc, moments_ptr, residual_desc, sums_ptr,
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
    that begin at z // BATCH * STEPS.  An a_step or b_step of 0 takes one entry for all; entry z of
    the result is stored at y_step * z.  BATCH_FIRST: neighbours have the same tile of different
    entries.  SUMS_BATCH: the same slice of all ENTRIES of a and b comes before the next slice.

    FORM: "tile" has one tile a program.  "persistent" goes on to the next tile while the one before
    is stored, in one loop over all slices, so that loads never pause.  "stationary" has one slice,
    and keeps its tile of b for all of its tiles of a.  "stream-k" is that of
    https://arxiv.org/abs/2301.03598: programs have equal shares of the slices of all TILES, one
    tile after the other.  What a program has of tile t is stored as entry program + t of y, (parts,
    BLOCK_M, BLOCK_N), for `matmul_tma_parts_kernel` to add up.

    PIECES of a tile pass through shared memory one after the other, and so do those of a residual,
    which is described as the result.  SWAPPED: the result is stored transposed, N being its columns
    still.  FILLS: beside each stored entry e, zeros go to e + 1, e + y_row and e + y_row + 1, the
    pixels that a stride of 2 passes over.

    float32 is multiplied as TF32, to which wgmma truncates its operands.

    With moments_ptr, for results that are neither split nor SWAPPED nor filled, it writes mean,
    squared deviations and count of each column of each tile as it is stored, of the M rows alone.

    With sums_ptr, for results of one entry that are not SWAPPED and for FORM "tile", programs of
    the first column of tiles write the sums of the M rows of a too, each over its slices: row z of
    sums_ptr.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    moments = (moments_ptr, M, num_m)
    outputs = (bias_ptr, y_desc, preactivation_desc, residual_desc,
               N, y_step, y_row, bias_stride, moments)
    if FORM == "tile":
        m, n, z = _place(pid, num_m, num_n, BATCH, BATCH_FIRST, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # if the loop might not run, the accumulator would have a second definition, and ptxas would
        # wait after every wgmma
        tl.assume(STEPS > 0)
        # two loops, since ptxas would wait for a product inside a condition
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
    elif FORM == "stream-k":
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
    parts_ptr, bias_ptr, y_desc, preactivation_desc, residual_desc,
    N, num_m, num_n, STEPS, BATCH, PROGRAMS, bias_stride,
    ACTIVATION: tl.constexpr, BATCH_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One program adds up COLUMNS of a tile from the parts that PROGRAMS with equal shares stored,
    in their order.
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
    outputs = (bias_ptr, y_desc, preactivation_desc, residual_desc,
               N, 1, 0, bias_stride, (None, 0, 0))
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
    """Stores the first column of `sums`, whose columns are all equal."""
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
    (bias_ptr, y_desc, preactivation_desc, residual_desc,
     N, y_step, y_row, bias_stride, moments) = outputs
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
    if preactivation_desc is not None:
        preactivation = acc.to(preactivation_desc.dtype)
        preactivation_desc.store([z, m, n], tl.reshape(preactivation, (1, ROWS, COLUMNS)))
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
