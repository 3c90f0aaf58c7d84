"""Linear layer with bias and activation; only where K has a tail do loads pay for its mask."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, K] weight[N, K] bias[N]"


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.heuristics(
    {
        "EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0,
        "HAS_BIAS": lambda args: args["bias_ptr"] is not None,
    }
)
@triton.jit
def linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rm = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rn = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = rm < M
    mask_n = rn < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        rk = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_ptrs = x_ptr + rm[:, None] * stride_xm + rk[None, :] * stride_xk
        w_ptrs = w_ptr + rk[:, None] * stride_wk + rn[None, :] * stride_wn
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & (rk < K)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :] & (rk < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        acc = gelu(acc)
    y_ptrs = y_ptr + rm[:, None] * N + rn[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def linear(x, weight, bias=None, activation="gelu"):
    M, K = x.shape
    N = weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    linear_kernel[(triton.cdiv(M, 32), triton.cdiv(N, 32))](
        x,
        weight,
        bias if bias is None else bias.contiguous(),
        y,
        M,
        N,
        K,
        *x.stride(),
        *weight.stride(),
        ACTIVATION=activation,
        BLOCK_M=32,
        BLOCK_N=32,
        BLOCK_K=32,
    )
    return y


def reference(x, weight, bias=None, activation="gelu"):
    y = torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.gelu(y) if activation == "gelu" else y
