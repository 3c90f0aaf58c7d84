"""Launches and gradients of the matrix product and of the linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import matmul_tma, reorder, strided
from tritorch.ops.activation_function import (
    computes,
    grad_preactivation,
    keeps_preactivation,
    save_product,
)
from tritorch.ops.reduce import ChannelSum, accumulator_dtype, split_sum, sum_channels
from tritorch.ops.strided import Layout

kernels = launch.kernels("matmul")
reduce_kernels = launch.kernels("reduce")

# slices of the inner axis that each program must have for split-K to pay
_MIN_STEPS = 8
# float32 operands are copied into the order that the Hopper kernel takes where there are so many
# products for each number copied (twice what the copy costs, by the estimate); and numbers that are
# copied in the time of a launch
_MIN_PRODUCTS = 512
_LAUNCH = 2**20


def _matmul_output(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _matmul_flops(
    a: Sequence[int],
    b: Sequence[int],
    bias: Sequence[int] | None,
    activation: str | None,
    residual: Sequence[int] | None = None,
    *,
    out_shape: Sequence[int] | None = None,
) -> int:
    return 2 * math.prod(a) * b[-1]


@binding.library_op(
    "matmul(Tensor a, Tensor b, Tensor? bias, str? activation, Tensor? residual=None) -> Tensor",
    fake=_matmul_output,
    flops=_matmul_flops,
)
def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(a @ b + bias + residual) of two matrices, or of equally long batches of them."""
    y = _matmul_output(a, b, bias, activation)
    _launch(a, b, bias, activation, residual, y)
    return y


def _matmul_outputs(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = _matmul_output(a, b, bias, activation)
    return y, torch.empty_like(y)


@binding.library_op(
    "matmul_keeping(Tensor a, Tensor b, Tensor? bias, str activation, Tensor? residual=None)"
    " -> (Tensor, Tensor)",
    fake=_matmul_outputs,
    flops=_matmul_flops,
)
def matmul_keeping(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the activation's input, which the gradients of some activations need."""
    y, preactivation = _matmul_outputs(a, b, bias, activation)
    _launch(a, b, bias, activation, residual, y, preactivation)
    return y, preactivation


def _matmul_and_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _matmul_output(a, b, None, None), a.new_empty(a.shape[:1])


def _summing_flops(
    a: Sequence[int], b: Sequence[int], *, out_shape: Sequence[int] | None = None
) -> int:
    return _matmul_flops(a, b, None, None)


@binding.library_op(
    "matmul_summing(Tensor a, Tensor b) -> (Tensor, Tensor)",
    fake=_matmul_and_sums,
    flops=_summing_flops,
)
def matmul_summing(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a @ b of two matrices, and the sums of the rows of a: the gradients of weight and bias of a
    linear layer, cuBLASLt's epilogue BGRADA.
    """
    y, sums = _matmul_and_sums(a, b)
    # sums of float32 would be of numbers truncated to TF32
    processors = matmul_tma.processors("ieee", a, b, y)
    plan = _plan_summing(Layout.of(a), Layout.of(b), processors)
    if plan is None:
        _launch(a, b, None, None, None, y)
        sum_channels(a, 0, sums)
    else:
        matmul_tma.run(plan, a, b, y, sums=sums)
    return y, sums


@launch.planned
def _plan_summing(a: Layout, b: Layout, processors: int) -> matmul_tma.Plan | None:
    return matmul_tma.plan_with_sums(a, b, processors) if processors else None


def _launch(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    y: Tensor,
    preactivation: Tensor | None = None,
) -> None:
    operands = (a, b, y) if residual is None else (a, b, y, residual)
    precision = launch.input_precision(a.dtype, "matmul")
    chosen = _choose(
        Layout.of(a),
        Layout.of(b),
        matmul_tma.processors(precision, *operands),
        None if bias is None else bias.stride(0),
        activation,
        preactivation is not None,
        precision,
        None if residual is None else Layout.of(residual),
    )
    if isinstance(chosen, _OfCopies):
        a = reorder.columns_first(a.mT).mT if chosen.a else a
        b = reorder.columns_first(b) if chosen.b else b
        chosen = chosen.plan
    if isinstance(chosen, matmul_tma.Plan):
        return matmul_tma.run(chosen, a, b, y, bias, activation, preactivation, None, residual)
    splits, run = chosen
    if splits == 1:
        return run(y, a, b, bias, y, preactivation, residual)
    partial = y.new_empty((splits, y.numel()), dtype=accumulator_dtype(y.dtype))
    run(y, a, b, None, partial, None, None)
    split_sum(partial, y, bias, activation, preactivation, residual)


class _OfCopies(NamedTuple):
    """A plan for operands of which these are first copied to be contiguous along the inner axis."""

    a: bool
    b: bool
    plan: matmul_tma.Plan


@launch.planned
def _choose(
    a: Layout,
    b: Layout,
    processors: int,
    bias_stride: int | None,
    activation: str | None,
    keeps_preactivation: bool,
    precision: str,
    residual: Layout | None,
) -> matmul_tma.Plan | _OfCopies | tuple[int, launch.Prepared]:
    """The first kernel that takes operands of these layouts."""
    if processors:
        hopper = matmul_tma.plan_matmul(a, b, processors, residual)
        if hopper is not None:
            return hopper
        if a.itemsize > 2 and (copies := _plan_copies(a, b, processors, residual)) is not None:
            return copies
    return _plan(a, b, bias_stride, activation, keeps_preactivation, precision, residual)


def _plan_copies(
    a: Layout, b: Layout, processors: int, residual: Layout | None
) -> _OfCopies | None:
    """A plan for the Hopper kernel on copies of float32 operands; None where they would not pay."""
    of_a, of_b = a.stride(-1) != 1, b.stride(-2) != 1
    copied = [one for one, copies in ((a, of_a), (b, of_b)) if copies]
    numbers = sum(math.prod(one.shape) for one in copied) + _LAUNCH * len(copied)
    if not copied or math.prod(a.shape) * b.shape[-1] < _MIN_PRODUCTS * numbers:
        return None
    # a copy of an expanded operand would take the memory that expanding saves
    if any(0 in one.strides for one in copied):
        return None
    given = strided.dense(a) if of_a else a, _columns_first(b) if of_b else b
    plan = matmul_tma.plan_matmul(*given, processors, residual)
    return None if plan is None else _OfCopies(of_a, of_b, plan)


def _columns_first(b: Layout) -> Layout:
    """The dense layout with contiguous columns."""
    *batch, rows, columns = b.shape
    *steps, over_columns, _ = strided.dense(Layout((*batch, columns, rows), (), b.itemsize)).strides
    return Layout(b.shape, (*steps, 1, over_columns), b.itemsize)


def _plan(
    a: Layout,
    b: Layout,
    bias_stride: int | None,
    activation: str | None,
    keeps_preactivation: bool,
    precision: str,
    residual: Layout | None = None,
) -> tuple[int, launch.Prepared]:
    """Splits of the inner axis, and the launch; split sums get their epilogue when added up."""
    batch = a.shape[0] if len(a.shape) == 3 else 1
    (m, k), n = a.shape[-2:], b.shape[-1]
    sizes = m, n, k, batch, a.itemsize
    epilogue_computes = residual is not None or computes(activation)
    config = launch.config(kernels.matmul_config, *sizes, epilogue_computes)
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
    steps = math.ceil(k / block_k)
    splits = reduce_kernels.num_splits(tiles * batch, steps, _MIN_STEPS)
    steps_per_split = math.ceil(steps / splits)
    splits = math.ceil(steps / steps_per_split) if steps else 1
    own = None
    if residual is not None and not strided.are_alike(residual, strided.dense(residual)):
        own = _batch_strides(residual)
    numbers = (
        *(m, n, k, steps_per_split, splits, 1 if bias_stride is None else bias_stride),
        *(*_batch_strides(a), *_batch_strides(b)),
        *(batch * m * n, m * n, n),
        own if splits == 1 else None,
    )
    prepared = launch.Prepared(
        kernels.matmul_kernel,
        (tiles * batch * splits,),
        numbers,
        config,
        ACTIVATION=activation if splits == 1 else None,
        HAS_BIAS=bias_stride is not None and splits == 1,
        KEEPS_PREACTIVATION=keeps_preactivation and splits == 1,
        INPUT_PRECISION=precision,
        INDEX_64=strided.is_wide((block_m, block_k), a.strides[-2:])
        or strided.is_wide((block_k, block_n), b.strides[-2:])
        or strided.is_wide((block_m, block_n), (n, 1))
        or (own is not None and strided.is_wide((block_m, block_n), own[1:])),
    )
    return splits, prepared


def _batch_strides(matrix: Layout) -> tuple[int, ...]:
    return matrix.strides if len(matrix.shape) == 3 else (0, *matrix.strides)


class Matmul(torch.autograd.Function):
    """Product of two matrices, or of two equally long batches; both gradients are products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = ctx.needs_input_grad
        binding.save_for_backward(ctx, a if of_b else None, b if of_a else None)
        output: Tensor = matmul(a, b, None, None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = binding.apply(Matmul, grad_output, b.mT)
        if ctx.needs_input_grad[1]:
            grad_b = binding.apply(Matmul, a.mT, grad_output)
        return grad_a, grad_b


class MatmulSumming(torch.autograd.Function):
    """Product of two matrices, and the sums of the rows of the first."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        of_a, of_b = ctx.needs_input_grad
        ctx.shape = a.shape
        binding.save_for_backward(ctx, a if of_b else None, b if of_a else None)
        y, sums = matmul_summing(a, b)
        return y, sums

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        of_a, of_b = ctx.needs_input_grad
        if of_a and grad_sums is not None:
            grad_a = grad_sums.unsqueeze(1).expand(ctx.shape)
        if of_a and grad_y is not None:
            grad_a = binding.apply(Linear, grad_y, b, None, grad_a, None)
        if of_b and grad_y is not None:
            grad_b = binding.apply(Matmul, a.mT, grad_y)
        return grad_a, grad_b


class Linear(torch.autograd.Function):
    """activation(input @ weight.T + bias + residual).

    For an activation the output is kept, or its input where the derivative does not follow from the
    output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        shape = (*input.shape[:-1], weight.shape[0])
        rows = None if residual is None else rows_of(residual)
        arguments = rows_of(input), weight.t(), bias, activation, rows
        preactivation: Tensor | None = None
        if keeps_preactivation(ctx, activation):
            output, preactivation = (_shaped(each, shape) for each in matmul_keeping(*arguments))
        else:
            output = _shaped(matmul(*arguments), shape)
        if not any(ctx.needs_input_grad):
            return output
        save_product(ctx, (input, weight, bias, residual), activation, output, preactivation)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *operands, saved = ctx.saved_tensors
        grad_output = grad_preactivation(
            ctx, grad_output, saved, lambda: binding.apply(Linear, *operands, None)
        )
        input, weight, *_ = operands
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = binding.apply(Linear, grad_output, weight.t(), None, None, None)
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        if of_weight and of_bias:
            products = rows_of(grad_output).t(), rows_of(input)
            grad_weight, grad_bias = binding.apply(MatmulSumming, *products)
        elif of_weight:
            grad_weight = binding.apply(Matmul, rows_of(grad_output).t(), rows_of(input))
        elif of_bias:
            grad_bias = binding.apply(ChannelSum, rows_of(grad_output), 1)
        grad_residual = grad_output if ctx.needs_input_grad[3] else None
        return grad_input, grad_weight, grad_bias, grad_residual, None


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 2:
        return rows
    # not a view: autograd forbids in-place changes of a view that a Function returns
    shaped: Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return shaped


def rows_of(input: Tensor) -> Tensor:
    # not -1, which is ambiguous where a row is empty
    rows = math.prod(input.shape[:-1])
    # a view unless the leading dimensions do not merge into one stride; then a copy, as in torch: a
    # kernel for every stride pattern would gather in three products what one copy makes contiguous
    return input.reshape(rows, input.shape[-1]) if input.dim() != 2 else input
