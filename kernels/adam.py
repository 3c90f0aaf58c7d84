"""Adam's and AdamW's step over many tensors in one launch, which finds them by their addresses.

The formulas are those of `tritorch.ops.adam_step`.
"""

import triton
import triton.language as tl
from triton import Config

# by bytes per element: one or two 128-bit loads of each of five tensors are in flight per thread
ADAM_STEP_CONFIGS = {
    2: (Config({"BLOCK": 1024}, num_warps=4),),
    4: (Config({"BLOCK": 1024}, num_warps=4),),
    8: (Config({"BLOCK": 512}, num_warps=4),),
}
# tensors per program of the bias corrections
CORRECTIONS_BLOCK = 128


def adam_step_config(itemsize):
    """Elements per program: enough to hide the look-ups, few enough to spread small models."""
    return ADAM_STEP_CONFIGS[itemsize][0]


@triton.jit
def adam_corrections_kernel(
    steps_ptr, corrections_ptr,
    TENSORS, beta1: tl.float64, beta2: tl.float64,
    BLOCK: tl.constexpr,
):
    """One program adds 1 to the steps of BLOCK tensors, at the addresses in steps_ptr, and writes
    their bias corrections 1 - beta^step: for all tensors that of beta1, then that of beta2.

    They are float64: 1 - beta would lose its digits in float32 for beta near 1.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < TENSORS
    step_ptrs = tl.load(steps_ptr + offs, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptrs, mask=mask, other=0.0) + 1.0
    tl.store(step_ptrs, step, mask=mask)
    step = step.to(tl.float64)
    # a beta of 0 corrects by 1; its logarithm is not -inf on every GPU
    correction1 = tl.where(beta1 > 0, 1.0 - tl.exp(step * tl.log(beta1)), 1.0)
    correction2 = tl.where(beta2 > 0, 1.0 - tl.exp(step * tl.log(beta2)), 1.0)
    tl.store(corrections_ptr + offs, correction1, mask=mask)
    tl.store(corrections_ptr + TENSORS + offs, correction2, mask=mask)


@triton.jit
def update_moments(
    param_address, grad_address, exp_avg_address, exp_avg_sq_address, max_exp_avg_sq_address,
    start, END,
    step_size, root_correction, beta1, gain1, beta2, gain2, eps, weight_decay,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr,
    HAS_WEIGHT_DECAY: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates the elements from `start` to END at the addresses, BLOCK of them at most."""
    ACC: tl.constexpr = step_size.dtype
    # cast here, not in the caller: what is said of an aligned pointer must not reach the other call
    param_ptr = param_address.to(tl.pointer_type(ELEMENT))
    grad_ptr = grad_address.to(tl.pointer_type(ELEMENT))
    exp_avg_ptr = exp_avg_address.to(tl.pointer_type(ELEMENT))
    exp_avg_sq_ptr = exp_avg_sq_address.to(tl.pointer_type(ELEMENT))
    max_exp_avg_sq_ptr = max_exp_avg_sq_address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        max_exp_avg_sq_ptr = tl.multiple_of(max_exp_avg_sq_ptr, 16)
    offs = start + tl.arange(0, BLOCK)
    mask = offs < END
    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(ACC)
    if MAXIMIZE:
        grad = -grad
    if HAS_WEIGHT_DECAY:
        if DECOUPLED:
            param -= weight_decay * param
        else:
            grad += weight_decay * param
    # torch's lerp: two rounded factors would push ties of a short type to one side
    change = grad - exp_avg
    exp_avg = tl.where(gain1 < 0.5, exp_avg + gain1 * change, grad - beta1 * change)
    exp_avg_sq = beta2 * exp_avg_sq + gain2 * grad * grad
    tl.store(exp_avg_ptr + offs, exp_avg.to(ELEMENT), mask=mask)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(ELEMENT), mask=mask)
    if AMSGRAD:
        largest = tl.load(max_exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(ACC)
        # NaN stays, as in torch: a maximum would drop it on a GPU
        rises = (exp_avg_sq > largest) | (exp_avg_sq != exp_avg_sq)
        exp_avg_sq = tl.where(rises, exp_avg_sq, largest)
        tl.store(max_exp_avg_sq_ptr + offs, exp_avg_sq.to(ELEMENT), mask=mask)
    param -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) / root_correction + eps)
    tl.store(param_ptr + offs, param.to(ELEMENT), mask=mask)


@triton.jit(do_not_specialize=["like_ptr", "TENSORS"])
def adam_step_kernel(
    like_ptr, owner_ptr, table_ptr, corrections_ptr,
    TENSORS,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    correction1: tl.float64, correction2: tl.float64,
    AMSGRAD: tl.constexpr, HAS_WEIGHT_DECAY: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program updates BLOCK consecutive elements of its owner, a tensor of like_ptr's type.

    The table has a column for each of TENSORS tensors: the addresses of the parameter, of its
    gradient, of the three averages, the number of elements, the first program.  With
    corrections_ptr the bias corrections are those of the tensor, else they are the scalars.
    """
    ELEMENT: tl.constexpr = like_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if ELEMENT == tl.float64 else tl.float32
    pid = tl.program_id(0)
    owner = tl.load(owner_ptr + pid)
    column = table_ptr + owner
    param_address = tl.load(column)
    grad_address = tl.load(column + TENSORS)
    exp_avg_address = tl.load(column + 2 * TENSORS)
    exp_avg_sq_address = tl.load(column + 3 * TENSORS)
    max_exp_avg_sq_address = tl.load(column + 4 * TENSORS)
    count = tl.load(column + 5 * TENSORS)
    chunk_start = (pid - tl.load(column + 6 * TENSORS)) * BLOCK
    if corrections_ptr is not None:
        correction1 = tl.load(corrections_ptr + owner)
        correction2 = tl.load(corrections_ptr + TENSORS + owner)
    addresses = param_address | grad_address | exp_avg_address | exp_avg_sq_address
    aligned = (addresses | max_exp_avg_sq_address) % 16 == 0
    count -= chunk_start
    num_bytes = chunk_start * (ELEMENT.primitive_bitwidth // 8)
    param_address += num_bytes
    grad_address += num_bytes
    exp_avg_address += num_bytes
    exp_avg_sq_address += num_bytes
    max_exp_avg_sq_address += num_bytes
    step_size = (lr / correction1).to(ACC)
    root_correction = tl.sqrt(correction2).to(ACC)
    # 1 - beta is computed in float64 and rounded once
    gain1 = (1.0 - beta1).to(ACC)
    gain2 = (1.0 - beta2).to(ACC)
    decay = (weight_decay * lr if DECOUPLED else weight_decay).to(ACC)
    beta1 = beta1.to(ACC)
    beta2 = beta2.to(ACC)
    eps = eps.to(ACC)
    if aligned & (count >= BLOCK):
        update_moments(
            param_address, grad_address, exp_avg_address, exp_avg_sq_address,
            max_exp_avg_sq_address, 0, BLOCK,
            step_size, root_correction, beta1, gain1, beta2, gain2, eps, decay,
            ELEMENT, True, AMSGRAD, HAS_WEIGHT_DECAY, DECOUPLED, MAXIMIZE, BLOCK,
        )
    else:
        # ends and misaligned slices, one element per access: small pieces cost few registers
        PIECE: tl.constexpr = BLOCK // 4
        end = tl.minimum(count, BLOCK).to(tl.int32)
        for start in range(0, end, PIECE):
            update_moments(
                param_address, grad_address, exp_avg_address, exp_avg_sq_address,
                max_exp_avg_sq_address, start, end,
                step_size, root_correction, beta1, gain1, beta2, gain2, eps, decay,
                ELEMENT, False, AMSGRAD, HAS_WEIGHT_DECAY, DECOUPLED, MAXIMIZE, PIECE,
            )
