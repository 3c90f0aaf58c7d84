"""Stream-K matrix product: the K steps of all tiles form one line that programs share out evenly.

A program may begin and end in the middle of a tile; shares of a tile are added atomically.
"""

import torch
import triton
import triton.language as tl

INPUTS = "a[M, K] b[K, N]"


@triton.jit
def stream_k_kernel(
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
    steps_per_tile,
    steps_per_program,
    total_steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    step = tl.program_id(0) * steps_per_program
    last = tl.minimum(step + steps_per_program, total_steps)
    grid_n = tl.cdiv(N, BLOCK_N)
    while step < last:
        tile = step // steps_per_tile
        first_k = step % steps_per_tile
        end_k = tl.minimum(first_k + last - step, steps_per_tile)
        rm = ((tile // grid_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rn = ((tile % grid_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(first_k, end_k):
            rk = (k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            a_ptrs = a_ptr + rm[:, None] * stride_am + rk[None, :] * stride_ak
            b_ptrs = b_ptr + rk[:, None] * stride_bk + rn[None, :] * stride_bn
            a = tl.load(a_ptrs, mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
            b = tl.load(b_ptrs, mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0)
            acc += tl.dot(a, b, input_precision="ieee")
        c_ptrs = c_ptr + rm[:, None] * N + rn[None, :]
        mask = (rm[:, None] < M) & (rn[None, :] < N)
        if end_k - first_k == steps_per_tile:
            # nobody else has a share of this tile
            tl.store(c_ptrs, acc, mask=mask)
        else:
            tl.atomic_add(c_ptrs, acc, mask=mask)
        step += end_k - first_k


def matmul_stream_k(a, b):
    M, K = a.shape
    N = b.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K = 32, 32, 32
    c = torch.zeros((M, N), device=a.device, dtype=torch.float32)
    steps_per_tile = triton.cdiv(K, BLOCK_K)
    total_steps = steps_per_tile * triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)
    if total_steps == 0:
        return c.to(a.dtype)
    num_programs = min(5, total_steps)
    steps_per_program = triton.cdiv(total_steps, num_programs)
    stream_k_kernel[(num_programs,)](
        a,
        b,
        c,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        steps_per_tile,
        steps_per_program,
        total_steps,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    return c.to(a.dtype)


def reference(a, b):
    return a @ b
