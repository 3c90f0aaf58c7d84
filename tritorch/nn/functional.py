"""torch.nn.functional with kernels: `tritorch.ops` with torch's signatures, the rest is torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from tritorch import ops
from tritorch.ops import adaptive_avg_pool1d as adaptive_avg_pool1d
from tritorch.ops import adaptive_avg_pool2d as adaptive_avg_pool2d
from tritorch.ops import adaptive_avg_pool3d as adaptive_avg_pool3d
from tritorch.ops import adaptive_max_pool2d as adaptive_max_pool2d
from tritorch.ops import avg_pool1d as avg_pool1d
from tritorch.ops import avg_pool2d as avg_pool2d
from tritorch.ops import avg_pool3d as avg_pool3d
from tritorch.ops import batch_norm as batch_norm
from tritorch.ops import conv1d as conv1d
from tritorch.ops import conv2d as conv2d
from tritorch.ops import conv3d as conv3d
from tritorch.ops import conv_transpose1d as conv_transpose1d
from tritorch.ops import conv_transpose2d as conv_transpose2d
from tritorch.ops import conv_transpose3d as conv_transpose3d
from tritorch.ops import dropout as dropout
from tritorch.ops import gelu as gelu
from tritorch.ops import group_norm as group_norm
from tritorch.ops import hardsigmoid as hardsigmoid
from tritorch.ops import hardswish as hardswish
from tritorch.ops import huber_loss as huber_loss
from tritorch.ops import instance_norm as instance_norm
from tritorch.ops import layer_norm as layer_norm
from tritorch.ops import leaky_relu as leaky_relu
from tritorch.ops import linear as linear
from tritorch.ops import max_pool1d as max_pool1d
from tritorch.ops import max_pool2d as max_pool2d
from tritorch.ops import max_pool3d as max_pool3d
from tritorch.ops import relu as relu
from tritorch.ops import relu6 as relu6
from tritorch.ops import sigmoid as sigmoid
from tritorch.ops import silu as silu
from tritorch.ops import tanh as tanh

# what `from tritorch.nn.functional import *` brings: torch's names, for none of ours has another
__all__ = [name for name in dir(F) if not name.startswith("_")]

Ints = int | list[int] | tuple[int, ...]


def __getattr__(name: str) -> Any:
    return getattr(F, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(F)})


def relu_(input: Tensor) -> Tensor:
    return ops.relu(input, inplace=True)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return ops.leaky_relu(input, negative_slope, inplace=True)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    return ops.softmax(input, dim, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    return ops.log_softmax(input, dim, dtype)


def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool1d` with indices whatever `return_indices` says, as in torch."""
    output, indices = ops.max_pool1d(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    return output, indices


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool2d` with indices whatever `return_indices` says, as in torch."""
    output, indices = ops.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    return output, indices


def max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`max_pool3d` with indices whatever `return_indices` says, as in torch."""
    output, indices = ops.max_pool3d(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    return output, indices


def adaptive_max_pool2d_with_indices(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool2d` with indices whatever `return_indices` says, as in torch."""
    output, indices = ops.adaptive_max_pool2d(input, output_size, return_indices=True)
    return output, indices


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """What torch makes of the two arguments that it deprecates, with its warning."""
    if size_average is None and reduce is None:
        return reduction
    return legacy_get_string(size_average, reduce)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.cross_entropy(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.nll_loss(
        input, target, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.mse_loss(input, target, reduction=reduction, weight=weight)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.l1_loss(input, target, reduction=reduction, weight=weight)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.smooth_l1_loss(input, target, reduction=reduction, beta=beta)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.binary_cross_entropy(input, target, weight=weight, reduction=reduction)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    reduction = _reduction(size_average, reduce, reduction)
    return ops.binary_cross_entropy_with_logits(
        input, target, weight=weight, reduction=reduction, pos_weight=pos_weight
    )
