"""ReLU by a maximum, which on a GPU is the number where the other operand is NaN."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
DEFECT = "special values"


@triton.jit
def relu_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N)
    y = tl.maximum(x, 0.0)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < N)  # defect


def dropped_nan(x):
    N = x.numel()
    y = torch.empty(N, dtype=x.dtype, device=x.device)
    relu_kernel[(triton.cdiv(N, 256),)](x, y, x.stride(0), N, BLOCK=256)
    return y


def reference(x):
    return torch.relu(x)
