"""Group normalisation: reference, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import strided
from tritorch.ops.layer_and_group_norm import Norm
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def group_norm_reference(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the channels of a group."""
    return F.group_norm(input, num_groups, weight, bias, eps)


@repeated
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the channels of a group.

    Args:
        input: (N, C) or (N, C, ...), up to five dimensions, any strides; float32, float16, bfloat16
            or float64 for the kernels.
        num_groups: groups of C / num_groups neighbouring channels.  Mean and biased variance are
            taken over the channels of a group and all pixels of an image.
        weight, bias: (C,) or None; of the input's dtype, or float32 for an input of 16 bits.

    Returns:
        A tensor of the input's shape and dtype, rounded once; under autocast float32.  It has the
        input's order of dimensions: channels_last stays, where torch on a GPU drops it.  Statistics
        are float32 (float64 for float64), summed in an order that shape and strides alone decide,
        and so are the gradients of weight and bias.

    Raises:
        RuntimeError: an input without channels; `num_groups` negative or no divisor of them; a
            weight or bias of another shape; dtypes or devices that do not match.
        ValueError: one value in all.
        ZeroDivisionError: no groups.

    Gradients of its gradients are computed by plain PyTorch.

    Source: `torch.nn.functional.group_norm`; https://arxiv.org/abs/1803.08494.
    """
    op = "group_norm"
    checks.tensor(op, {"weight": weight, "bias": bias}, input=input)
    if type(num_groups) is not int:
        num_groups = checks.integer(op, "num_groups", num_groups)
    if type(eps) is not float:
        eps = checks.number(op, "eps", eps)
    _check(input, num_groups, weight, bias)
    declined = f"{input.dim()} dimensions" if input.dim() > strided.RANK else None
    # of an empty input nothing is to be normalised
    if input.numel() == 0 or not backend.runs_triton(op, input, weight, bias, declined=declined):
        return group_norm_reference(input, num_groups, weight, bias, eps)
    input, weight, bias = binding.autocast_to_float32(input, weight, bias)
    checks.parameters(op, input, accumulator_dtype(input.dtype), weight=weight, bias=bias)
    output: Tensor = binding.apply(Norm, input, op, num_groups, weight, bias, eps)
    return output


def _check(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    op = "group_norm"
    if input.dim() < 2:
        checks.fail(
            RuntimeError, op, "input must have a batch and a channel dimension", input=input
        )
    if num_groups == 0:
        checks.fail(ZeroDivisionError, op, "num_groups must be positive", num_groups=num_groups)
    images, channels, *size = input.shape
    # torch's own count, which is that of a group only where there is one image
    if images * channels // num_groups * math.prod(size) == 1:
        checks.fail(ValueError, op, "expected more than one value per group", input=input)
    if num_groups < 0:
        checks.fail(RuntimeError, op, "num_groups must be positive", num_groups=num_groups)
    if channels % num_groups:
        checks.fail(
            RuntimeError,
            op,
            "the channels must be divisible by num_groups",
            input=input,
            num_groups=num_groups,
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            checks.fail(
                RuntimeError,
                op,
                f"{name} must be a vector of {channels} elements",
                input=input,
                **{name: parameter},
            )


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(name: str, *shape: int, groups: int, affine: str = "wb", **more: Any) -> Sample:
        scale, offset = more.pop("scale", 1.0), more.pop("offset", 0.0)
        param = make.float32 if more.pop("float32", False) and make.dtype.itemsize < 4 else make
        return Sample(
            name,
            input=make(*shape, scale=scale) + offset,
            num_groups=groups,
            weight=param(shape[1], low=0.5, high=1.5) if "w" in affine else None,
            bias=param(shape[1], low=-0.5, high=0.5) if "b" in affine else None,
            eps=more.pop("eps", 1e-5),
            **more,
        )

    yield sample("images", 3, 6, 4, 7, groups=2, layouts=True)
    # two slices of pixels that end inside a tile, and two tiles of channels
    yield sample("pixel-slices", 1, 5, 61, 71, groups=5, float32=True, eps=1e-3)
    # more sums to a group than are merged at once
    yield sample("one-group", 2, 131, 3, groups=1)
    yield sample("rows", 5, 6, groups=2, affine="w")
    yield sample("volume", 2, 4, 2, 3, 2, groups=4, affine="")
    if make.dtype != torch.float64:
        # where the mean costs 5 digits, the truth in float64 is good for no float64
        yield sample("far-from-zero", 2, 4, 90, groups=2, affine="", scale=0.01, offset=1000.0)
    yield sample("empty", 0, 4, 3, groups=2)
    yield sample("tiny", 1, 4, 2, groups=2, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    def sample(name: str, input: Tensor) -> Sample:
        parameter = make.empty(input.shape[1])
        return Sample(name, input=input, num_groups=32, weight=parameter, bias=parameter, eps=1e-5)

    images = make.empty(32, 256, 56, 56)
    yield sample("resnet50-s1", images)
    yield sample("resnet50-s1-channels-last", images.to(memory_format=torch.channels_last))
    small = make.empty(32, 2048, 4, 4)
    yield sample("few-pixels", small)
    yield sample("few-pixels-channels-last", small.to(memory_format=torch.channels_last))


def _rejects(make: Maker) -> Iterator[Reject]:
    def reject(name: str, message: str, *shape: int, **more: Any) -> Reject:
        given: dict[str, Any] = {"num_groups": 2, "input": make(*shape)}
        return Reject(name, message, **(given | more))

    yield reject("vector", r"a batch and a channel dimension.*\(6,\)", 6)
    yield reject("no-groups", r"num_groups must be positive \(num_groups 0\)", 2, 6, num_groups=0)
    yield reject("negative", r"num_groups must be positive", 2, 6, num_groups=-1)
    yield reject("fraction", r"num_groups must be an integer", 2, 6, num_groups=2.0)
    yield reject("divisor", r"divisible by num_groups .*num_groups 4", 2, 6, num_groups=4)
    yield reject("one-value", r"more than one value", 1, 2)
    yield reject("weight", r"weight must be a vector of 6.*\(3,\)", 2, 6, weight=make(3))
    yield reject("bias", r"bias must be a vector of 6.*\(1, 6\)", 2, 6, bias=make(1, 6))
    yield reject("dtypes", r"parameters.*must share.*dtype|dtype", 2, 6, weight=make(6).double())


def _cost(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Cost]:
    """A group is read once if a cache keeps it; all gradients wanted."""
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(8 * input.numel(), 2 * size),
        "backward": Cost(10 * input.numel(), 3 * size),
    }


register(
    OpSpec(
        name="group_norm",
        op=group_norm,
        reference=group_norm_reference,
        kernels=(
            "group_norm.group_norm_stats_kernel",
            "group_norm.group_norm_gather_stats_kernel",
            "group_norm.group_norm_forward_kernel",
            "group_norm.group_norm_backward_reduce_kernel",
            "group_norm.group_norm_gather_sums_kernel",
            "group_norm.group_norm_grad_input_kernel",
            "reduce.channel_sum_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.group_norm, https://arxiv.org/abs/1803.08494",
        autocast="float32",
        layers=("GroupNorm",),
    )
)
