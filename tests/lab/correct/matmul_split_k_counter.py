"""Matrix product with K split over programs: each writes its share, the last to finish adds them.

Unlike atomic addition this gives the same bits every time.  The counters are zero again at the end,
so that one buffer serves every call.
"""

import torch
import triton
import triton.language as tl

INPUTS = "a[M, K] b[K, N]"


@triton.jit
def split_k_counter_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    partial_ptr,
    counter_ptr,
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
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_k = tl.program_id(2)
    rm = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(pid_k * BLOCK_K, K, BLOCK_K * SPLIT_K):
        rk = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_mask = (rm[:, None] < M) & (rk[None, :] < K)
        b_mask = (rk[:, None] < K) & (rn[None, :] < N)
        a = tl.load(a_ptr + rm[:, None] * stride_am + rk[None, :] * stride_ak, mask=a_mask, other=0)
        b = tl.load(b_ptr + rk[:, None] * stride_bk + rn[None, :] * stride_bn, mask=b_mask, other=0)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    tile = (pid_m * tl.num_programs(1) + pid_n).to(tl.int64)
    lanes = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    partial_ptrs = partial_ptr + tile * (SPLIT_K * BLOCK_M * BLOCK_N) + lanes
    tl.store(partial_ptrs + pid_k * (BLOCK_M * BLOCK_N), acc)
    # every thread has stored before the counter says so
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    if arrived == SPLIT_K - 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(SPLIT_K):
            total += tl.load(partial_ptrs + k * (BLOCK_M * BLOCK_N))
        mask = (rm[:, None] < M) & (rn[None, :] < N)
        c_ptrs = c_ptr + rm[:, None] * N + rn[None, :]
        tl.store(c_ptrs, total.to(c_ptr.dtype.element_ty), mask=mask)
        tl.atomic_xchg(counter_ptr + tile, 0)


_counters: dict[torch.device, torch.Tensor] = {}


def counters(num_tiles, device):
    if device not in _counters or _counters[device].numel() < num_tiles:
        _counters[device] = torch.zeros(max(num_tiles, 64), dtype=torch.int32, device=device)
    return _counters[device]


def matmul_split_k_counter(a, b):
    M, K = a.shape
    _, N = b.shape
    BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K = 32, 32, 16, 4
    c = torch.empty((M, N), device=a.device, dtype=a.dtype)
    grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N), SPLIT_K)
    num_tiles = grid[0] * grid[1]
    partial = torch.empty(
        (num_tiles, SPLIT_K, BLOCK_M, BLOCK_N), device=a.device, dtype=torch.float32
    )
    split_k_counter_kernel[grid](
        a,
        b,
        c,
        partial,
        counters(num_tiles, a.device),
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        SPLIT_K=SPLIT_K,
    )
    return c


def reference(a, b):
    return a @ b
