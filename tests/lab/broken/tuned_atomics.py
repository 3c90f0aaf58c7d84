"""Column sums by atomics, tuned: every trial of a configuration adds to the result once more."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "configuration"


@triton.autotune(
    configs=[triton.Config({"BLOCK_M": 32}), triton.Config({"BLOCK_M": 64})], key=["M", "N"]
)
@triton.jit
def column_sum_kernel(
    x_ptr, y_ptr, stride_m, stride_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_m + cols[None, :] * stride_n
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(y_ptr + cols, tl.sum(x, axis=0), mask=cols < N)


def tuned_atomics(x):
    M, N = x.shape
    y = torch.zeros(N, dtype=torch.float32, device=x.device)
    column_sum_kernel[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]), triton.cdiv(N, 64))](
        x, y, *x.stride(), M, N, BLOCK_N=64
    )
    return y.to(x.dtype)


def reference(x):
    return x.sum(0)
