"""Batched matrix product with bias and activation; both gradients are the same kernel, on operands
with transposed strides.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.activation import activate
from tritorch.kernels.tiles import grouped_programs


def tile(m, n, k, group, **options):
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group}, **options)


# by bytes per element: 16-bit operands feed tensor cores, float32 runs TF32 or plain FMA, float64
# its own units
MATMUL_CONFIGS = {
    2: (
        tile(128, 256, 32, 8, num_warps=8, num_stages=3),
        tile(128, 128, 64, 8, num_warps=8, num_stages=3),
        # without a limit of its own ptxas aims for occupancy and spills two scalars
        tile(64, 64, 64, 8, num_warps=4, num_stages=3, maxnreg=255),
        tile(16, 64, 64, 1, num_warps=4, num_stages=4),
    ),
    4: (
        tile(64, 64, 16, 8, num_warps=8, num_stages=3, maxnreg=255),
        tile(16, 64, 16, 1, num_warps=4, num_stages=3),
    ),
    8: (
        tile(32, 32, 16, 8, num_warps=4, num_stages=3, maxnreg=255),
    ),
}
# tiles that keep most multiprocessors of a large GPU busy
ENOUGH_TILES = 96


def matmul_config(m, n, k, batch, itemsize, computes=False):
    """A flat tile for few rows, else the largest one of which there are enough; an epilogue that
    computes needs registers too.
    """
    configs = MATMUL_CONFIGS[itemsize]
    if m <= 16 and len(configs) > 1:
        return configs[-1]
    if itemsize > 2:
        return configs[0]
    # rows that do not start on 16 bytes are loaded through registers, and the largest tile has none
    # to spare
    aligned = m % 16 == 0 and n % 16 == 0 and k % 16 == 0
    for config in configs[0 if aligned and not computes else 1:2]:
        sizes = config.kwargs
        tiles = triton.cdiv(m, sizes["BLOCK_M"]) * triton.cdiv(n, sizes["BLOCK_N"]) * batch
        if tiles >= ENOUGH_TILES and n > sizes["BLOCK_N"] // 2:
            return config
    return configs[2]


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, y_ptr, preactivation_ptr, residual_ptr,
    M, N, K, STEPS, SPLITS, bias_stride,
    a_stride_batch, a_stride_m, a_stride_k,
    b_stride_batch, b_stride_k, b_stride_n,
    y_stride_split, y_stride_batch, y_stride_m,
    residual_strides,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, KEEPS_PREACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX_64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One program computes a BLOCK_M x BLOCK_N tile of one batch entry over STEPS slices of BLOCK_K
    of the inner axis (split-K: SPLITS programs share a tile, each with partial sums of its own).
    KEEPS_PREACTIVATION stores what the activation is applied to, too.

    A residual is added before the activation; it is laid out as y, or by its own
    `residual_strides` along batch, rows and columns.
    """
    ACC: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    # all in one axis of the grid, since the others end at 65535
    pid = tl.program_id(0)
    pid_m, pid_n = grouped_programs(pid % (num_m * num_n), num_m, num_n, GROUP_M)
    entry = pid // (num_m * num_n)
    split = entry % SPLITS
    batch = (entry // SPLITS).to(tl.int64)
    # the tile's corner in 64 bits, once; inside the tile 32 bits are enough unless a stride is huge
    OFFSET: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    first_k = split * STEPS * BLOCK_K
    a_ptr += (batch * a_stride_batch + (pid_m * BLOCK_M).to(tl.int64) * a_stride_m
              + first_k.to(tl.int64) * a_stride_k)
    b_ptr += (batch * b_stride_batch + (pid_n * BLOCK_N).to(tl.int64) * b_stride_n
              + first_k.to(tl.int64) * b_stride_k)
    tile_m = tl.arange(0, BLOCK_M).to(OFFSET)
    tile_n = tl.arange(0, BLOCK_N).to(OFFSET)
    tile_k = tl.arange(0, BLOCK_K).to(OFFSET)
    mask_m = tile_m < M - pid_m * BLOCK_M
    mask_n = tile_n < N - pid_n * BLOCK_N
    a_offsets = tile_m[:, None] * a_stride_m + tile_k[None, :] * a_stride_k
    b_offsets = tile_k[:, None] * b_stride_k + tile_n[None, :] * b_stride_n
    advance = tl.full((), BLOCK_K, OFFSET)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(STEPS):
        mask_k = tile_k < K - first_k - step * BLOCK_K
        a = tl.load(a_ptr + a_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptr + b_offsets, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
        a_ptr += advance * a_stride_k
        b_ptr += advance * b_stride_k
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + offs_n.to(tl.int64) * bias_stride
        acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(ACC)[None, :]
    y_corner = (split.to(tl.int64) * y_stride_split + batch * y_stride_batch
                + (pid_m * BLOCK_M).to(tl.int64) * y_stride_m + pid_n * BLOCK_N)
    y_offsets = tile_m[:, None] * y_stride_m + tile_n[None, :]
    y_mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        if residual_strides is None:
            residual_ptrs = residual_ptr + y_corner + y_offsets
        else:
            over_batch, over_m, over_n = residual_strides
            residual_ptr += (batch * over_batch + (pid_m * BLOCK_M).to(tl.int64) * over_m
                             + (pid_n * BLOCK_N).to(tl.int64) * over_n)
            residual_ptrs = residual_ptr + (tile_m[:, None] * over_m + tile_n[None, :] * over_n)
        acc += tl.load(residual_ptrs, mask=y_mask, other=0.0).to(ACC)
    if KEEPS_PREACTIVATION:
        preactivation = acc.to(preactivation_ptr.dtype.element_ty)
        tl.store(preactivation_ptr + y_corner + y_offsets, preactivation, mask=y_mask)
    acc = activate(acc, ACTIVATION)
    tl.store(y_ptr + y_corner + y_offsets, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
