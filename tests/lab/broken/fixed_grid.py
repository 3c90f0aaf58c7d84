"""Row sums whose grid suits the first configuration of the two that are tuned over."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "configuration"


@triton.autotune(
    configs=[triton.Config({"BLOCK_M": 16}), triton.Config({"BLOCK_M": 8})], key=["M", "N"]
)
@triton.jit
def row_sum_kernel(
    x_ptr, y_ptr, stride_m, stride_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_m + cols[None, :] * stride_n
        mask = (rows[:, None] < M) & (cols[None, :] < N)
        acc += tl.sum(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), axis=1)
    tl.store(y_ptr + rows, acc.to(y_ptr.dtype.element_ty), mask=rows < M)


def fixed_grid(x):
    M, N = x.shape
    y = torch.empty(M, dtype=x.dtype, device=x.device)
    row_sum_kernel[(triton.cdiv(M, 16),)](x, y, *x.stride(), M, N, BLOCK_N=64)
    return y


def reference(x):
    return x.sum(1)
