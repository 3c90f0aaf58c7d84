"""Causal depthwise convolution of sequences with SiLU, forward and backward."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "x[L, C] weight[C, 4] bias[C]"


@triton.jit
def causal_conv1d_fwd_kernel(
    x, y, pre, w, b, sx_l, sx_c, L, C, W, BL: tl.constexpr, BC: tl.constexpr
):
    o_l = (tl.program_id(0) * BL + tl.arange(0, BL)).to(tl.int64)
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    m_c = o_c < C
    m_y = (o_l < L)[:, None] & m_c[None, :]
    b_y = tl.zeros((BL, BC), dtype=tl.float32)
    b_y += tl.load(b + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    for i_w in range(W):
        o_x = o_l + i_w - W + 1
        m_x = ((o_x >= 0) & (o_x < L))[:, None] & m_c[None, :]
        b_x = tl.load(x + o_x[:, None] * sx_l + o_c[None, :] * sx_c, mask=m_x, other=0)
        b_w = tl.load(w + o_c * W + i_w, mask=m_c, other=0)
        b_y += b_x.to(tl.float32) * b_w.to(tl.float32)[None, :]
    o_y = o_l[:, None] * C + o_c[None, :]
    tl.store(pre + o_y, b_y, mask=m_y)
    tl.store(y + o_y, (b_y * tl.sigmoid(b_y)).to(y.dtype.element_ty), mask=m_y)


@triton.jit
def causal_conv1d_bwd_kernel(
    dy, pre, x, w, dx, dw, db, sx_l, sx_c, L, C, W, BL: tl.constexpr, BC: tl.constexpr
):
    i_l = tl.program_id(0).to(tl.int64)
    o_l = (i_l * BL + tl.arange(0, BL)).to(tl.int64)
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    m_c = o_c < C
    m_x = (o_l < L)[:, None] & m_c[None, :]
    b_x = tl.load(x + o_l[:, None] * sx_l + o_c[None, :] * sx_c, mask=m_x, other=0)
    b_x = b_x.to(tl.float32)
    b_dx = tl.zeros((BL, BC), dtype=tl.float32)
    for i_w in range(W):
        # where x meets tap i_w
        o_y = o_l + W - 1 - i_w
        m_y = (o_y < L)[:, None] & m_c[None, :]
        o_dy = o_y[:, None] * C + o_c[None, :]
        b_dy = tl.load(dy + o_dy, mask=m_y, other=0).to(tl.float32)
        b_pre = tl.load(pre + o_dy, mask=m_y, other=0)
        b_s = tl.sigmoid(b_pre)
        b_dy = b_dy * b_s * (1 + b_pre * (1 - b_s))
        b_w = tl.load(w + o_c * W + i_w, mask=m_c, other=0).to(tl.float32)
        b_dx += b_dy * b_w[None, :]
        # every block of positions has a slice of its own to sum into
        tl.store(dw + (i_l * C + o_c) * W + i_w, tl.sum(b_dy * b_x, 0), mask=m_c)
    o_dx = o_l[:, None] * C + o_c[None, :]
    tl.store(dx + o_dx, b_dx.to(dx.dtype.element_ty), mask=m_x)
    b_dy = tl.load(dy + o_dx, mask=m_x, other=0).to(tl.float32)
    b_pre = tl.load(pre + o_dx, mask=m_x, other=0)
    b_s = tl.sigmoid(b_pre)
    b_db = tl.sum(b_dy * b_s * (1 + b_pre * (1 - b_s)), 0)
    tl.store(db + i_l * C + o_c, b_db, mask=m_c)


class CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        weight, bias = weight.contiguous(), bias.contiguous()
        L, C = x.shape
        W = weight.shape[1]
        y = torch.empty((L, C), dtype=x.dtype, device=x.device)
        pre = torch.empty((L, C), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(L, 64), triton.cdiv(C, 32))
        causal_conv1d_fwd_kernel[grid](x, y, pre, weight, bias, *x.stride(), L, C, W, BL=64, BC=32)
        ctx.save_for_backward(x, weight, pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, pre = ctx.saved_tensors
        L, C = x.shape
        W = weight.shape[1]
        grid = (triton.cdiv(L, 64), triton.cdiv(C, 32))
        dx = torch.empty((L, C), dtype=x.dtype, device=x.device)
        dw = torch.empty((grid[0], C, W), dtype=torch.float32, device=x.device)
        db = torch.empty((grid[0], C), dtype=torch.float32, device=x.device)
        causal_conv1d_bwd_kernel[grid](
            dy.contiguous(), pre, x, weight, dx, dw, db, *x.stride(), L, C, W, BL=64, BC=32
        )
        return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype)


def causal_conv1d(x, weight, bias):
    return CausalConv1d.apply(x, weight, bias)


def reference(x, weight, bias):
    C, W = weight.shape
    padded = torch.nn.functional.pad(x.T, (W - 1, 0))
    y = torch.nn.functional.conv1d(padded, weight[:, None, :], bias, groups=C)
    return torch.nn.functional.silu(y).T
