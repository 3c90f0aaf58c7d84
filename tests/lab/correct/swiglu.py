"""silu(a) * b and its gradients, elementwise; the backward pass computes the sigmoid again."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "a[M, N] b[M, N]"


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def swiglu_forward_kernel(a_ptr, b_ptr, c_ptr, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = row * n_cols + tl.arange(0, BLOCK_SIZE)
    mask = tl.arange(0, BLOCK_SIZE) < n_cols
    a = tl.load(a_ptr + offsets, mask=mask, other=0).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=mask, other=0).to(tl.float32)
    tl.store(c_ptr + offsets, (silu(a) * b).to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(dc_ptr, a_ptr, b_ptr, da_ptr, db_ptr, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = row * n_cols + tl.arange(0, BLOCK_SIZE)
    mask = tl.arange(0, BLOCK_SIZE) < n_cols
    dc = tl.load(dc_ptr + offsets, mask=mask, other=0).to(tl.float32)
    a = tl.load(a_ptr + offsets, mask=mask, other=0).to(tl.float32)
    b = tl.load(b_ptr + offsets, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    da = dc * b * sigmoid * (1 + a * (1 - sigmoid))
    db = dc * a * sigmoid
    tl.store(da_ptr + offsets, da.to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + offsets, db.to(db_ptr.dtype.element_ty), mask=mask)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        c = torch.empty_like(a)
        if c.numel():
            block_size = triton.next_power_of_2(a.shape[1])
            swiglu_forward_kernel[(a.shape[0],)](a, b, c, a.shape[1], BLOCK_SIZE=block_size)
        ctx.save_for_backward(a, b)
        return c

    @staticmethod
    @once_differentiable
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        if a.numel():
            block_size = triton.next_power_of_2(a.shape[1])
            swiglu_backward_kernel[(a.shape[0],)](
                dc.contiguous(), a, b, da, db, a.shape[1], BLOCK_SIZE=block_size
            )
        return da, db


def swiglu(a, b):
    return SwiGLU.apply(a, b)


def reference(a, b):
    return torch.nn.functional.silu(a) * b
