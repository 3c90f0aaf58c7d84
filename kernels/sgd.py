"""SGD's step over many tensors in one launch, which finds them by a table of addresses.

The formulas are those of `tritorch.ops.sgd_step`.
"""

import triton
import triton.language as tl
from triton import Config

# by bytes per element: a few 128-bit loads of each of three tensors are in flight per thread
SGD_STEP_CONFIGS = {
    2: (Config({"BLOCK": 2048}, num_warps=4),),
    4: (Config({"BLOCK": 2048}, num_warps=4),),
    8: (Config({"BLOCK": 1024}, num_warps=4),),
}


def sgd_step_config(itemsize):
    """Elements per program: enough to hide the look-ups, few enough to spread small models."""
    return SGD_STEP_CONFIGS[itemsize][0]


@triton.jit
def update_chunk(
    param_address, grad_address, buffer_address, start, END,
    lr, momentum, gain, weight_decay, first,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    HAS_WEIGHT_DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates the elements from `start` to END at the addresses, BLOCK of them at most.

    `gain` is 1 - dampening; where `first` is not 0 the buffer is new.
    """
    ACC: tl.constexpr = lr.dtype
    # cast here, not in the caller: what is said of an aligned pointer must not reach the other call
    param_ptr = param_address.to(tl.pointer_type(ELEMENT))
    grad_ptr = grad_address.to(tl.pointer_type(ELEMENT))
    buffer_ptr = buffer_address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        buffer_ptr = tl.multiple_of(buffer_ptr, 16)
    offs = start + tl.arange(0, BLOCK)
    mask = offs < END
    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)
    if HAS_MOMENTUM:
        # the memory of a new buffer holds anything, NaN included
        buffer = tl.load(buffer_ptr + offs, mask=mask & (first == 0), other=0.0).to(ACC)
    if MAXIMIZE:
        grad = -grad
    if HAS_WEIGHT_DECAY:
        grad += weight_decay * param
    if HAS_MOMENTUM:
        buffer = momentum * buffer + gain * grad
        tl.store(buffer_ptr + offs, buffer.to(ELEMENT), mask=mask)
        if NESTEROV:
            grad += momentum * buffer
        else:
            grad = buffer
    param -= lr * grad
    tl.store(param_ptr + offs, param.to(ELEMENT), mask=mask)


@triton.jit(do_not_specialize=["like_ptr", "TENSORS", "first"])
def sgd_step_kernel(
    like_ptr, owner_ptr, table_ptr,
    TENSORS, first,
    lr: tl.float64, momentum: tl.float64, gain: tl.float64, weight_decay: tl.float64,
    HAS_MOMENTUM: tl.constexpr, HAS_WEIGHT_DECAY: tl.constexpr,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program updates BLOCK consecutive elements of its owner, a tensor of like_ptr's type.

    The table has a column for each of TENSORS tensors: the addresses of the parameter, of its
    gradient and of its momentum buffer, the number of elements, the first program.
    """
    ELEMENT: tl.constexpr = like_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if ELEMENT == tl.float64 else tl.float32
    pid = tl.program_id(0)
    column = table_ptr + tl.load(owner_ptr + pid)
    param_address = tl.load(column)
    grad_address = tl.load(column + TENSORS)
    buffer_address = tl.load(column + 2 * TENSORS)
    count = tl.load(column + 3 * TENSORS)
    chunk_start = (pid - tl.load(column + 4 * TENSORS)) * BLOCK
    aligned = (param_address | grad_address | buffer_address) % 16 == 0
    count -= chunk_start
    num_bytes = chunk_start * (ELEMENT.primitive_bitwidth // 8)
    param_address += num_bytes
    grad_address += num_bytes
    buffer_address += num_bytes
    lr = lr.to(ACC)
    momentum = momentum.to(ACC)
    gain = gain.to(ACC)
    weight_decay = weight_decay.to(ACC)
    if aligned & (count >= BLOCK):
        update_chunk(
            param_address, grad_address, buffer_address, 0, BLOCK,
            lr, momentum, gain, weight_decay, first,
            ELEMENT, True, HAS_MOMENTUM, HAS_WEIGHT_DECAY, NESTEROV, MAXIMIZE, BLOCK,
        )
    else:
        # ends and misaligned slices, one element per access: small pieces cost few registers
        PIECE: tl.constexpr = BLOCK // 4
        end = tl.minimum(count, BLOCK).to(tl.int32)
        for start in range(0, end, PIECE):
            update_chunk(
                param_address, grad_address, buffer_address, start, end,
                lr, momentum, gain, weight_decay, first,
                ELEMENT, False, HAS_MOMENTUM, HAS_WEIGHT_DECAY, NESTEROV, MAXIMIZE, PIECE,
            )
