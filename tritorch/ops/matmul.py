"""Matrix product and linear layer: references, launch, gradients, functions, declarations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.ops.activation import REFERENCES, ActivationBackward, needs_output
from tritorch.ops.reduce import ChannelSum, accumulator_dtype, split_sum
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("matmul")
reduce_kernels = launch.kernels("reduce")

# slices of the inner axis that one program must have before it pays to split the axis over more
# programs
_MIN_STEPS = 8


def matmul_reference(input: Tensor, other: Tensor) -> Tensor:
    """input @ other."""
    return torch.matmul(input, other)


def linear_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(input @ weight.T + bias)."""
    y = F.linear(input, weight, bias)
    return y if activation is None else REFERENCES[activation](y)


def _matmul_output(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _matmul_flops(
    a: Sequence[int],
    b: Sequence[int],
    bias: Sequence[int] | None,
    activation: str | None,
    *,
    out_shape: Sequence[int] | None = None,
) -> int:
    return 2 * math.prod(a) * b[-1]


@binding.library_op(
    "matmul(Tensor a, Tensor b, Tensor? bias, str? activation) -> Tensor",
    fake=_matmul_output,
    flops=_matmul_flops,
)
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(a @ b + bias) of two matrices, or of two equally long batches of them."""
    y = _matmul_output(a, b, bias, activation)
    _launch(a, b, bias, activation, y)
    return y


def _matmul_outputs(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    y = _matmul_output(a, b, bias, activation)
    return y, torch.empty_like(y)


@binding.library_op(
    "matmul_keeping(Tensor a, Tensor b, Tensor? bias, str activation) -> (Tensor, Tensor)",
    fake=_matmul_outputs,
    flops=_matmul_flops,
)
def _matmul_keeping(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The same, and a @ b + bias, which the gradient of some activations needs."""
    y, before = _matmul_outputs(a, b, bias, activation)
    _launch(a, b, bias, activation, y, before)
    return y, before


def _launch(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    activation: str | None,
    y: Tensor,
    before: Tensor | None = None,
) -> None:
    batch = a.shape[0] if a.dim() == 3 else 1
    (m, k), n = a.shape[-2:], b.shape[-1]
    computes = activation not in (None, "relu", "relu6", "leaky_relu")
    sizes = m, n, k, batch, a.element_size()
    config = launch.config(kernels.matmul_config, *sizes, computes)
    block_m, block_n, block_k = (config.kwargs[f"BLOCK_{axis}"] for axis in "MNK")
    tiles = math.ceil(m / block_m) * math.ceil(n / block_n)
    steps = math.ceil(k / block_k)
    splits = reduce_kernels.num_splits(tiles * batch, steps, _MIN_STEPS)
    steps_per_split = math.ceil(steps / splits)
    splits = math.ceil(steps / steps_per_split) if steps else 1
    partial = y
    if splits > 1:
        partial = y.new_empty((splits, y.numel()), dtype=accumulator_dtype(y.dtype))
    launch.run(
        kernels.matmul_kernel,
        (tiles, batch * splits),
        a,
        b,
        bias if splits == 1 else None,
        partial,
        before if splits == 1 else None,
        m,
        n,
        k,
        steps_per_split,
        splits,
        bias.stride(0) if bias is not None else 1,
        *_batch_strides(a),
        *_batch_strides(b),
        y.numel(),
        m * n,
        n,
        on=y,
        config=config,
        ACTIVATION=activation if splits == 1 else None,
        HAS_BIAS=bias is not None and splits == 1,
        KEEPS_BEFORE=before is not None and splits == 1,
        INPUT_PRECISION=launch.input_precision(a.dtype, "matmul"),
        INDEX_64=strided.is_wide((block_m, block_k), a.stride()[-2:])
        or strided.is_wide((block_k, block_n), b.stride()[-2:]),
    )
    if splits > 1:
        split_sum(partial, y, bias, activation, before)


def _batch_strides(matrix: Tensor) -> tuple[int, ...]:
    return matrix.stride() if matrix.dim() == 3 else (0, *matrix.stride())


class Matmul(torch.autograd.Function):
    """Product of two matrices, or of two equally long batches; both gradients are products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        output: Tensor = _matmul(a, b, None, None)
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


class Linear(torch.autograd.Function):
    """activation(input @ weight.T + bias); of an activation its output is kept, and the value
    before it only where the output does not tell the derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
    ) -> Tensor:
        shape = (*input.shape[:-1], weight.shape[0])
        arguments = _rows(input), weight.t(), bias, activation
        before: Tensor | None = None
        if activation is None or needs_output(activation) or not any(ctx.needs_input_grad):
            output: Tensor = _matmul(*arguments).view(shape)
        else:
            output, before = (each.view(shape) for each in _matmul_keeping(*arguments))
        ctx.activation, ctx.keeps_before = activation, before is not None
        saved = output if activation is not None and before is None else before
        # the value before, which is no result, is known to autograd by what it is computed from
        ctx.save_for_backward(input, weight, bias if ctx.keeps_before else None, saved)
        return output

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight, bias, saved = ctx.saved_tensors
        if ctx.activation is not None:
            if ctx.keeps_before and torch.is_grad_enabled():
                # a second gradient goes through it
                saved = binding.apply(Linear, input, weight, bias, None)
            grad_output = binding.apply(ActivationBackward, grad_output, saved, ctx.activation)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = binding.apply(Linear, grad_output, weight.t(), None, None)
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(Matmul, _rows(grad_output).t(), _rows(input))
        if ctx.needs_input_grad[2]:
            grad_bias = binding.apply(ChannelSum, _rows(grad_output), 1)
        return grad_input, grad_weight, grad_bias, None


def _rows(input: Tensor) -> Tensor:
    # a view unless the leading dimensions do not merge into one stride; there torch copies too,
    # since a kernel
    # over every stride pattern of the rows would gather what one copy makes contiguous for three
    # products
    return input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input @ other, with torch.matmul's rules for vectors, matrices and broadcast batches.

    Args:
        input: (..., M, K) or (K,), any strides.
        other: (..., K, N) or (K,), the same dtype and device.

    Returns:
        (..., M, N) without the dimensions that a vector lacks, contiguous.  Sums are kept in
        float32 (float64
        for float64); float32 products use TF32 where `torch.backends.cuda.matmul` allows it.

    Raises:
        RuntimeError: inner sizes or batches that do not match, scalars, different dtypes or
        devices.

    Source: `torch.matmul`.
    """
    checks.tensor("matmul", input=input, other=other)
    if input.dim() == 0 or other.dim() == 0:
        checks.fail(
            RuntimeError, "matmul", "both arguments need a dimension", input=input, other=other
        )
    inner = other.shape[-2] if other.dim() > 1 else other.shape[0]
    if input.shape[-1] != inner:
        checks.fail(
            RuntimeError,
            "matmul",
            f"inner sizes {input.shape[-1]} and {inner} differ",
            input=input,
            other=other,
        )
    _check_batches(input, other)
    if not backend.runs_triton("matmul", input, other, declined=_declined(input, other)):
        return matmul_reference(input, other)
    a, b = binding.autocast_to_lower(input, other)
    checks.same_dtype_and_device("matmul", a, other=b)
    left, right = a.dim() == 1, b.dim() == 1
    a = a[None] if left else a
    b = b[:, None] if right else b
    if b.dim() == 2:
        y: Tensor = binding.apply(Matmul, _rows(a), b).view(*a.shape[:-1], b.shape[-1])
    else:
        y = binding.apply(Matmul, a.flatten(0, -3), b.flatten(0, -3))
        y = y.view(*a.shape[:-1], b.shape[-1])
    y = y.squeeze(-2) if left else y
    return y.squeeze(-1) if right else y


def _check_batches(input: Tensor, other: Tensor) -> None:
    pairs = zip(reversed(input.shape[:-2]), reversed(other.shape[:-2]), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        checks.fail(RuntimeError, "matmul", "batches do not broadcast", input=input, other=other)


def _declined(input: Tensor, other: Tensor) -> str | None:
    # its gradient is a sum of products over the batch, which would round every product before
    # adding it
    broadcast = other.dim() > 2 and input.shape[:-2] != other.shape[:-2]
    return "batches that broadcast" if broadcast else None


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(input @ weight.T + bias) in one kernel.

    Args:
        input: (..., in_features), any strides.
        weight: (out_features, in_features) or (in_features,).
        bias: (out_features,) or None.
        activation: None, "relu", "relu6", "leaky_relu" (of slope 0.01), "silu", "gelu",
            "gelu_tanh", "sigmoid", "tanh", "hardswish" or "hardsigmoid", applied before the result
            is rounded and stored.

    Returns:
        (..., out_features), contiguous.  Accumulation and TF32 as for `matmul`.

    Raises:
        RuntimeError: sizes that do not match, different dtypes or devices.
        ValueError: an unknown activation.

    Source: `torch.nn.functional.linear`.
    """
    checks.tensor("linear", input=input, weight=weight)
    _check_linear(input, weight, bias, activation)
    if not backend.runs_triton("linear", input, weight, bias):
        return linear_reference(input, weight, bias, activation)
    x, w, b = binding.autocast_to_lower(input, weight, bias)
    checks.same_dtype_and_device("linear", x, weight=w, bias=b)
    if w.dim() == 1:
        output: Tensor = binding.apply(Linear, x, w[None], b, activation).squeeze(-1)
    else:
        output = binding.apply(Linear, x, w, b, activation)
    return output


def _check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    if activation is not None and activation not in REFERENCES:
        rule = f"activation must be None or one of {', '.join(REFERENCES)}"
        checks.fail(ValueError, "linear", rule, received=activation)
    if weight.dim() not in (1, 2):
        checks.fail(RuntimeError, "linear", "weight must have 1 or 2 dimensions", weight=weight)
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        checks.fail(
            RuntimeError,
            "linear",
            f"weight expects {weight.shape[-1]} input features",
            input=input,
            weight=weight,
        )
    if bias is not None and (weight.dim() == 1 or bias.shape != weight.shape[:1]):
        checks.fail(
            RuntimeError,
            "linear",
            "bias must have one element for each row of a weight of two dimensions",
            bias=bias,
            weight=weight,
        )


def _matmul_samples(make: Maker) -> Iterator[Sample]:
    yield Sample("empty-rows", input=make(0, 5), other=make(5, 3))
    yield Sample("empty-inner", input=make(3, 0), other=make(0, 5))
    yield Sample("vectors", input=make(33), other=make(33))
    yield Sample("vector-matrix", input=make(7), other=make(7, 5))
    yield Sample("matrix-vector", input=make(5, 7), other=make(7))
    yield Sample("tile-edges", input=make(65, 67), other=make(67, 63), layouts=True)
    yield Sample("tiny", input=make(5, 4), other=make(4, 3), gradcheck=True)
    # more elements than one block of the sum over splits
    yield Sample("splits", input=make(41, 2100), other=make(2100, 26))
    yield Sample("batched", input=make(3, 18, 5), other=make(3, 5, 7), layouts=True)
    yield Sample("tiny-batch", input=make(2, 3, 2), other=make(2, 2, 2), gradcheck=True)
    yield Sample("leading", input=make(2, 3, 17, 5), other=make(5, 9))


def _matmul_workloads(make: Maker) -> Iterator[Sample]:
    for m, n, k in ((4096, 4096, 4096), (1000, 1000, 1000), (8, 4096, 4096), (64, 64, 65536)):
        yield Sample(f"{m}x{n}x{k}", input=make.empty(m, k), other=make.empty(k, n))
    yield Sample("transposed", input=make.empty(512, 512).t(), other=make.empty(512, 512).t())


def _matmul_rejects(make: Maker) -> Iterator[Reject]:
    yield Reject(
        "inner", r"matmul: inner sizes 3 and 4 differ.*\(2, 3\)", input=make(2, 3), other=make(4, 5)
    )
    yield Reject("scalar", r"matmul: both arguments need a dimension", input=make(), other=make(4))
    yield Reject(
        "batch",
        r"matmul: batches do not broadcast.*\(2, 3, 4\)",
        input=make(2, 3, 4),
        other=make(3, 4, 5),
    )


def _linear_samples(make: Maker) -> Iterator[Sample]:
    for name, rows, features, outputs in (
        ("one-row", (1,), 37, 35),
        ("tile-edges", (65,), 129, 63),
        ("empty", (0,), 5, 3),
        ("no-features", (3,), 0, 5),
        ("unbatched", (), 9, 7),
        ("leading", (2, 3, 5), 9, 7),
    ):
        yield Sample(
            name,
            input=make(*rows, features),
            weight=make(outputs, features),
            bias=make(outputs),
            activation=None,
            layouts=name == "tile-edges",
        )
    yield Sample("no-bias", input=make(18, 17), weight=make(19, 17), bias=None, activation=None)
    yield Sample("relu", input=make(18, 17), weight=make(19, 17), bias=make(19), activation="relu")
    yield Sample(
        "tiny",
        input=make(4, 3),
        weight=make(2, 3),
        bias=make(2),
        activation="relu",
        gradcheck=True,
    )
    yield Sample(
        "splits", input=make(3, 4099), weight=make(5, 4099), bias=make(5), activation="relu"
    )
    yield Sample("vector-weight", input=make(4, 3), weight=make(3), bias=None, activation=None)


def _linear_workloads(make: Maker) -> Iterator[Sample]:
    for rows, features, outputs in ((4096, 1024, 4096), (256, 2048, 1000), (1, 512, 512)):
        # what computes in its epilogue takes another tile where the largest would be taken
        for activation in (None, "relu", "gelu") if rows == 4096 else (None, "relu"):
            yield Sample(
                f"{rows}x{features}x{outputs}-{activation or 'identity'}",
                input=make.empty(rows, features),
                weight=make.empty(outputs, features),
                bias=make.empty(outputs),
                activation=activation,
            )


def _linear_rejects(make: Maker) -> Iterator[Reject]:
    weight, bias = make(5, 3), make(5)
    yield Reject(
        "features",
        r"linear: weight expects 3 input features.*\(2, 4\)",
        input=make(2, 4),
        weight=weight,
    )
    yield Reject(
        "bias",
        r"linear: bias must have one element for each row.*\(4,\)",
        input=make(2, 3),
        weight=weight,
        bias=make(4),
    )
    yield Reject(
        "weight-dim", r"linear: weight must have 1 or 2", input=make(2, 3), weight=make(1, 5, 3)
    )
    yield Reject(
        "activation",
        r"linear: activation must be None or one of relu, .*'softplus'",
        input=make(2, 3),
        weight=weight,
        bias=bias,
        activation="softplus",
        raises=ValueError,
    )


def _matmul_cost(input: Tensor, other: Tensor) -> dict[str, Cost]:
    y = torch.empty(input.shape, device="meta") @ torch.empty(other.shape, device="meta")
    flops = 2 * y.numel() * input.shape[-1]
    traffic = (input.numel() + other.numel() + y.numel()) * input.element_size()
    return {"forward": Cost(flops, traffic), "backward": Cost(2 * flops, 2 * traffic)}


def _linear_cost(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> dict[str, Cost]:
    return _matmul_cost(input, weight.t() if weight.dim() == 2 else weight)


register(
    OpSpec(
        name="matmul",
        op=matmul,
        reference=matmul_reference,
        kernels=("matmul.matmul_kernel", "reduce.split_sum_kernel"),
        gradients=("input", "other"),
        samples=_matmul_samples,
        workloads=_matmul_workloads,
        rejects=_matmul_rejects,
        cost=_matmul_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.matmul",
    )
)

register(
    OpSpec(
        name="linear",
        op=linear,
        reference=linear_reference,
        kernels=(
            "matmul.matmul_kernel",
            "reduce.split_sum_kernel",
            "reduce.channel_sum_kernel",
            "activation.activation_backward_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_linear_samples,
        workloads=_linear_workloads,
        rejects=_linear_rejects,
        cost=_linear_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.nn.functional.linear",
        layers=("Linear",),
    )
)
