"""Batch normalisation: its tiles, elementwise passes, and sums by split reductions.

With n = (x - mean) / sqrt(var + eps) and g the gradient of y = n weight + bias, in training

    grad_x = weight / sqrt(var + eps) (g - mean(g) - n mean(g n))

per channel; sum(g n) and sum(g) are the gradients of weight and bias.

R counts the elements of a channel: batch and pixels, in one loop nest.  A tile is BLOCK_R of these
by BLOCK_C channels.  VECTOR_R by VECTOR_C elements lie together in memory, aligned and masked as
one: of a size or a stride Triton itself sees only whether 16 divides it.
"""

import triton
import triton.language as tl
from triton import Config

from tritorch.kernels.activation import activate, activation_gradient
from tritorch.kernels.tiles import load_channels, strided_offsets, tile_mask


def tiles(rows, num_warps=8, stages=1, maxnreg=None):
    """Tiles of 64 * rows elements: three of channels along memory, one of pixels along memory."""
    options = {"num_warps": num_warps, "num_stages": 1, "maxnreg": maxnreg}
    return (
        Config({"BLOCK_R": rows, "BLOCK_C": 64, "STAGES": stages}, **options),
        Config({"BLOCK_R": 2 * rows, "BLOCK_C": 32, "STAGES": stages}, **options),
        Config({"BLOCK_R": 4 * rows, "BLOCK_C": 16, "STAGES": stages}, **options),
        # the offset of a pixel, which costs divisions, serves several channels
        Config({"BLOCK_R": 8 * rows, "BLOCK_C": 8, "STAGES": stages}, **options),
    )


# by bytes per element.  First four tiles with two 128-bit accesses a thread to each tensor, and the
# loads of three more tiles in flight to shared memory; then four for tensors without such vectors,
# whose addresses take registers; then four, with every register there is, for activations that
# compute
BATCH_NORM_CONFIGS = {
    2: (*tiles(32, 4, 4), *tiles(64), *tiles(32, maxnreg=255)),
    4: (*tiles(16, 4, 4), *tiles(64), *tiles(32, maxnreg=255)),
    8: (*tiles(8, 4, 4), *tiles(32), *tiles(16, maxnreg=255)),
}
# tiles that one program of a reduction sums at least, and one of an elementwise pass takes at most
MIN_STEPS = 2
MAX_STEPS = 4
# programs of a reduction, nearly four on each multiprocessor of an H100; of an elementwise pass,
# which fill a large GPU several times
REDUCTIONS = 512
PROGRAMS = 2048


def batch_norm_config(channels_last, channels, vector, itemsize, computes=False):
    """A tile along channels that are contiguous, no wider than they; else one along the pixels."""
    has_vectors = vector * itemsize >= 16
    # in 16 bits, tensors without vectors have the same tile where an activation computes
    kind = (1 if itemsize == 2 and has_vectors else 2) if computes else 1 - has_vectors
    configs = BATCH_NORM_CONFIGS[itemsize][4 * kind:]
    if not channels_last:
        return configs[3]
    return configs[0 if channels > 32 else 1 if channels > 16 else 2]


def num_steps(tiles):
    """Tiles that one program of an elementwise pass over `tiles` of them takes."""
    return max(1, min(MAX_STEPS, tiles // PROGRAMS))


@triton.jit
def own_tile(C, STEPS, INDEX_64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Slice, first rows and channels of this program; the channels run fastest over programs."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    num_c = tl.cdiv(C, BLOCK_C)
    split = pid // num_c
    offs_r = split * STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    return split, offs_r, pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def tile_offsets(
    offs_r, offs_c, size_1, size_2, size_3, size_4,
    stride_c, stride_0, stride_1, stride_2, stride_3, stride_4,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr,
):
    """Offsets of the tile in a tensor of those strides."""
    rows = strided_offsets(offs_r, size_1, size_2, size_3, size_4,
                           stride_0, stride_1, stride_2, stride_3, stride_4)
    offsets = rows[:, None] + (offs_c * stride_c)[None, :]
    if VECTOR_R * VECTOR_C > 1:
        offsets = tl.max_contiguous(offsets, (VECTOR_R, VECTOR_C))
        offsets = tl.multiple_of(offsets, (VECTOR_R, VECTOR_C))
    return offsets


@triton.jit
def bit_offsets(offs_r, C, R, BLOCK_C: tl.constexpr):
    """Offsets of the tile's bytes in a mask of one bit per element, (C // 64, R, 8)."""
    tl.static_assert(64 % BLOCK_C == 0, "a tile of several panels")
    first = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C
    rows = (first // 64).to(offs_r.dtype) * R + offs_r
    # if the compiler knew them to be aligned it would give a thread several bytes of one row, whose
    # channels other threads have
    return rows[:, None] * 8 + (first % 64 // 8 + tl.arange(0, BLOCK_C // 8))[None, :]


@triton.jit
def pack_bits(bits, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile's bytes, each of 8 channels from the lowest bit on."""
    bits = bits.to(tl.int32).reshape(BLOCK_R, BLOCK_C // 8, 8)
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Zeros and ones of the tile's bytes."""
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return (bits & 1).reshape(BLOCK_R, BLOCK_C)


@triton.jit
def inverse_std(var_ptr, offs_c, C, eps, DTYPE: tl.constexpr):
    """1 / sqrt(var + eps) per channel; eps is added as the float64 that it is."""
    var = load_channels(var_ptr, offs_c, C, 1.0, tl.float64)
    return 1.0 / tl.sqrt((var + eps).to(DTYPE))


@triton.jit(do_not_specialize=["R", "STEPS"])
def batch_norm_forward_kernel(
    x_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, y_ptr, bits_ptr,
    C, R, STEPS, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    residual_stride_c, residual_stride_0, residual_stride_1,
    residual_stride_2, residual_stride_3, residual_stride_4,
    y_stride_c, y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    eps: tl.float64,
    ACTIVATION: tl.constexpr, INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program normalises STEPS tiles of its channels, adds the residual and activates.

    With bits_ptr (relu only) it also writes a bit for each element: whether its gradient passes.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    _, offs_r, offs_c = own_tile(C, STEPS, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_channels(mean_ptr, offs_c, C, 0.0, ACC)
    weight = load_channels(weight_ptr, offs_c, C, 1.0, ACC)
    bias = load_channels(bias_ptr, offs_c, C, 0.0, ACC)
    scale = inverse_std(var_ptr, offs_c, C, eps, ACC) * weight
    for _ in tl.range(0, STEPS, num_stages=STAGES):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               x_stride_c, x_stride_0, x_stride_1,
                               x_stride_2, x_stride_3, x_stride_4,
                               VECTOR_R, VECTOR_C)
        deviation = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
        y = deviation * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                                   residual_stride_c, residual_stride_0, residual_stride_1,
                                   residual_stride_2, residual_stride_3, residual_stride_4,
                                   VECTOR_R, VECTOR_C)
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(ACC)
        y = activate(y, ACTIVATION).to(y_ptr.dtype.element_ty)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               y_stride_c, y_stride_0, y_stride_1,
                               y_stride_2, y_stride_3, y_stride_4,
                               VECTOR_R, VECTOR_C)
        tl.store(y_ptr + offsets, y, mask=mask)
        if bits_ptr is not None:
            # where activation_gradient lets a gradient of the output pass, which may underflow
            packed = pack_bits(tl.where(y.to(ACC) <= 0, 0, 1), BLOCK_R, BLOCK_C)
            offsets = bit_offsets(offs_r, C, R, BLOCK_C)
            tl.store(bits_ptr + offsets, packed, mask=(offs_r < R)[:, None])
        offs_r += BLOCK_R


@triton.jit
def gradient_of_sum(
    grad, y, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, DTYPE: tl.constexpr,
):
    """The gradient before the activation; y is what the activation was applied to, in float32."""
    if FROM_OUTPUT:
        # the output as stored, since it may underflow there
        y = activate(y, ACTIVATION).to(DTYPE).to(grad.dtype)
    return activation_gradient(grad, y, ACTIVATION)


@triton.jit(do_not_specialize=["R", "STEPS"])
def batch_norm_backward_reduce_kernel(
    grad_y_ptr, saved_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, masked_ptr, sums_ptr,
    C, R, STEPS, size_1, size_2, size_3, size_4,
    grad_y_stride_c, grad_y_stride_0, grad_y_stride_1,
    grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
    saved_stride_c, saved_stride_0, saved_stride_1, saved_stride_2, saved_stride_3, saved_stride_4,
    masked_stride_c, masked_stride_0, masked_stride_1,
    masked_stride_2, masked_stride_3, masked_stride_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    eps: tl.float64,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program sums grad_y and grad_y * normalised x over STEPS tiles of its channels.

    grad_y first goes back through ACTIVATION, whose operand is computed again.  saved_ptr is None
    without a residual; with one it is the output (FROM_OUTPUT), its bits (uint8) or the residual,
    and the gradient before the activation is written to masked_ptr.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split, offs_r, offs_c = own_tile(C, STEPS, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_channels(mean_ptr, offs_c, C, 0.0, ACC)
    invstd = inverse_std(var_ptr, offs_c, C, eps, ACC)
    scale = invstd * load_channels(weight_ptr, offs_c, C, 1.0, ACC)
    bias = load_channels(bias_ptr, offs_c, C, 0.0, ACC)
    grad_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    product_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for _ in tl.range(0, STEPS, num_stages=STAGES):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               grad_y_stride_c, grad_y_stride_0, grad_y_stride_1,
                               grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
                               VECTOR_R, VECTOR_C)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               x_stride_c, x_stride_0, x_stride_1,
                               x_stride_2, x_stride_3, x_stride_4,
                               VECTOR_R, VECTOR_C)
        deviation = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
        if saved_ptr is not None:
            if saved_ptr.dtype.element_ty == tl.uint8:
                offsets = bit_offsets(offs_r, C, R, BLOCK_C)
                packed = tl.load(saved_ptr + offsets, mask=(offs_r < R)[:, None], other=0)
                grad = tl.where(unpack_bits(packed, BLOCK_R, BLOCK_C) != 0, grad, 0.0)
            else:
                offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                                       saved_stride_c, saved_stride_0, saved_stride_1,
                                       saved_stride_2, saved_stride_3, saved_stride_4,
                                       VECTOR_R, VECTOR_C)
                saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0).to(ACC)
                if not FROM_OUTPUT:
                    saved += deviation * scale[None, :] + bias[None, :]
                grad = activation_gradient(grad, saved, ACTIVATION)
            offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                                   masked_stride_c, masked_stride_0, masked_stride_1,
                                   masked_stride_2, masked_stride_3, masked_stride_4,
                                   VECTOR_R, VECTOR_C)
            tl.store(masked_ptr + offsets, grad.to(masked_ptr.dtype.element_ty), mask=mask)
        elif ACTIVATION is not None:
            y = deviation * scale[None, :] + bias[None, :]
            grad = gradient_of_sum(grad, y, ACTIVATION, FROM_OUTPUT, x_ptr.dtype.element_ty)
        grad_sum += grad
        product_sum += grad * deviation
        offs_r += BLOCK_R

    row = sums_ptr + split * 2 * C + offs_c
    tl.store(row, tl.sum(grad_sum, 0), mask=offs_c < C)
    tl.store(row + C, tl.sum(product_sum, 0) * invstd, mask=offs_c < C)


@triton.jit(do_not_specialize=["R", "STEPS", "COUNT"])
def batch_norm_grad_input_kernel(
    grad_y_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, sums_ptr, grad_x_ptr,
    C, R, STEPS, size_1, size_2, size_3, size_4, COUNT,
    grad_y_stride_c, grad_y_stride_0, grad_y_stride_1,
    grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    grad_x_stride_c, grad_x_stride_0, grad_x_stride_1,
    grad_x_stride_2, grad_x_stride_3, grad_x_stride_4,
    eps: tl.float64,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, INDEX_64: tl.constexpr,
    VECTOR_R: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program computes STEPS tiles of the gradient of x; sums are None for fixed statistics."""
    ACC: tl.constexpr = tl.float64 if grad_y_ptr.dtype.element_ty == tl.float64 else tl.float32
    _, offs_r, offs_c = own_tile(C, STEPS, INDEX_64, BLOCK_R, BLOCK_C)
    mean = load_channels(mean_ptr, offs_c, C, 0.0, ACC)
    invstd = inverse_std(var_ptr, offs_c, C, eps, ACC)
    scale = invstd * load_channels(weight_ptr, offs_c, C, 1.0, ACC)
    bias = load_channels(bias_ptr, offs_c, C, 0.0, ACC)
    if sums_ptr is not None:
        grad_mean = load_channels(sums_ptr, offs_c, C, 0.0, ACC) / COUNT
        slope = load_channels(sums_ptr + C, offs_c, C, 0.0, ACC) / COUNT * invstd
    for _ in tl.range(0, STEPS, num_stages=STAGES):
        mask = tile_mask(offs_r, offs_c, R, C, VECTOR_R, VECTOR_C)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               grad_y_stride_c, grad_y_stride_0, grad_y_stride_1,
                               grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
                               VECTOR_R, VECTOR_C)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(ACC)
        if x_ptr is not None:
            offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                                   x_stride_c, x_stride_0, x_stride_1,
                                   x_stride_2, x_stride_3, x_stride_4,
                                   VECTOR_R, VECTOR_C)
            deviation = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean[None, :]
            if ACTIVATION is not None:
                y = deviation * scale[None, :] + bias[None, :]
                grad = gradient_of_sum(grad, y, ACTIVATION, FROM_OUTPUT, x_ptr.dtype.element_ty)
            if sums_ptr is not None:
                grad -= grad_mean[None, :] + deviation * slope[None, :]
        grad_x = (grad * scale[None, :]).to(grad_x_ptr.dtype.element_ty)
        offsets = tile_offsets(offs_r, offs_c, size_1, size_2, size_3, size_4,
                               grad_x_stride_c, grad_x_stride_0, grad_x_stride_1,
                               grad_x_stride_2, grad_x_stride_3, grad_x_stride_4,
                               VECTOR_R, VECTOR_C)
        tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
        offs_r += BLOCK_R
