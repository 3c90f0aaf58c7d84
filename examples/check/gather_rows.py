"""A gather of rows that passes its test, and any test whose table is small.

An index of type int32 and a stride are 32-bit integers, and so is their product.  A row that begins
2^31 elements or more behind the first is read from before the table.
"""

import torch
import triton
import triton.language as tl

INPUTS = "table[V, D] index[M]:int32<V"


@triton.jit
def gather_rows_kernel(
    table_ptr, index_ptr, out_ptr, stride_v, stride_d, index_stride, D, BLOCK_D: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(index_ptr + m * index_stride)
    row_ptr = table_ptr + row * stride_v
    values = tl.load(row_ptr + cols.to(tl.int64) * stride_d, mask=cols < D)
    tl.store(out_ptr + m * D + cols, values, mask=cols < D)


def gather_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    M, D = index.numel(), table.shape[1]
    out = torch.empty((M, D), dtype=table.dtype, device=table.device)
    grid = M, triton.cdiv(D, 128)
    gather_rows_kernel[grid](table, index, out, *table.stride(), index.stride(0), D, BLOCK_D=128)
    return out


def reference(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[index]


def naive_test(device: str = "cpu") -> None:
    table = torch.randn(512, 128, device=device)
    index = torch.randint(512, (64,), device=device, dtype=torch.int32)
    torch.testing.assert_close(gather_rows(table, index), reference(table, index), atol=0, rtol=0)


if __name__ == "__main__":
    naive_test()
