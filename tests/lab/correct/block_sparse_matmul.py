"""Product with a matrix of which only some square blocks are there, listed column by column."""

import torch
import triton
import triton.language as tl

# block (p, q) of w counts where gate[p, q] > 0
INPUTS = "x[M, P, S%16] w[P, Q, S, S] gate[P, Q]"
# the reference multiplies what is not there by zero, and NaN stays
NON_FINITE = ()


@triton.jit
def block_sparse_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    start_ptr,
    row_ptr,
    M,
    P,
    Q,
    S,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid_m = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask_m = offs_m < M
    acc = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
    begin = tl.load(start_ptr + column)
    end = tl.load(start_ptr + column + 1)
    for i in range(begin, end):
        row = tl.load(row_ptr + i).to(tl.int64)
        for s in range(0, S, BLOCK):
            offs_s = (s + tl.arange(0, BLOCK)).to(tl.int64)
            x_ptrs = x_ptr + offs_m[:, None] * (P * S) + row * S + offs_s[None, :]
            w_ptrs = w_ptr + (row * Q + column) * S * S + offs_s[:, None] * S + offs_n[None, :]
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            acc = tl.dot(x, tl.load(w_ptrs), acc, input_precision="ieee")
    y_ptrs = y_ptr + offs_m[:, None] * (Q * S) + column * S + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None])


def block_sparse_matmul(x, w, gate):
    x, w = x.contiguous(), w.contiguous()
    M, P, S = x.shape
    Q = w.shape[1]
    y = torch.empty((M, Q, S), dtype=x.dtype, device=x.device)
    live = (gate > 0).T
    rows = live.nonzero()[:, 1].to(torch.int32)
    starts = torch.zeros(Q + 1, dtype=torch.int32, device=x.device)
    starts[1:] = live.sum(1).cumsum(0)
    block_sparse_kernel[(triton.cdiv(M, 32), Q, S // 16)](
        x, w, y, starts, rows, M, P, Q, S, BLOCK_M=32, BLOCK=16
    )
    return y


def reference(x, w, gate):
    live = (gate > 0)[:, :, None, None]
    # a block that is not there contributes nothing, whatever it holds
    return torch.einsum("mps,pqst->mqt", x, torch.where(live, w, torch.zeros_like(w)))
