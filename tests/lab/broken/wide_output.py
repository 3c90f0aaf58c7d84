"""Square roots of absolute values, in float32 whatever the input's dtype."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
NON_FINITE = ()
DEFECT = "shape"


@triton.jit
def root_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, tl.sqrt(tl.abs(x)), mask=offs < N)


def wide_output(x):
    N = x.numel()
    y = torch.empty(N, dtype=torch.float32, device=x.device)  # defect
    root_kernel[(triton.cdiv(N, 256),)](x, y, x.stride(0), N, BLOCK=256)
    return y


def reference(x):
    return x.abs().sqrt()
