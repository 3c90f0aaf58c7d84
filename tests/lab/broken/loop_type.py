"""Row maxima that no compiler takes: what starts as a number becomes a block in the loop."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
NON_FINITE = ()
DEFECT = "compilation"


@triton.jit
def row_max_kernel(x_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = -float("inf")
    for start in range(0, N, BLOCK):  # defect
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x_ptrs = x_ptr + row * stride_m + cols * stride_n
        x = tl.load(x_ptrs, mask=cols < N, other=-float("inf")).to(tl.float32)
        best = tl.maximum(best, x)
    tl.store(y_ptr + row, tl.max(best, axis=0).to(y_ptr.dtype.element_ty))


def loop_type(x):
    M, N = x.shape
    if N == 0:
        raise IndexError("loop_type: expects rows with at least one element")
    y = torch.empty(M, dtype=x.dtype, device=x.device)
    row_max_kernel[(M,)](x, y, *x.stride(), N, BLOCK=64)
    return y


def reference(x):
    return x.amax(1)
