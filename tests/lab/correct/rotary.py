"""Rotary position embedding of queries, in place: (x1, x2) turn by an angle of their position."""

import torch
import triton
import triton.language as tl

INPUTS = "q[2, T, H, D%2] cos[T, D] sin[T, D]"


@triton.jit
def rope_kernel(
    q_ptr,
    cos_ptr,
    sin_ptr,
    stride_b,
    stride_t,
    stride_h,
    stride_d,
    H,
    half,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, BLOCK_H).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = d < half
    mask = (heads < H)[:, None] & mask_d[None, :]
    angles = t * (2 * half) + d
    cos1 = tl.load(cos_ptr + angles, mask=mask_d, other=0).to(tl.float32)
    sin1 = tl.load(sin_ptr + angles, mask=mask_d, other=0).to(tl.float32)
    cos2 = tl.load(cos_ptr + angles + half, mask=mask_d, other=0).to(tl.float32)
    sin2 = tl.load(sin_ptr + angles + half, mask=mask_d, other=0).to(tl.float32)
    row_ptrs = q_ptr + b * stride_b + t * stride_t + heads[:, None] * stride_h
    first = row_ptrs + d[None, :] * stride_d
    second = row_ptrs + (d + half)[None, :] * stride_d
    q1 = tl.load(first, mask=mask, other=0).to(tl.float32)
    q2 = tl.load(second, mask=mask, other=0).to(tl.float32)
    new1 = q1 * cos1[None, :] - q2 * sin1[None, :]
    new2 = q2 * cos2[None, :] + q1 * sin2[None, :]
    tl.store(first, new1.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(second, new2.to(q_ptr.dtype.element_ty), mask=mask)


def rotary(q, cos, sin):
    B, T, H, D = q.shape
    if q.numel():
        rope_kernel[(T, B)](
            q,
            cos.contiguous(),
            sin.contiguous(),
            *q.stride(),
            H,
            D // 2,
            BLOCK_H=triton.next_power_of_2(H),
            BLOCK_D=triton.next_power_of_2(D // 2),
        )
    return q


def reference(q, cos, sin):
    half = q.shape[-1] // 2
    turned = torch.cat([-q[..., half:], q[..., :half]], dim=-1)
    q.copy_(q * cos[:, None, :] + turned * sin[:, None, :])
    return q
