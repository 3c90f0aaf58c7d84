"""Causal linear attention by chunks: o_t is the sum over s <= t of (q_t . k_s) v_s.

Within a chunk the scores are computed, and what came before is one matrix, the sum of k_s^T v_s.
"""

import torch
import triton
import triton.language as tl

INPUTS = "q[T, 2, 24] k[T, 2, 24] v[T, 2, E]"


@triton.jit
def chunk_linear_attn_kernel(
    q,
    k,
    v,
    o,
    T,
    H,
    D,
    E,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    i_e = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)
    m_d = o_d < D
    m_e = o_e < E
    o_i = tl.arange(0, BT)
    b_state = tl.zeros((BD, BE), dtype=tl.float32)
    for start in range(0, T, BT):
        o_t = (start + tl.arange(0, BT)).to(tl.int64)
        m_t = o_t < T
        rows = o_t * H + i_h
        m_qk = m_t[:, None] & m_d[None, :]
        m_v = m_t[:, None] & m_e[None, :]
        b_q = tl.load(q + rows[:, None] * D + o_d[None, :], mask=m_qk, other=0).to(tl.float32)
        b_k = tl.load(k + rows[:, None] * D + o_d[None, :], mask=m_qk, other=0).to(tl.float32)
        b_v = tl.load(v + rows[:, None] * E + o_e[None, :], mask=m_v, other=0).to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = tl.where(o_i[:, None] >= o_i[None, :], b_s, 0.0)
        b_o = tl.dot(b_s, b_v, input_precision="ieee")
        b_o += tl.dot(b_q, b_state, input_precision="ieee")
        b_state += tl.dot(tl.trans(b_k), b_v, input_precision="ieee")
        tl.store(o + rows[:, None] * E + o_e[None, :], b_o.to(o.dtype.element_ty), mask=m_v)


def linear_attention(q, k, v):
    q, k, v = (x.contiguous() for x in (q, k, v))
    T, H, D = q.shape
    E = v.shape[-1]
    o = torch.empty((T, H, E), dtype=q.dtype, device=q.device)
    BE = 16
    chunk_linear_attn_kernel[(triton.cdiv(E, BE), H)](
        q, k, v, o, T, H, D, E, BT=16, BD=max(16, triton.next_power_of_2(D)), BE=BE, num_warps=8
    )
    return o


# a masked score is 0 in one and absent from the other: 0 * inf is NaN
NON_FINITE = ()


def reference(q, k, v):
    scores = torch.einsum("thd,shd->hts", q, k).tril()
    return torch.einsum("hts,she->the", scores, v)
