"""Layer normalisation: launches, and its gradients in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import strided
from tritorch.ops.reduce import ChannelSum, accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("layer_norm")
reduce_kernels = launch.kernels("reduce")


class _Plan(NamedTuple):
    """How programs divide the rows."""

    # shape of the sums of long rows, without which a tile holds whole rows
    row_sums: tuple[int, int, int] | None
    # of the rows, to programs below each other
    slices: int
    run: launch.Prepared


def _plan(kernel: Any, normalized: int, *tensors: Tensor) -> _Plan:
    return _plan_of(kernel, normalized, *map(Layout.of, tensors))


@launch.planned_by_kernel
def _plan_of(kernel: Any, normalized: int, *tensors: Layout) -> _Plan:
    shape = tensors[0].shape
    split = len(shape) - normalized
    rows = strided.nest_in_order("layer_norm", shape[:split], *(t.strides[:split] for t in tensors))
    columns = strided.nest_in_order(
        "layer_norm", shape[split:], *(t.strides[split:] for t in tensors)
    )
    config = launch.config(kernels.layer_norm_config, columns.numel, tensors[0].itemsize)
    block_m, block_n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    tiles_m, tiles_n = math.ceil(rows.numel / block_m), math.ceil(columns.numel / block_n)
    steps = math.ceil(tiles_n / reduce_kernels.num_splits(tiles_m, tiles_n, kernels.MIN_STEPS))
    # of long rows, of as many tiles each
    row_slices = math.ceil(tiles_n / steps)
    below, beside = tiles_m, tiles_n
    if kernel in (kernels.layer_norm_stats_kernel, kernels.layer_norm_backward_reduce_kernel):
        beside = row_slices
    elif kernel is kernels.layer_norm_backward_kernel:
        steps = math.ceil(tiles_m / reduce_kernels.num_splits(tiles_n, tiles_m, 1))
        below = math.ceil(tiles_m / steps)
    # the rows and columns of the last tiles pass the end
    wide = max(rows.numel, columns.numel) >= 2**30 or rows.numel * columns.numel >= 2**31
    wide = wide or any(strided.is_wide(tensor.shape, tensor.strides) for tensor in tensors)
    strides: tuple[int, ...] = ()
    for along_rows, along_columns in zip(rows.strides, columns.strides, strict=True):
        strides += (*along_rows, *along_columns)
    constants = {"INDEX_64": wide, "VECTOR": _vector(rows, columns, tensors[0].itemsize)}
    if kernel in (kernels.layer_norm_forward_kernel, kernels.layer_norm_backward_kernel):
        constants["BLOCK_S"] = kernels.BLOCK_S
    sizes = (rows.numel, columns.numel, steps, row_slices, *rows.sizes[1:], *columns.sizes[1:])
    return _Plan(
        (rows.numel, row_slices, 2) if tiles_n > 1 else None,
        below,
        launch.Prepared(kernel, (below * beside,), (*sizes, *strides), config, **constants),
    )


def _vector(rows: strided.Nest, columns: strided.Nest, itemsize: int) -> int:
    """Columns, 16 bytes at most, that lie together and aligned in every tensor, dense ones too."""
    # the innermost dimension of the nest; those after it are padding of size 1
    inner = max((dim for dim, size in enumerate(columns.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in columns.strides):
        return 1
    outer = [s for along in columns.strides for dim, s in enumerate(along) if dim != inner]
    outer += [s for along in rows.strides for s in along]
    return math.gcd(16 // itemsize, columns.numel, columns.sizes[inner], *outer)


def _outputs(
    input: Tensor, normalized: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous, as torch's."""
    rows = input.shape[: input.dim() - normalized]
    mean = input.new_empty(rows, dtype=accumulator_dtype(input.dtype))
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return output, mean, torch.empty_like(mean)


@binding.library_op(
    "layer_norm_forward(Tensor input, int normalized, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def layer_norm_forward(
    input: Tensor, normalized: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and mean and 1 / sqrt(var + eps) of each row; the last `normalized` dimensions are
    the row's.
    """
    output, mean, rstd = _outputs(input, normalized, weight, bias, eps)
    plan = _plan(kernels.layer_norm_forward_kernel, normalized, input)
    statistics = None
    if plan.row_sums is not None:
        statistics = mean.new_empty(plan.row_sums)
        _plan(kernels.layer_norm_stats_kernel, normalized, input).run(input, input, statistics)
    parameters = _contiguous(weight), _contiguous(bias)
    plan.run(input, input, *parameters, statistics, output, mean, rstd, floats=(eps,))
    return output, mean, rstd


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    # of the size of one row: copying a rare strided one is cheaper than strides for each
    return None if parameter is None else parameter.contiguous()


def _grads(
    grad_output: Tensor,
    input: Tensor,
    normalized: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_input: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    row = input.shape[input.dim() - normalized :]
    return (
        input.new_empty(input.shape if of_input else (0,)),
        mean.new_empty((2, *row) if of_parameters else (0,)),
    )


@binding.library_op(
    "layer_norm_backward(Tensor grad_output, Tensor input, int normalized, Tensor? weight,"
    " Tensor mean, Tensor rstd, bool of_input, bool of_parameters) -> (Tensor, Tensor)",
    fake=_grads,
)
def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_input: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and those of bias and weight, one after the other, in float32."""
    grad_input, grads = _grads(
        grad_output, input, normalized, weight, mean, rstd, of_input, of_parameters
    )
    plan = _plan(kernels.layer_norm_backward_kernel, normalized, grad_output, input)
    tensors = grad_output, input, _contiguous(weight), mean, rstd
    row_sums = None
    if plan.row_sums is not None and of_input:
        row_sums = mean.new_empty(plan.row_sums)
        _plan(kernels.layer_norm_backward_reduce_kernel, normalized, grad_output, input).run(
            input, *tensors, row_sums
        )
    partial = grads
    if of_parameters and plan.slices > 1:
        partial = mean.new_empty((plan.slices, *grads.shape))
    written = grad_input if of_input else None, partial if of_parameters else None
    plan.run(input, *tensors, row_sums, *written)
    if partial is not grads:
        total: Tensor = binding.apply(ChannelSum, partial.view(plan.slices, -1), 1)
        grads = total.view(grads.shape)
    return grad_input, grads


def plain_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, extent: int, eps: float
) -> tuple[Tensor | None, ...]:
    """What `layer_norm_backward` computes, in plain PyTorch."""
    dtype = accumulator_dtype(input.dtype)
    row = tuple(range(-extent, 0))
    rows = tuple(range(input.dim() - extent))
    grad = grad_output.to(dtype)
    var, mean = torch.var_mean(input.to(dtype), row, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    normalised = (input.to(dtype) - mean) * rstd
    weighted = grad if weight is None else grad * weight.to(dtype)
    slope = (weighted * normalised).mean(row, True)
    grad_input = (weighted - weighted.mean(row, True) - normalised * slope) * rstd
    product = grad * normalised
    # without dimensions torch would sum over all of them
    grad_weight = product.sum(rows) if rows else product
    grad_bias = grad.sum(rows) if rows else grad
    return (
        grad_input.to(input.dtype),
        None if weight is None else grad_weight.to(weight.dtype),
        grad_bias,
    )
