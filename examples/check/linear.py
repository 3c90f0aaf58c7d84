"""A linear layer in half precision that passes its test: each output is right to two digits.

It sums in float16, in which every partial sum is rounded to 11 bits.  torch sums in float32 and
rounds once, so its result is several times closer to the truth, and this one gets worse with K.
"""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, K] weight[N, K]"
DTYPES = (torch.float16,)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K,
    x_stride_m, x_stride_k, w_stride_n, w_stride_k, y_stride_m, y_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float16)
    for k in range(0, K, BLOCK_K):
        ks = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * x_stride_m + ks[None, :] * x_stride_k
        w_ptrs = w_ptr + ks[:, None] * w_stride_k + cols[None, :] * w_stride_n
        x = tl.load(x_ptrs, mask=(rows[:, None] < M) & (ks[None, :] < K), other=0.0)
        w = tl.load(w_ptrs, mask=(ks[:, None] < K) & (cols[None, :] < N), other=0.0)
        acc += tl.dot(x, w, out_dtype=tl.float16)
    y_ptrs = y_ptr + rows[:, None] * y_stride_m + cols[None, :] * y_stride_n
    tl.store(y_ptrs, acc, mask=(rows[:, None] < M) & (cols[None, :] < N))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (M, K), (N, _) = x.shape, weight.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    grid = triton.cdiv(M, 32), triton.cdiv(N, 32)
    linear_kernel[grid](
        x, weight, y, M, N, K, *x.stride(), *weight.stride(), *y.stride(),
        BLOCK_M=32, BLOCK_N=32, BLOCK_K=16,
    )  # fmt: skip
    return y


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def naive_test(device: str = "cpu") -> None:
    x = torch.randn(32, 256, device=device).half()
    weight = (torch.randn(64, 256, device=device) / 16).half()
    torch.testing.assert_close(linear(x, weight), reference(x, weight), atol=1e-2, rtol=0)


if __name__ == "__main__":
    naive_test()
