"""Matrix product with K split over programs, which add their shares atomically."""

import torch
import triton
import triton.language as tl

INPUTS = "a[M, K] b[K, N]"


@triton.jit
def split_k_kernel(
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
    SPLIT_K: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_k = tl.program_id(1)
    grid_n = tl.cdiv(N, BLOCK_N)
    rm = ((pid // grid_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = ((pid % grid_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_k * BLOCK_K, K, BLOCK_K * SPLIT_K):
        rk = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_mask = (rm[:, None] < M) & (rk[None, :] < K)
        b_mask = (rk[:, None] < K) & (rn[None, :] < N)
        a = tl.load(a_ptr + rm[:, None] * stride_am + rk[None, :] * stride_ak, mask=a_mask, other=0)
        b = tl.load(b_ptr + rk[:, None] * stride_bk + rn[None, :] * stride_bn, mask=b_mask, other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    tl.atomic_add(c_ptr + rm[:, None] * N + rn[None, :], acc, mask=mask, sem="relaxed")


def matmul_split_k(a, b, split_k=3):
    M, K = a.shape
    _, N = b.shape
    # atomics add in float32, whatever the operands
    c = torch.zeros((M, N), device=a.device, dtype=torch.float32)
    grid = (triton.cdiv(M, 32) * triton.cdiv(N, 32), split_k)
    split_k_kernel[grid](
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        BLOCK_M=32,
        BLOCK_N=32,
        BLOCK_K=32,
        SPLIT_K=split_k,
    )
    return c.to(a.dtype)


def reference(a, b, split_k=3):
    return a @ b
