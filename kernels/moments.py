"""Mean and squared deviations: of a tile in registers, of what a program has summed."""

import triton
import triton.language as tl


@triton.jit
def store_moments(moments_ptr, values, inside, count, offs, mask, C, AXIS: tl.constexpr):
    """Writes mean, squared deviations and count over the AXIS of a tile, three rows of C channels.

    Of AXIS count those that are `inside`, `count` of them; `offs` are the channels, `mask` says
    which exist.  Deviations are from the mean itself: far from zero squares would cancel.
    """
    inside = tl.expand_dims(inside, 1 - AXIS)
    values = tl.where(inside, values.to(tl.float32), 0.0)
    count = count.to(tl.float32)
    mean = tl.sum(values, AXIS) / count
    deviations = tl.where(inside, values - tl.expand_dims(mean, AXIS), 0.0)
    squares = tl.sum(deviations * deviations, AXIS)
    tl.store(moments_ptr + offs, mean, mask=mask)
    tl.store(moments_ptr + C + offs, squares, mask=mask)
    tl.store(moments_ptr + 2 * C + offs, tl.zeros_like(squares) + count, mask=mask)


@triton.jit
def shifted_moments(sum1, sum2, shift, count, AXIS: tl.constexpr):
    """Mean and squared deviations over AXIS of `count` elements, from the sums of their deviations
    from `shift` and of the squares of those.
    """
    total = tl.sum(sum1, AXIS)
    drift = total / count
    # not total * total, which passes float32 long before the squares do
    return shift + drift, tl.sum(sum2, AXIS) - total * drift
