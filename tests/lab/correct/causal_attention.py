"""Causal attention of many heads of q to one head of k and v, and the log-sum of each row.

Blocks of keys left of the diagonal need no mask, those right of it are never read.
"""

import math

import torch
import triton
import triton.language as tl

INPUTS = "q[T, 3, D] k[T, D] v[T, D]"
# exp underflows sooner in float32 than in the float64 truth: 0 * inf is NaN, tiny * inf is inf
NON_FINITE = ()


@triton.jit
def _attend(
    acc,
    l_i,
    m_i,
    q,
    K,
    V,
    stride_kt,
    stride_vt,
    offs_m,
    scale,
    lo,
    hi,
    T,
    D,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (offs_n < T)[:, None] & (offs_d < D)[None, :]
        k = tl.load(K + offs_n[:, None] * stride_kt + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(V + offs_n[:, None] * stride_vt + offs_d[None, :], mask=mask, other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            qk = tl.where(offs_m[:, None] >= offs_n[None, :], qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        alpha = tl.exp(m_i - m_new)
        p = tl.exp(qk - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def _causal_attention_fwd(
    Q,
    K,
    V,
    Out,
    Lse,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_vt,
    scale,
    T,
    H,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_m = offs_m < T
    mask_q = mask_m[:, None] & (offs_d < D)[None, :]
    q_ptrs = Q + head * stride_qh + offs_m[:, None] * stride_qt + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    diagonal = block * BLOCK_M
    end = tl.minimum(diagonal + BLOCK_M, T)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, K, V, stride_kt, stride_vt, offs_m, scale, 0, diagonal, T, D,
        False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, K, V, stride_kt, stride_vt, offs_m, scale, diagonal, end, T, D,
        True, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # the output and the log-sum are contiguous
    rows = offs_m * H + head
    out = acc / l_i[:, None]
    tl.store(Out + rows[:, None] * D + offs_d[None, :], out.to(Out.dtype.element_ty), mask=mask_q)
    tl.store(Lse + rows, m_i + tl.log(l_i), mask=mask_m)


def causal_attention(q, k, v):
    T, H, D = q.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    out = torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q.device)
    # a multiple of BLOCK_N, so that the diagonal lies in whole blocks of keys
    BLOCK_M = 16
    scale = 1 / math.sqrt(D) if D else 0.0
    _causal_attention_fwd[(triton.cdiv(T, BLOCK_M), H)](
        q,
        k,
        v,
        out,
        lse,
        *q.stride(),
        k.stride(0),
        v.stride(0),
        scale,
        T,
        H,
        D,
        BLOCK_M=BLOCK_M,
        BLOCK_N=16,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
    )
    return out, lse


def reference(q, k, v):
    T, _, D = q.shape
    scores = torch.einsum("thd,sd->hts", q, k) * (1 / math.sqrt(D) if D else 0.0)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, -math.inf)
    out = torch.einsum("hts,sd->thd", scores.softmax(-1), v)
    wide = scores if q.dtype == torch.float64 else scores.float()
    return out, wide.logsumexp(-1).T
