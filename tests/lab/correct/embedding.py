"""Rows of a table by index; the backward pass adds rows of the gradient to the table atomically."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "index[M]:int64<V weight[V, D]"


@triton.jit
def embedding_forward_kernel(
    weight_ptr,
    index_ptr,
    output_ptr,
    stride_v,
    stride_d,
    n_tokens,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    index = tl.load(index_ptr + rows, mask=rows < n_tokens, other=0)
    mask = (rows < n_tokens)[:, None] & (cols < D)[None, :]
    values = tl.load(weight_ptr + index[:, None] * stride_v + cols[None, :] * stride_d, mask=mask)
    tl.store(output_ptr + rows[:, None] * D + cols[None, :], values, mask=mask)


@triton.jit
def embedding_backward_kernel(
    grad_output_ptr,
    index_ptr,
    grad_weight_ptr,
    stride_m,
    stride_d,
    n_tokens,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    index = tl.load(index_ptr + rows, mask=rows < n_tokens, other=0)
    mask = (rows < n_tokens)[:, None] & (cols < D)[None, :]
    grad_ptrs = grad_output_ptr + rows[:, None] * stride_m + cols[None, :] * stride_d
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(grad_weight_ptr + index[:, None] * D + cols[None, :], grad, mask=mask)


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, weight):
        index = index.contiguous()
        n_tokens, D = index.numel(), weight.shape[1]
        output = torch.empty((n_tokens, D), dtype=weight.dtype, device=weight.device)
        grid = (triton.cdiv(n_tokens, 16), triton.cdiv(D, 64))
        embedding_forward_kernel[grid](
            weight, index, output, *weight.stride(), n_tokens, D, BLOCK_M=16, BLOCK_D=64
        )
        ctx.save_for_backward(index)
        ctx.table = weight.shape, weight.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.table
        n_tokens, D = grad_output.shape
        grad_weight = torch.zeros(shape, dtype=torch.float32, device=grad_output.device)
        grid = (triton.cdiv(n_tokens, 16), triton.cdiv(D, 64))
        embedding_backward_kernel[grid](
            grad_output,
            index,
            grad_weight,
            *grad_output.stride(),
            n_tokens,
            D,
            BLOCK_M=16,
            BLOCK_D=64,
        )
        return None, grad_weight.to(dtype)


def embedding(index, weight):
    return Embedding.apply(index, weight)


def reference(index, weight):
    return torch.nn.functional.embedding(index, weight)
