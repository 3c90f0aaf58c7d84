"""Causal attention with grouped queries: several heads of q share one head of k and v.

Blocks of keys left of the diagonal need no mask, those right of it are never read.
"""

import math

import torch
import triton
import triton.language as tl

INPUTS = "q[B, T, G, H, D] k[B, T, H, D] v[B, T, H, D]"
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
    mask_d = offs_d < D
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = tl.cast(start_n + tl.arange(0, BLOCK_N), tl.int64)
        mask = (offs_n < T)[:, None] & mask_d[None, :]
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
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    scale,
    T,
    G,
    H,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = head // H
    kv_head = head % H
    offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = (offs_m < T)[:, None] & (offs_d < D)[None, :]

    # q, the output and the log-sum are contiguous
    rows = ((batch * T + offs_m) * G + group) * H + kv_head
    q = tl.load(Q + rows[:, None] * D + offs_d[None, :], mask=mask_q, other=0.0)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh

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

    out = acc / l_i[:, None]
    tl.store(Out + rows[:, None] * D + offs_d[None, :], out.to(Out.dtype.element_ty), mask=mask_q)
    tl.store(Lse + rows, m_i + tl.log(l_i), mask=offs_m < T)


def causal_attention(q, k, v):
    B, T, G, H, D = q.shape
    q = q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    out = torch.empty_like(q)
    lse = torch.empty((B, T, G, H), dtype=torch.float32, device=q.device)
    if out.numel():
        # a multiple of BLOCK_N, so that the diagonal lies in whole blocks of keys
        BLOCK_M = 32
        _causal_attention_fwd[(triton.cdiv(T, BLOCK_M), G * H, B)](
            q,
            k,
            v,
            out,
            lse,
            *k.stride()[:3],
            *v.stride()[:3],
            1 / math.sqrt(D),
            T,
            G,
            H,
            D,
            BLOCK_M=BLOCK_M,
            BLOCK_N=16,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
        )
    return out, lse


def reference(q, k, v):
    scores = torch.einsum("btghd,bshd->bghts", q, k) / math.sqrt(q.shape[-1])
    T = q.shape[1]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, -math.inf)
    out = torch.einsum("bghts,bshd->btghd", scores.softmax(-1), v)
    wide = scores if q.dtype == torch.float64 else scores.float()
    return out, wide.logsumexp(-1).permute(0, 3, 1, 2)
