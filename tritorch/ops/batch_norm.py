"""Batch normalisation: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops.activation import epilogue_reference
from tritorch.ops.batch_norm_checks import check_shapes, check_statistics
from tritorch.ops.batch_norm_function import BatchNorm
from tritorch.ops.batch_norm_stages import keeps_bits
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def batch_norm_reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual)."""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return epilogue_reference(y, activation)


@repeated
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual), channel by channel.

    Args:
        input: (N, C) or (N, C, ...), any strides; float32, float16, bfloat16 or float64 for the
            kernels.  Fastest as channels_last.
        running_mean, running_var: (C,), or None in training.  Training normalises by mean and
            biased variance of the batch, and moves these two in place, by `momentum`, towards its
            mean and unbiased variance.  Evaluation normalises by them.
        weight, bias: (C,) or None.  Parameters and running statistics share one dtype: the
            input's, or float32 for an input of 16 bits.
        activation: None, "relu", "relu6", "leaky_relu" of slope 0.01, "silu", "gelu", "gelu_tanh",
            "sigmoid", "tanh", "hardswish" or "hardsigmoid".
        residual: None, or a tensor of the input's shape and dtype, added before the activation.

    Returns:
        A tensor of the input's shape, dtype and order of dimensions, rounded once.  Statistics are
        float32 (float64 for float64), summed in an order that shape and strides alone decide.

    Raises:
        ValueError: in training a single value per channel, an `eps` that is not positive, or one
            running statistic without the other; a negative `eps`; an unknown activation.
        RuntimeError: no running statistics outside training, or ones that require a gradient;
            sizes, dtypes or devices that do not match.
        IndexError: an input without channels.

    Gradients of its gradients are computed by plain PyTorch.

    Source: `torch.nn.functional.batch_norm`; https://arxiv.org/abs/1502.03167.
    """
    checks.tensor(
        "batch_norm",
        {
            "running_mean": running_mean,
            "running_var": running_var,
            "weight": weight,
            "bias": bias,
            "residual": residual,
        },
        input=input,
    )
    if type(momentum) is not float:
        momentum = checks.number("batch_norm", "momentum", momentum)
    if type(eps) is not float:
        eps = checks.number("batch_norm", "eps", eps)
    vectors = (running_mean, running_var, weight, bias)
    declined = check_shapes(
        "batch_norm",
        input.shape,
        *[None if tensor is None else tensor.shape for tensor in (residual, *vectors)],
        training,
        eps,
        activation,
    )
    running = {"running_mean": running_mean, "running_var": running_var}
    declined = check_statistics("batch_norm", training, **running) or declined
    if residual is not None:
        checks.same_dtype_and_device("batch_norm", input, residual=residual)
    # an empty input has nothing to normalise, and torch leaves the running statistics alone
    if input.numel() == 0 or not backend.runs_triton(
        "batch_norm", input, *vectors, residual, declined=declined
    ):
        return batch_norm_reference(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation=activation,
            residual=residual,
        )
    checks.parameters(
        "batch_norm",
        input,
        accumulator_dtype(input.dtype),
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    output: Tensor = binding.apply(
        BatchNorm,
        input,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        activation,
    )
    return output


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        *shape: int,
        stats: bool = True,
        affine: str = "wb",
        training: bool = True,
        eps: float = 1e-5,
        scale: float = 1.0,
        offset: float = 0.0,
        float32: bool = False,
        activation: str | None = None,
        residual: bool = False,
        **marks: bool,
    ) -> Sample:
        channels = shape[1]
        param = make.float32 if float32 and make.dtype != torch.float64 else make
        return Sample(
            name,
            input=make(*shape, scale=scale) + offset,
            running_mean=param(channels, low=-0.5, high=0.5) if stats else None,
            running_var=param(channels, low=0.5, high=1.5) if stats else None,
            weight=param(channels, low=0.5, high=1.5) if "w" in affine else None,
            bias=param(channels, low=-0.5, high=0.5) if "b" in affine else None,
            training=training,
            momentum=0.1,
            eps=eps,
            activation=activation,
            residual=make(*shape) if residual else None,
            **marks,
        )

    yield sample("fused", 3, 5, 4, 7, activation="relu", residual=True, layouts=True)
    yield sample("rows", 9, 7, activation="relu", layouts=True)
    yield sample("eval", 2, 3, 2, 3, training=False, activation="relu", residual=True, layouts=True)
    # two slices of rows that end inside a tile, two tiles of channels
    yield sample("slices", 1200 // make.dtype.itemsize, 65)
    yield sample("pixel-slices", 3, 9, 2734 // make.dtype.itemsize)
    # but in float64, two panels of the bits that relu's gradient needs
    yield sample("panels", 6, 128, activation="relu", residual=True)
    yield sample("one-channel", 67, 1, activation="relu")
    yield sample("two-values", 2, 4, eps=0.25)
    yield sample("length", 3, 17, 11, stats=False)
    yield sample("volume", 2, 3, 2, 3, 4, affine="", float32=True)
    yield sample("weight-only", 4, 33, affine="w", activation="relu")
    yield sample("bias-only", 4, 3, 5, affine="b", stats=False)
    yield sample("eval-length", 3, 2, 7, training=False)
    yield sample("eval-rows", 3, 18, training=False, affine="", activation="relu", residual=True)
    yield sample("eval-float32", 2, 3, 5, 3, training=False, float32=True)
    yield sample("float32-parameters", 5, 3, 7, 3, float32=True, activation="relu")
    if make.dtype != torch.float64:
        # where the mean costs 5 digits, the truth in float64 is good for no float64
        yield sample("far-from-zero", 300, 3, scale=0.01, offset=1000.0)
    yield sample("empty", 0, 3, 4, 4, activation="relu", residual=True)
    yield sample("tiny", 3, 2, 2, gradcheck=True)
    yield sample("tiny-fused", 2, 2, 3, activation="relu", residual=True, gradcheck=True)
    # the derivative needs the residual, and the output
    yield sample("tiny-silu", 2, 2, 2, activation="silu", residual=True, gradcheck=True)
    yield sample("tiny-sigmoid", 2, 2, 2, activation="sigmoid", residual=True, gradcheck=True)
    yield sample("tiny-eval", 2, 2, 2, training=False, activation="relu", gradcheck=True)


_WORKLOADS = (
    ("resnet50-stem", (32, 64, 112, 112)),
    ("resnet50-s1", (32, 256, 56, 56)),
    ("resnet50-s4", (32, 2048, 7, 7)),
)


def _workloads(make: Maker) -> Iterator[Sample]:
    def sample(name: str, input: Tensor, training: bool = True, **fused: Any) -> Sample:
        vector = input.new_empty((input.shape[1],), dtype=accumulator_dtype(input.dtype))
        return Sample(
            name,
            input=input,
            training=training,
            running_mean=vector,
            running_var=vector,
            weight=vector,
            bias=vector,
            **fused,
        )

    for name, shape in _WORKLOADS:
        images = make.empty(*shape)
        yield sample(name, images)
        images = images.to(memory_format=torch.channels_last)
        yield sample(f"{name}-channels-last", images)
        yield sample(f"{name}-channels-last-relu", images, activation="relu")
        residual = torch.empty_like(images)
        yield sample(f"{name}-channels-last-residual", images, activation="relu", residual=residual)
    yield sample("resnet50-s4-channels-last-eval", images, training=False, activation="relu")
    # in float64 the coefficients of erf fill the scalar registers of an AMD GPU by themselves
    gelu = "gelu_tanh" if make.dtype == torch.float64 else "gelu"
    yield sample("resnet50-s4-channels-last-gelu", images, activation=gelu)
    yield sample("rows", make.empty(4096, 1024))
    yield sample("few-channels", make.empty(64, 24, 56, 56).to(memory_format=torch.channels_last))
    yield sample("fewer-channels", make.empty(64, 16, 56, 56).to(memory_format=torch.channels_last))
    odd = make.empty(31, 67, 13, 13)
    yield sample("odd", odd, activation="relu", residual=odd)
    # what computes takes another tile
    yield sample("odd-gelu", odd, activation=gelu, residual=odd)
    odd = odd.to(memory_format=torch.channels_last)
    yield sample("odd-channels-last", odd, activation="relu", residual=odd)
    yield sample("odd-channels-last-gelu", odd, activation="gelu_tanh", residual=odd)
    odd = make.empty(31, 29, 13, 13).to(memory_format=torch.channels_last)
    yield sample("few-odd-channels", odd, activation="relu", residual=odd)


def _rejects(make: Maker) -> Iterator[Reject]:
    def reject(name: str, message: str, *shape: int, **arguments: Any) -> Reject:
        given = {"input": make(*shape), "running_mean": make(3), "running_var": make(3)}
        return Reject(name, message, **(given | arguments))

    training: Any = {"training": True}
    none: Any = {"running_mean": None, "running_var": None}
    yield reject("one-value", r"more than one value.*\(1, 3, 1\)", 1, 3, 1, **training)
    yield reject("eps", r"eps must be positive in training \(eps 0.0\)", 4, 3, eps=0.0, **training)
    # of which torch makes NaN, or refuses it, as its version is
    yield reject("eps-eval", r"eps must not be negative", 4, 3, eps=-0.1, raises=ValueError)
    yield reject("no-statistics", r"running statistics are needed", 4, 3, **none)
    yield reject("mean-alone", r"must both be tensors", 4, 3, running_var=None, **training)
    yield reject("mean-alone-eval", r"must both be tensors", 4, 3, running_var=None)
    for name in ("running_mean", "running_var", "weight", "bias"):
        wrong: Any = {name: make(2)}
        yield reject(f"{name}-size", rf"{name} must have 3 elements.*\(2,\)", 4, 3, **wrong)
    yield reject("vector", r"running_mean must have 0 elements", 3)
    yield reject("no-channels", r"a batch and a channel dimension", 3, **none, **training)
    yield reject("momentum", r"momentum must be a number", 4, 3, momentum=None, **training)
    learned = make(3).requires_grad_()
    yield reject("gradient", r"running_mean cannot require", 4, 3, running_mean=learned)
    mixed = make(3).double()
    yield reject("dtypes", r"must share|dtype", 4, 3, weight=mixed)
    yield reject("residual-shape", r"residual must have", 4, 3, residual=make(2, 3))
    # torch accepts these
    yield reject(
        "expanded-mean",
        r"an expanded tensor cannot be written",
        4,
        3,
        running_mean=make(1).expand(3),
        raises=RuntimeError,
        **training,
    )
    yield reject(
        "residual-dtype",
        r"expected residual of the input's dtype",
        4,
        3,
        residual=make(4, 3).double(),
        raises=RuntimeError,
    )
    yield reject("activation", r"None or one of relu", 4, 3, activation="elu", raises=ValueError)


def _cost(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> dict[str, Cost]:
    """All gradients wanted; counts how often a tensor of the input's size is read or written."""
    size = input.numel() * input.element_size()
    forward = 2 + training + (residual is not None)
    # read by the sums, read and written by the gradient, which needs the input or does not
    from_output = activation is not None and residual is not None
    from_input = activation is not None and residual is None
    backward = 2 + 2 + (training or from_input) + 2 * from_output
    # written and read in place of reading the output
    in_bits = residual is not None and keeps_bits(input, residual, activation)
    bits = in_bits * input.numel() // 8
    return {
        "forward": Cost((4 + 4 * training) * input.numel(), forward * size + bits),
        "backward": Cost(10 * input.numel(), (backward - in_bits) * size + bits),
    }


register(
    OpSpec(
        name="batch_norm",
        op=batch_norm,
        reference=batch_norm_reference,
        kernels=(
            "batch_norm_stats.batch_norm_stats_kernel",
            "batch_norm_stats.batch_norm_gather_stats_kernel",
            "batch_norm.batch_norm_forward_kernel",
            "batch_norm.batch_norm_backward_reduce_kernel",
            "batch_norm.batch_norm_grad_input_kernel",
            "reduce.channel_sum_kernel",
            "reduce.split_sum_kernel",
            "activation.activation_backward_kernel",
        ),
        gradients=("input", "weight", "bias", "residual"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.batch_norm, https://arxiv.org/abs/1502.03167",
        mutates=("running_mean", "running_var"),
        layers=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
    )
)
