"""The functions of torch's top level that have kernels, with torch's signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from tritorch import ops
from tritorch.ops import conv1d as conv1d
from tritorch.ops import conv2d as conv2d
from tritorch.ops import conv3d as conv3d
from tritorch.ops import conv_transpose1d as conv_transpose1d
from tritorch.ops import conv_transpose2d as conv_transpose2d
from tritorch.ops import conv_transpose3d as conv_transpose3d


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`tritorch.ops.matmul`; with `out`, which the kernels do not write to, torch's own."""
    return ops.matmul(input, other) if out is None else torch.matmul(input, other, out=out)


def relu(input: Tensor) -> Tensor:
    """`tritorch.ops.relu`."""
    return ops.relu(input)


def relu_(input: Tensor) -> Tensor:
    """`tritorch.ops.relu` in place."""
    return ops.relu(input, inplace=True)


def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`tritorch.ops.sigmoid`; with `out` torch's own."""
    return ops.sigmoid(input) if out is None else torch.sigmoid(input, out=out)


def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`tritorch.ops.tanh`; with `out` torch's own."""
    return ops.tanh(input) if out is None else torch.tanh(input, out=out)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`tritorch.ops.softmax`."""
    return ops.softmax(input, dim, dtype)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`tritorch.ops.log_softmax`."""
    return ops.log_softmax(input, dim, dtype)


def dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """`tritorch.ops.dropout`."""
    return ops.dropout(input, p, train)
