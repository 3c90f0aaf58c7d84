"""Column sums under a lock that the first program never gives back."""

import torch
import triton
import triton.language as tl

INPUTS = "x[2, N] N=8"
DTYPES = (torch.float32,)
NON_FINITE = ()
DEFECT = "hang"


@triton.jit
def column_sum_kernel(x_ptr, y_ptr, lock_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=cols < N, other=0.0).to(tl.float32)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:  # defect
        pass
    y = tl.load(y_ptr + cols, mask=cols < N, other=0.0)
    tl.store(y_ptr + cols, y + x, mask=cols < N)


def held_lock(x):
    M, N = x.shape
    y = torch.zeros(N, dtype=torch.float32, device=x.device)
    lock = torch.zeros(1, dtype=torch.int32, device=x.device)
    block = max(triton.next_power_of_2(N), 1)
    column_sum_kernel[(M,)](x, y, lock, *x.stride(), N, BLOCK=block)
    return y.to(x.dtype)


def reference(x):
    return x.sum(0)
