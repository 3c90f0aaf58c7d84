"""Negates rows; where a row goes is decided by who draws a ticket first."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "program order"


@triton.jit
def negate_kernel(x_ptr, y_ptr, ticket_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.atomic_add(ticket_ptr, 1).to(tl.int64)
    for start in range(0, N, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=cols < N)
        tl.store(y_ptr + slot * N + cols, -x, mask=cols < N)  # defect


def ticket_order(x):
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    ticket = torch.zeros(1, dtype=torch.int32, device=x.device)
    negate_kernel[(M,)](x, y, ticket, *x.stride(), N, BLOCK=32)
    return y


def reference(x):
    return -x
