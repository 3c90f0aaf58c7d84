"""Device helpers that several families share: program order and strided offsets."""

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
