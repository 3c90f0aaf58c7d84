"""Layer normalisation: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the last dimensions."""
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


@repeated
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the last dimensions of each element.

    Args:
        input: (*, *normalized_shape), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        normalized_shape: the sizes of the dimensions that mean and biased variance are taken over.
        weight, bias: of shape `normalized_shape`, or None; of the input's dtype, or float32 for an
            input of 16 bits.

    Returns:
        A contiguous tensor of the input's shape and dtype, rounded once; under autocast float32.
        Statistics are float32 (float64 for float64), summed in an order that the shape alone
        decides, and so are the gradients of weight and bias.

    Raises:
        RuntimeError: an input that does not end with `normalized_shape`, or an empty one of these;
            a weight or bias of another shape; dtypes or devices that do not match.
        TypeError: `normalized_shape` is no sequence of integers.

    Gradients of its gradients are computed by plain PyTorch.

    Source: `torch.nn.functional.layer_norm`; https://arxiv.org/abs/1607.06450.
    """
    op = "layer_norm"
    checks.tensor(op, {"weight": weight, "bias": bias}, input=input)
    if not isinstance(normalized_shape, (tuple, list)):
        checks.fail(TypeError, op, "normalized_shape must be a sequence", received=normalized_shape)
    shape = tuple(normalized_shape)
    if {*map(type, shape)} != {int}:
        shape = checks.ints(op, "normalized_shape", shape, len(shape))
    if type(eps) is not float:
        eps = checks.number(op, "eps", eps)
    if backend.takes_nested(op, input):
        return layer_norm_reference(input, shape, weight, bias, eps)
    _check(input, shape, weight, bias)
    declined = f"{input.dim()} dimensions" if input.dim() > strided.RANK else None
    # of an empty input nothing is to be normalised
    if input.numel() == 0 or not backend.runs_triton(op, input, weight, bias, declined=declined):
        return layer_norm_reference(input, shape, weight, bias, eps)
    input, weight, bias = binding.autocast_to_float32(input, weight, bias)
    checks.parameters(op, input, accumulator_dtype(input.dtype), weight=weight, bias=bias)
    output: Tensor = binding.apply(Norm, input, op, len(shape), weight, bias, eps)
    return output


def _check(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> None:
    op = "layer_norm"
    if not shape:
        checks.fail(RuntimeError, op, "normalized_shape must have a dimension", received=shape)
    if input.shape[-len(shape) :] != shape:
        checks.fail(
            RuntimeError,
            op,
            "input must end with the dimensions of normalized_shape",
            input=input,
            normalized_shape=shape,
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            checks.fail(
                RuntimeError,
                op,
                f"{name} must have the shape normalized_shape",
                normalized_shape=shape,
                **{name: parameter},
            )


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str, *shape: int, row: int = 1, offset: float = 0.0, affine: str = "wb", **more: Any
    ) -> Sample:
        normalized = shape[len(shape) - row :]
        scale = more.pop("scale", 1.0)
        param = make.float32 if more.pop("float32", False) and make.dtype.itemsize < 4 else make
        return Sample(
            name,
            input=make(*shape, scale=scale) + offset,
            normalized_shape=normalized,
            weight=param(*normalized, low=0.5, high=1.5) if "w" in affine else None,
            bias=param(*normalized, low=-0.5, high=0.5) if "b" in affine else None,
            eps=more.pop("eps", 1e-5),
            **more,
        )

    # two tiles of rows
    yield sample("images", 3, 12, 4, 7, row=2, layouts=True)
    yield sample("rows", 37, 100, float32=True, eps=1e-3)
    # long rows: slices of two tiles, the last of which ends inside one
    yield sample("long", 2, 3, 4099, row=2)
    yield sample("one-row", 3, 5, row=2, affine="w")
    yield sample("bias-only", 4, 3, 6, affine="b")
    yield sample("one-column", 5, 1, affine="")
    if make.dtype != torch.float64:
        # where the mean costs 5 digits, the truth in float64 is good for no float64
        yield sample("far-from-zero", 3, 300, scale=0.01, offset=1000.0)
    yield sample("empty", 0, 3)
    yield sample("tiny", 2, 3, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    def sample(name: str, *shape: int, row: int = 1) -> Sample:
        normalized = shape[len(shape) - row :]
        parameter = make.empty(*normalized)
        return Sample(
            name,
            input=make.empty(*shape),
            normalized_shape=normalized,
            weight=parameter,
            bias=parameter,
            eps=1e-5,
        )

    yield sample("vit-base", 64, 197, 768)
    yield sample("convnext-s1", 32, 56, 56, 96)
    yield sample("images", 32, 64, 56, 56, row=3)
    yield sample("odd", 1021, 333)


def _rejects(make: Maker) -> Iterator[Reject]:
    def reject(name: str, message: str, *shape: int, **more: Any) -> Reject:
        given: dict[str, Any] = {"normalized_shape": (3,), "input": make(*shape)}
        return Reject(name, message, **(given | more))

    yield reject("no-shape", r"must have a dimension \(received \(\)\)", 2, 3, normalized_shape=())
    yield reject("shape", r"input must end with.*\(2, 4\)", 2, 4)
    yield reject("longer", r"input must end with.*\(3,\)", 3, normalized_shape=(2, 3))
    yield reject("integer", r"normalized_shape must be a sequence", 2, 3, normalized_shape=3)
    yield reject("weight", r"weight must have the shape.*\(2,\)", 2, 3, weight=make(2))
    yield reject("bias", r"bias must have the shape.*\(1, 3\)", 2, 3, bias=make(1, 3))
    yield reject("dtypes", r"parameters.*must share.*dtype|dtype", 2, 3, weight=make(3).double())
    yield reject("not-a-tensor", r"input must be a Tensor, not list", 2, 3, input=[1.0, 2.0, 3.0])


def _cost(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Cost]:
    """A row is read once if it fits into a tile; all gradients wanted."""
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(8 * input.numel(), 2 * size),
        "backward": Cost(12 * input.numel(), 3 * size),
    }


register(
    OpSpec(
        name="layer_norm",
        op=layer_norm,
        reference=layer_norm_reference,
        kernels=(
            "layer_norm.layer_norm_stats_kernel",
            "layer_norm.layer_norm_forward_kernel",
            "layer_norm.layer_norm_backward_reduce_kernel",
            "layer_norm.layer_norm_backward_kernel",
            "reduce.channel_sum_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.layer_norm, https://arxiv.org/abs/1607.06450",
        autocast="float32",
        layers=("LayerNorm",),
    )
)
