"""Adds a multiple of gradients to parameters in one launch, through a table of addresses."""

import torch
import triton
import triton.language as tl

INPUTS = "p0[A] p1[B] p2[C] g0[A] g1[B] g2[C] alpha=-0.3"

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def multi_tensor_axpy_kernel(table_ptr, alpha, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    # a row of the table: two addresses, two strides, the number of elements
    row_ptr = table_ptr + tl.program_id(0) * 5
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(TYPE))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(TYPE))
    param_stride = tl.load(row_ptr + 2)
    grad_stride = tl.load(row_ptr + 3)
    size = tl.load(row_ptr + 4)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        offs = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = offs < size
        param = tl.load(param_ptr + offs * param_stride, mask=mask).to(tl.float32)
        grad = tl.load(grad_ptr + offs * grad_stride, mask=mask).to(tl.float32)
        tl.store(param_ptr + offs * param_stride, (param + alpha * grad).to(TYPE), mask=mask)


def multi_tensor(p0, p1, p2, g0, g1, g2, alpha=-0.3):
    rows = [
        (p.data_ptr(), g.data_ptr(), p.stride(0), g.stride(0), p.numel())
        for p, g in ((p0, g0), (p1, g1), (p2, g2))
    ]
    table = torch.tensor(rows, dtype=torch.int64).to(p0.device)
    multi_tensor_axpy_kernel[(len(rows), 2)](table, alpha, TYPE=TYPES[p0.dtype], BLOCK=128)


def reference(p0, p1, p2, g0, g1, g2, alpha=-0.3):
    for p, g in ((p0, g0), (p1, g1), (p2, g2)):
        p.add_(g, alpha=alpha)
