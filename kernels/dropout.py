"""Dropout: the mask is computed from a seed wherever it is needed, and stored nowhere."""

import triton
import triton.language as tl

from tritorch.kernels.tiles import strided_offsets

# elements per program: 8 per thread with 4 warps, one 128-bit access of a 16-bit type
BLOCK = 1024


@triton.jit
def random_numbers(seed, pid, BLOCK: tl.constexpr):
    """A random int32 for each of the BLOCK elements of program pid: Philox makes four from one
    count, for four neighbours.
    """
    counts = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.randint4x(seed, counts)
    # the last index runs fastest: a, b, c, d
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,)).to(tl.int32, bitcast=True)


@triton.jit
def dropout_kernel(
    x_ptr, seed_ptr, y_ptr,
    NUMEL, threshold,
    size_1, size_2, size_3, size_4,
    x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    scale: tl.float64,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK consecutive elements of the loop nest: scale times x where the
    random number of the element reaches the threshold, else zero times x.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    x_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(ACC)
    kept = random_numbers(tl.load(seed_ptr), pid, BLOCK) >= threshold
    # a product, so that NaN and infinity are not dropped, as in torch
    y = x * tl.where(kept, scale.to(ACC), 0.0)
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
