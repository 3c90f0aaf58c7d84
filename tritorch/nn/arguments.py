"""Arguments that similar layers pass to their ops: padded inputs, output sizes, statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import batchnorm, conv, instancenorm


def padded(layer: conv._ConvNd, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """The input padded by the layer's mode, and the zeros that the op still has to pad."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    pads = layer._reversed_padding_repeated_twice
    return F.pad(input, pads, mode=layer.padding_mode), (0,) * len(layer.stride)


def transposed(
    layer: Any, op: Callable[..., Tensor], input: Tensor, output_size: list[int] | None
) -> Tensor:
    output_padding = layer._output_padding(
        input,
        output_size,
        layer.stride,
        layer.padding,
        layer.kernel_size,
        len(layer.stride),
        layer.dilation,
    )
    return op(
        input,
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        output_padding,
        layer.groups,
        layer.dilation,
    )


def batch_norm(layer: batchnorm._BatchNorm) -> tuple[Any, ...]:
    """The arguments of `ops.batch_norm` after the input; counts the batch, as torch does, before
    the input is checked.
    """
    tracks = layer.training and layer.track_running_stats
    momentum = layer.momentum
    if tracks and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    # running statistics are passed where they are to be updated, or used
    passes = tracks or not layer.training
    return (
        layer.running_mean if passes else None,
        layer.running_var if passes else None,
        layer.weight,
        layer.bias,
        layer.training or (layer.running_mean is None and layer.running_var is None),
        0.0 if momentum is None else momentum,
        layer.eps,
    )


def instance_norm(layer: instancenorm._InstanceNorm) -> tuple[Any, ...]:
    """The arguments of `ops.instance_norm` after the input."""
    return (
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        layer.training or not layer.track_running_stats,
        0.0 if layer.momentum is None else layer.momentum,
        layer.eps,
    )
