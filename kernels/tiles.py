"""Device helpers that several families share: program order, strided offsets, tiles of channels."""

import triton
import triton.language as tl


@triton.jit
def grouped_programs(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program, ordered in groups of GROUP_M rows so that neighbours share
    operands in L2.
    """
    num_in_group = GROUP_M * num_n
    first_m = pid // num_in_group * GROUP_M
    group_m = min(num_m - first_m, GROUP_M)
    return first_m + pid % num_in_group % group_m, pid % num_in_group // group_m


@triton.jit
def strided_offsets(
    index,
    size_1, size_2, size_3, size_4,
    stride_0, stride_1, stride_2, stride_3, stride_4,
):
    """Offset of the elements number `index` (row-major) of a tensor of up to five dimensions.

    The integer width of the offsets is that of `index`.  Unused dimensions come last with size 1,
    which Triton compiles as a constant: their divisions vanish, and a dense tensor costs nothing
    over `index` itself.
    """
    i4 = index % size_4
    index = index // size_4
    i3 = index % size_3
    index = index // size_3
    i2 = index % size_2
    index = index // size_2
    i1 = index % size_1
    i0 = index // size_1
    return i0 * stride_0 + i1 * stride_1 + i2 * stride_2 + i3 * stride_3 + i4 * stride_4


@triton.jit
def tile_mask(offs_r, offs_c, R, C, VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr):
    """Where a tile of rows and channels lies in the tensor, VECTOR_R by VECTOR_C masked as one."""
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    if VECTOR_R * VECTOR_C > 1:
        mask = tl.max_constancy(mask, (VECTOR_R, VECTOR_C))
    return mask


@triton.jit
def load_channels(ptr, offs_c, C, OTHER: tl.constexpr, DTYPE: tl.constexpr):
    """One value per channel; OTHER where there is no such tensor."""
    if ptr is None:
        values = tl.full(offs_c.shape, OTHER, DTYPE)
    else:
        values = tl.load(ptr + offs_c, mask=offs_c < C, other=OTHER).to(DTYPE)
    return values
