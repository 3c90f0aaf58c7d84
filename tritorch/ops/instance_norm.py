"""Instance normalisation: reference, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import strided
from tritorch.ops.batch_norm_checks import check_statistics
from tritorch.ops.batch_norm_function import BatchNorm
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.layer_and_group_norm import Norm
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

_OP = "instance_norm"


def instance_norm_reference(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the pixels of each channel; what is
    channels_last stays so, which torch's gives up, of the gradient too.
    """
    given = running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    output = F.instance_norm(_with_gradient_formatted(input), *given)
    return _channels_last(output) if _is_channels_last(input) else output


@repeated
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the pixels of each channel.

    Args:
        input: (N, C, ...), up to five dimensions, any strides; float32, float16, bfloat16 or
            float64 for the kernels.
        running_mean, running_var: (C,) or None.  Without `use_input_stats` the input is normalised
            by them; with it they move in place, by `momentum`, towards the images' means and
            unbiased variances, averaged over the batch.
        weight, bias: (C,) or None; they and the running statistics share one dtype: the input's, or
            float32 for an input of 16 bits.
        use_input_stats: normalise by mean and biased variance of each channel of each image.

    Returns:
        A tensor of the input's shape and dtype, rounded once.  It has the input's order of
        dimensions, channels_last too, which torch gives up; where running statistics move, it is
        copied to contiguous memory and back, as torch copies it there.  Statistics are float32
        (float64 for float64), summed in an order that shape and strides alone decide.

    Raises:
        ValueError: with `use_input_stats` images of one pixel; one running statistic without the
            other.
        RuntimeError: without `use_input_stats` no running statistics; ones that require a gradient;
            sizes, dtypes or devices that do not match.

    Gradients of its gradients are computed by plain PyTorch.

    Source: `torch.nn.functional.instance_norm`; https://arxiv.org/abs/1607.08022.
    """
    running = {"running_mean": running_mean, "running_var": running_var}
    vectors = {**running, "weight": weight, "bias": bias}
    checks.tensor(_OP, vectors, input=input)
    if type(momentum) is not float:
        momentum = checks.number(_OP, "momentum", momentum)
    if type(eps) is not float:
        eps = checks.number(_OP, "eps", eps)
    checks.flag(_OP, "use_input_stats", use_input_stats)
    given: Any = input, *vectors.values(), use_input_stats, momentum, eps
    shapes = [None if one is None else one.shape for one in vectors.values()]
    declined = _checked(input.shape, *shapes, use_input_stats)
    check_statistics(_OP, use_input_stats, **running)
    if input.numel() == 0 or not backend.runs_triton(
        _OP, input, *vectors.values(), declined=declined
    ):
        return instance_norm_reference(*given)
    checks.parameters(_OP, input, accumulator_dtype(input.dtype), **vectors)
    if not use_input_stats:
        return _of_batch(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    if running_mean is not None:
        return _moving(input, running_mean, running_var, weight, bias, momentum, eps)
    # a channel is a group
    output: Tensor = binding.apply(Norm, input, "group_norm", input.shape[1], weight, bias, eps)
    return output


def _of_batch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation of any `eps`: torch asks for a positive one in its function alone."""
    output: Tensor = binding.apply(
        BatchNorm,
        input,
        weight,
        bias,
        None,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        None,
    )
    return output


def _moving(
    input: Tensor,
    running_mean: Tensor,
    running_var: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """As torch does it: one image whose channels are those of all."""
    images, channels, *size = input.shape
    # the means of what has moved are rounded once
    dtype = accumulator_dtype(input.dtype)
    mean, var = (one.to(dtype).repeat(images) for one in (running_mean, running_var))
    scale, shift = (None if one is None else one.to(dtype).repeat(images) for one in (weight, bias))
    x = _with_gradient_formatted(input).contiguous().view(1, images * channels, *size)
    output = _of_batch(x, mean, var, scale, shift, True, momentum, eps).view(input.shape)
    for statistic, moved in ((running_mean, mean), (running_var, var)):
        statistic.copy_(moved.view(images, channels).mean(0))
    return _channels_last(output) if _is_channels_last(input) else output


def _with_gradient_formatted(input: Tensor) -> Tensor:
    """The input, whose gradient through copies gets its memory format back."""
    # a compiler could not follow
    hooks = _is_channels_last(input) and not torch.compiler.is_compiling()
    if not (hooks and input.requires_grad and torch.is_grad_enabled()):
        return input
    x = input.view_as(input)
    x.register_hook(_channels_last)
    return x


def _is_channels_last(input: Tensor) -> bool:
    return input.dim() in (4, 5) and is_channels_last(input)


def _channels_last(result: Tensor) -> Tensor:
    # no memory format is asked for, which what is batched has not
    return result.movedim(1, -1).contiguous().movedim(-1, 1)


@checks.remembered
def _checked(
    input: torch.Size,
    running_mean: torch.Size | None,
    running_var: torch.Size | None,
    weight: torch.Size | None,
    bias: torch.Size | None,
    use_input_stats: bool,
) -> str | None:
    """Why the kernels do not take shapes that torch takes."""
    running = {"running_mean": running_mean, "running_var": running_var}
    if use_input_stats and math.prod(input[2:]) == 1:
        checks.fail(ValueError, _OP, "expected more than one pixel in an image", input=input)
    if len(input) < 2:
        checks.fail(IndexError, _OP, "input must have a batch and a channel dimension", input=input)
    if (running_mean is None) != (running_var is None):
        kind = ValueError if use_input_stats else RuntimeError
        checks.fail(kind, _OP, f"{' and '.join(running)} must both be tensors or None", **running)
    if not use_input_stats and running_mean is None:
        rule = "running statistics are needed without use_input_stats"
        checks.fail(RuntimeError, _OP, rule, input=input)
    vectors = {**running, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        # for an empty input torch does not check them
        if vector is not None and math.prod(vector) != input[1] and 0 not in input:
            rule = f"{name} must have {input[1]} elements"
            checks.fail(RuntimeError, _OP, rule, input=input, **{name: vector})
    if len(input) > strided.RANK:
        return f"{len(input)} dimensions"
    if any(vector is not None and len(vector) != 1 for vector in vectors.values()):
        return "parameters or statistics that are not vectors"
    return None


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        *shape: int,
        affine: str = "wb",
        stats: bool = False,
        scale: float = 1.0,
        offset: float = 0.0,
        float32: bool = False,
        **more: Any,
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
            **more,
        )

    yield sample("images", 3, 5, 4, 7, layouts=True)
    yield sample("moving", 2, 3, 4, 5, stats=True, momentum=0.3, layouts=True)
    yield sample("eval", 2, 3, 4, 5, stats=True, use_input_stats=False, layouts=True)
    yield sample("length", 3, 18, 11, affine="", eps=1e-3)
    yield sample("volume", 2, 3, 2, 3, 4, affine="b", float32=True)
    yield sample("moving-without-eps", 2, 3, 7, stats=True, eps=0.0)
    yield sample("moving-float32", 2, 4, 9, stats=True, affine="w", float32=True)
    # in evaluation one pixel is enough
    yield sample("pixel", 2, 3, 1, 1, stats=True, use_input_stats=False)
    if make.dtype != torch.float64:
        # where the mean costs 5 digits, the truth in float64 is good for no float64
        yield sample("far-from-zero", 2, 4, 90, affine="", scale=0.01, offset=1000.0)
    yield sample("tiny", 2, 2, 3, gradcheck=True)
    yield sample("tiny-moving", 2, 2, 3, stats=True, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    def sample(name: str, input: Tensor, moves: bool = False) -> Sample:
        vector = input.new_empty((input.shape[1],), dtype=accumulator_dtype(input.dtype))
        running: Any = {"running_mean": vector, "running_var": vector} if moves else {}
        return Sample(name, input=input, weight=vector, bias=vector, **running)

    for name, shape in (("unet-s1", (2, 32, 512, 512)), ("unet-s5", (2, 512, 32, 32))):
        images = make.empty(*shape)
        yield sample(name, images)
        yield sample(f"{name}-channels-last", images.to(memory_format=torch.channels_last))
    yield sample(f"{name}-moving", images, moves=True)


def _rejects(make: Maker) -> Iterator[Reject]:
    def reject(name: str, message: str, *shape: int, **more: Any) -> Reject:
        return Reject(name, f"{_OP}: {message}", input=make(*shape), **more)

    evaluation: Any = {"use_input_stats": False}
    yield reject("one-pixel", r"expected more than one pixel.*\(2, 3, 1\)", 2, 3, 1)
    yield reject("rows", r"expected more than one pixel.*\(2, 3\)", 2, 3)
    yield reject("no-statistics", r"running statistics are needed", 2, 3, 4, **evaluation)
    alone: Any = {"running_mean": make(3)}
    yield reject("mean-alone", r".*must both be tensors or None", 2, 3, 4, **alone)
    for name in ("running_mean", "running_var", "weight", "bias"):
        wrong: Any = {"running_mean": make(3), "running_var": make(3), name: make(2)}
        yield reject(f"{name}-size", rf"{name} must have 3 elements.*\(2,\)", 2, 3, 4, **wrong)
    learned: Any = {"running_mean": make(3).requires_grad_(), "running_var": make(3)}
    yield reject("gradient", r"running_mean cannot require", 2, 3, 4, **learned)
    yield reject("momentum", r"momentum must be a number", 2, 3, 4, momentum=None)
    yield reject("flag", r"use_input_stats", 2, 3, 4, use_input_stats=None)
    mixed = make(3).double()
    yield Reject("dtypes", "dtype", input=make(2, 3, 4), weight=mixed, raises=RuntimeError)


def _cost(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Cost]:
    """An image is read once if a cache keeps it; all gradients wanted."""
    size = input.numel() * input.element_size()
    return {
        "forward": Cost((4 + 4 * use_input_stats) * input.numel(), 2 * size),
        "backward": Cost(10 * input.numel(), 3 * size),
    }


register(
    OpSpec(
        name=_OP,
        op=instance_norm,
        reference=instance_norm_reference,
        kernels=(
            "group_norm.group_norm_stats_kernel",
            "group_norm.group_norm_gather_stats_kernel",
            "group_norm.group_norm_forward_kernel",
            "group_norm.group_norm_backward_reduce_kernel",
            "group_norm.group_norm_gather_sums_kernel",
            "group_norm.group_norm_grad_input_kernel",
            "batch_norm_stats.batch_norm_stats_kernel",
            "batch_norm_stats.batch_norm_gather_stats_kernel",
            "batch_norm.batch_norm_forward_kernel",
            "batch_norm.batch_norm_backward_reduce_kernel",
            "batch_norm.batch_norm_grad_input_kernel",
            "reduce.channel_sum_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.instance_norm, https://arxiv.org/abs/1607.08022",
        mutates=("running_mean", "running_var"),
        layers=("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        configurations_of="group_norm",
    )
)
