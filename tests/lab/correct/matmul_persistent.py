"""Matrix product by persistent programs, each with descriptors of its own: a program takes every
NUM_SMS-th tile.
"""

import torch
import triton
import triton.language as tl

# a row is a multiple of 16 bytes
INPUTS = "a[M, K%8] b[N%8, K%8]"


@triton.jit
def matmul_descriptor_persistent_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    NUM_SMS: tl.constexpr,
):
    num_pid_m = tl.cdiv(M, BLOCK_SIZE_M)
    num_pid_n = tl.cdiv(N, BLOCK_SIZE_N)
    k_tiles = tl.cdiv(K, BLOCK_SIZE_K)
    num_tiles = num_pid_m * num_pid_n
    num_pid_in_group = GROUP_SIZE_M * num_pid_n
    a_desc = tl.make_tensor_descriptor(
        a_ptr, shape=[M, K], strides=[K, 1], block_shape=[BLOCK_SIZE_M, BLOCK_SIZE_K]
    )
    b_desc = tl.make_tensor_descriptor(
        b_ptr, shape=[N, K], strides=[K, 1], block_shape=[BLOCK_SIZE_N, BLOCK_SIZE_K]
    )
    c_desc = tl.make_tensor_descriptor(
        c_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_SIZE_M, BLOCK_SIZE_N]
    )
    for tile_id in tl.range(tl.program_id(0), num_tiles, NUM_SMS, flatten=True):
        group_id = tile_id // num_pid_in_group
        first_pid_m = group_id * GROUP_SIZE_M
        group_size_m = min(num_pid_m - first_pid_m, GROUP_SIZE_M)
        pid_m = first_pid_m + (tile_id % group_size_m)
        pid_n = (tile_id % num_pid_in_group) // group_size_m
        offs_am = pid_m * BLOCK_SIZE_M
        offs_bn = pid_n * BLOCK_SIZE_N
        accumulator = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
        for ki in range(k_tiles):
            a = a_desc.load([offs_am, ki * BLOCK_SIZE_K])
            b = b_desc.load([offs_bn, ki * BLOCK_SIZE_K])
            accumulator = tl.dot(a, b.T, accumulator, input_precision="ieee")
        c_desc.store([offs_am, offs_bn], accumulator.to(c_ptr.dtype.element_ty))


def alloc_fn(size: int, alignment: int, stream: int | None):
    return torch.empty(size, device="cuda", dtype=torch.int8)


def aligned(x):
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def matmul_persistent(a, b):
    assert a.is_cuda
    assert b.is_cuda
    a, b = aligned(a), aligned(b)
    M, K = a.shape
    N = b.shape[0]
    c = torch.empty((M, N), device="cuda", dtype=a.dtype)
    if K == 0:
        return c.zero_()
    if c.numel() == 0:
        return c
    # descriptors are built in memory that Triton asks for
    triton.set_allocator(alloc_fn)
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    num_tiles = triton.cdiv(M, 32) * triton.cdiv(N, 32)
    matmul_descriptor_persistent_kernel[(min(num_sms, num_tiles),)](
        a,
        b,
        c,
        M,
        N,
        K,
        BLOCK_SIZE_M=32,
        BLOCK_SIZE_N=32,
        BLOCK_SIZE_K=32,
        GROUP_SIZE_M=2,
        NUM_SMS=num_sms,
    )
    return c


def reference(a, b):
    return a @ b.T
