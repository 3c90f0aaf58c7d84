"""What a convolution computes and moves at least, pass by pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tritorch.registry import Cost


def of_convolution(
    input: Tensor,
    weight: Tensor,
    output: Sequence[int],
    stride: int | Sequence[int],
) -> dict[str, Cost]:
    """Of a call with an output of this shape.

    A filter that is smaller than its stride passes over pixels, which are never read but have a
    gradient all the same.
    """
    axes = weight.dim() - 2
    strides = [stride] * axes if isinstance(stride, int) else list(stride) * axes
    read = math.prod(input.shape[:-axes])
    for size, out, taps, step in zip(
        input.shape[-axes:], output[-axes:], weight.shape[2:], strides[:axes], strict=True
    ):
        read *= min(size, out * taps) if step > taps else size
    outputs, itemsize = math.prod(output), input.element_size()
    flops = 2 * outputs * math.prod(weight.shape[1:])
    rest = weight.numel() + outputs
    forward = Cost(flops, (read + rest) * itemsize)
    grad_input = Cost(flops, (input.numel() + rest) * itemsize)
    both = Cost(2 * flops, forward.bytes + grad_input.bytes)
    return {
        "forward": forward,
        "backward": both,
        "grad_input": grad_input,
        # reads what the forward pass reads
        "grad_weight": forward,
    }
