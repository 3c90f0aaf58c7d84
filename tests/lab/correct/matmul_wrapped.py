"""A product whose rows and columns wrap around, and are said to lie together all the same.

What the wrong ones give is masked off in the end.
"""

import torch
import triton
import triton.language as tl

INPUTS = "a[M, K] b[K, N]"


def reference(a, b):
    return a @ b


@triton.jit
def wrapped_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows = tl.max_contiguous(tl.multiple_of(rows % M, BLOCK_M), BLOCK_M)
    b_columns = tl.max_contiguous(tl.multiple_of(columns % N, BLOCK_N), BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        kept = start + inner < K
        k = (start + inner).to(tl.int64)
        a_offsets = a_rows[:, None].to(tl.int64) * stride_am + k[None, :] * stride_ak
        b_offsets = k[:, None] * stride_bk + b_columns[None, :].to(tl.int64) * stride_bn
        a = tl.load(a_ptr + a_offsets, mask=kept[None, :], other=0.0)
        b = tl.load(b_ptr + b_offsets, mask=kept[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(c_ptr + offsets, total.to(c_ptr.dtype.element_ty), mask=mask)


def matmul_wrapped(a, b):
    c = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    if 0 in c.shape:
        return c
    grid = triton.cdiv(c.shape[0], 32), triton.cdiv(c.shape[1], 32)
    wrapped_kernel[grid](
        a,
        b,
        c,
        *c.shape,
        a.shape[1],
        *a.stride(),
        *b.stride(),
        BLOCK_M=32,
        BLOCK_N=32,
        BLOCK_K=32,
    )
    return c
