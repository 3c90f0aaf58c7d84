"""One step of gradient descent with momentum: parameter and momentum buffer change in place."""

import torch
import triton
import triton.language as tl

INPUTS = "param[N] grad[N] momentum_buffer[N] lr=0.1 momentum=0.9 weight_decay=0.01"


@triton.jit
def sgd_kernel(
    param_ptr,
    grad_ptr,
    buf_ptr,
    param_stride,
    grad_stride,
    buf_stride,
    lr,
    momentum,
    weight_decay,
    n,
    BLOCK_SIZE: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < n
    param_ptrs = param_ptr + offs * param_stride
    buf_ptrs = buf_ptr + offs * buf_stride
    param = tl.load(param_ptrs, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + offs * grad_stride, mask=mask).to(tl.float32)
    buf = tl.load(buf_ptrs, mask=mask).to(tl.float32)
    buf = momentum * buf + grad + weight_decay * param
    param -= lr * buf
    tl.store(buf_ptrs, buf.to(buf_ptr.dtype.element_ty), mask=mask)
    tl.store(param_ptrs, param.to(param_ptr.dtype.element_ty), mask=mask)


def sgd_step(param, grad, momentum_buffer, lr=0.1, momentum=0.9, weight_decay=0.01):
    n = param.numel()
    sgd_kernel[(triton.cdiv(n, 512),)](
        param,
        grad,
        momentum_buffer,
        param.stride(0),
        grad.stride(0),
        momentum_buffer.stride(0),
        lr,
        momentum,
        weight_decay,
        n,
        BLOCK_SIZE=512,
    )


def reference(param, grad, momentum_buffer, lr=0.1, momentum=0.9, weight_decay=0.01):
    wide = [t if t.dtype == torch.float64 else t.float() for t in (param, grad, momentum_buffer)]
    buf = momentum * wide[2] + wide[1] + weight_decay * wide[0]
    momentum_buffer.copy_(buf)
    param.copy_(wide[0] - lr * buf)
