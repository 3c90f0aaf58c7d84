"""Convolution followed by batch normalisation: reference, public function, checks, declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import conv_checks
from tritorch.ops.batch_norm import batch_norm, batch_norm_reference
from tritorch.ops.batch_norm_checks import check_shapes, check_statistics
from tritorch.ops.batch_norm_stages import keeps_bits
from tritorch.ops.conv import Pair, conv2d, conv2d_reference, writes_channels_last
from tritorch.ops.conv_batch_norm_function import ConvolutionBatchNorm
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

_OP = "conv2d_batch_norm"


def conv2d_batch_norm_reference(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """batch_norm(conv2d(input, weight))."""
    y = conv2d_reference(input, weight, None, stride, padding, dilation, groups)
    given = running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
    return batch_norm_reference(y, *given, activation=activation, residual=residual)


@repeated
def conv2d_batch_norm(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """batch_norm(conv2d(input, weight)), a convolution without bias.

    In training the Hopper kernels write mean and squared deviations of each tile that they store,
    so that the normalisation reads the convolution's output once and not twice; every other
    convolution is followed by the two kernels of `batch_norm`.  The statistics are those of the
    rounded output, as `batch_norm` computes them.

    Args:
        input: (N, C, H, W), any strides, dtypes as for `conv2d`; fastest as channels_last, like
            `weight`.
        weight: (K, C / groups, R, S), the input's dtype and device.
        running_mean, running_var: (K,), or None in training, which moves them in place.
        norm_weight, norm_bias: (K,) or None: scale and shift of the normalised values.  They and
            the running statistics share one dtype: the input's, or float32 for one of 16 bits.
        stride, padding, dilation, groups: as of `conv2d`.
        training, momentum, eps, activation: as of `batch_norm`.
        residual: None, or a tensor of the convolution's shape and dtype, added before the
            activation.

    Returns:
        (N, K, P, Q) in the memory format of `conv2d`, rounded by the convolution and once more.

    Raises:
        RuntimeError: what `conv2d` and `batch_norm` raise it for.
        TypeError: `input` or `weight` is not a tensor.
        ValueError: in training one value per channel, an `eps` that is not positive, or one running
            statistic without the other; an unknown activation.

    Gradients, and gradients of gradients, are those of the two.

    Source: `torch.nn.functional.conv2d`, `torch.nn.functional.batch_norm`;
    https://arxiv.org/abs/1502.03167.
    """
    running = {"running_mean": running_mean, "running_var": running_var}
    vectors = {**running, "norm_weight": norm_weight, "norm_bias": norm_bias}
    checks.tensor(_OP, {**vectors, "residual": residual}, input=input, weight=weight)
    if type(momentum) is not float:
        momentum = checks.number(_OP, "momentum", momentum)
    if type(eps) is not float:
        eps = checks.number(_OP, "eps", eps)
    if input.dim() != 4:
        checks.fail(RuntimeError, _OP, "input must have 4 dimensions", input=input)
    call = conv_checks.checked(
        _OP, 2, input, weight, None, stride, padding, dilation, groups, activation
    )
    declined = check_shapes(
        _OP,
        torch.Size((input.shape[0], weight.shape[0], *call.geometry[0])),
        *[None if one is None else one.shape for one in (residual, *vectors.values())],
        training,
        eps,
        activation,
        "convolution",
        "norm_",
    )
    declined = check_statistics(_OP, training, **running) or declined
    x, w = binding.autocast_to_lower(input, weight)
    checks.same_dtype_and_device(_OP, x, weight=w, residual=residual)
    geometry = stride, padding, dilation, groups
    norm: Any = (*vectors.values(), training, momentum, eps)
    if not training or input.numel() == 0:
        # one kernel has nothing to tell the other
        y = conv2d(input, weight, None, *geometry)
        return batch_norm(y, *norm, activation=activation, residual=residual)
    declined = call.declined or declined
    if not backend.runs_triton(_OP, x, w, *vectors.values(), residual, declined=declined):
        y = conv2d_reference(input, weight, None, *geometry)
        return batch_norm_reference(y, *norm, activation=activation, residual=residual)
    checks.parameters(_OP, x, accumulator_dtype(x.dtype), **vectors)
    output: Tensor = binding.apply(
        ConvolutionBatchNorm,
        x,
        w,
        norm_weight,
        norm_bias,
        residual,
        *running.values(),
        *call.geometry,
        writes_channels_last(2, x, w),
        momentum,
        eps,
        activation,
    )
    return output


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: tuple[int, ...],
        weight: tuple[int, ...],
        *,
        size: tuple[int, ...] | None = None,
        training: bool = True,
        stats: bool = True,
        affine: bool = True,
        float32: bool = False,
        channels_last: bool = False,
        layouts: bool = False,
        gradcheck: bool = False,
        **given: Any,
    ) -> Sample:
        channels = weight[0]
        param = make.float32 if float32 and make.dtype != torch.float64 else make
        x, w = make(*input), make(*weight)
        if make.dtype.itemsize == 2:
            # whole numbers, whose convolution 16 bits hold: what is judged is rounded once
            x, w = (2 * x).round(), (2 * w).round()
        if channels_last:
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return Sample(
            name,
            layouts=layouts,
            gradcheck=gradcheck,
            input=x,
            weight=w,
            running_mean=param(channels, low=-0.5, high=0.5) if stats else None,
            running_var=param(channels, low=0.5, high=1.5) if stats else None,
            norm_weight=param(channels, low=0.5, high=1.5) if affine else None,
            norm_bias=param(channels, low=-0.5, high=0.5) if affine else None,
            training=training,
            # of the size of the output
            residual=None if size is None else make(input[0], channels, *size),
            **given,
        )

    image, filters = (2, 5, 6, 7), (6, 5, 3, 3)
    last: dict[str, Any] = {"channels_last": True}
    yield sample("3x3", image, filters, padding=1, layouts=True)
    yield sample("residual", image, filters, size=(4, 5), activation="silu", layouts=True)
    yield sample("relu", image, filters, padding=1, size=(6, 7), activation="relu", **last)
    yield sample("1x1", (3, 8, 5, 3), (9, 8, 1, 1), **last)
    yield sample("no-statistics", (3, 8, 5, 3), (9, 8, 1, 1), stats=False, affine=False)
    yield sample("stride-2", (2, 9, 7, 9), (10, 9, 3, 3), stride=2, padding=1, momentum=0.3, **last)
    yield sample("groups", (2, 12, 5, 6), (10, 6, 3, 3), padding=1, groups=2)
    yield sample("depthwise", image, (5, 1, 3, 3), groups=5, activation="silu")
    yield sample("same", image, (6, 5, 4, 2), padding="same", eps=1e-3)
    yield sample("dilation", image, (6, 5, 2, 2), dilation=(2, 3), float32=True)
    yield sample("eval", image, filters, padding=1, training=False, activation="relu")
    yield sample("empty-batch", (0, 5, 6, 7), filters, padding=1)
    yield sample("split-sum", (3, 256, 2, 2), (16, 256, 3, 1), padding=(1, 0), **last)
    yield sample("tiny", (2, 2, 2, 1), (2, 2, 1, 1), activation="sigmoid", gradcheck=True)


# name, channels in and out, image, kernel, stride; half of the kernel is padding
_LAYERS = (
    ("resnet50-stem", 3, 64, 224, 7, 2),
    ("resnet50-s1-1x1", 64, 256, 56, 1, 1),
    ("resnet50-s1-3x3", 64, 64, 56, 3, 1),
    ("resnet50-s2-3x3-stride-2", 128, 128, 56, 3, 2),
    ("resnet50-s3-3x3", 256, 256, 14, 3, 1),
    ("resnet50-s4-1x1", 512, 2048, 7, 1, 1),
)


def _workloads(make: Maker) -> Iterator[Sample]:
    for name, c, k, size, kernel, stride in _LAYERS:
        channel = make.empty(k).to(accumulator_dtype(make.dtype))
        for order in (torch.channels_last, torch.contiguous_format):
            nchw = order == torch.contiguous_format
            # through copies in channels_last, of 16 bits alone
            if nchw and (name != "resnet50-s3-3x3" or make.dtype.itemsize > 2):
                continue
            yield Sample(
                f"{name}-contiguous" if nchw else name,
                input=make.empty(64, c, size, size).contiguous(memory_format=order),
                weight=make.empty(k, c, kernel, kernel).contiguous(memory_format=order),
                running_mean=channel,
                running_var=channel,
                norm_weight=channel,
                norm_bias=channel,
                stride=stride,
                padding=kernel // 2,
                training=True,
                activation="relu",
            )


def _rejects(make: Maker) -> Iterator[Reject]:
    x, w = make(2, 4, 5, 5), make(3, 4, 3, 3)

    def reject(name: str, message: str, **arguments: Any) -> Reject:
        given: dict[str, Any] = {"input": x, "weight": w, "training": True}
        given |= {"running_mean": make(3), "running_var": make(3)}
        return Reject(name, f"{_OP}: {message}", **(given | arguments))

    yield reject("channels", "weight expects 5 input channels", weight=make(3, 5, 3, 3))
    yield reject("kernel", "the filter is larger than the padded", weight=make(3, 4, 6, 3))
    yield reject("padding", "padding must not be negative", padding=-1)
    single: Any = {"input": make(4, 5, 5), "raises": RuntimeError}
    yield reject("unbatched", r"input must have 4 dimensions.*\(4, 5, 5\)", **single)
    yield reject("one-value", "expected more than one value", input=make(1, 4, 3, 3))
    yield reject("eps", "eps must be positive in training", eps=0.0)
    yield reject("momentum", "momentum must be a number", momentum=None)
    yield reject(
        "mean-alone", "running_mean and running_var must both be tensors", running_var=None
    )
    none: Any = {"running_mean": None, "running_var": None, "training": False}
    yield reject("no-statistics", "running statistics are needed", **none)
    yield reject("mean-size", r"running_mean must have 3 elements.*\(4,\)", running_mean=make(4))
    yield reject("weight-size", r"norm_weight must have 3 elements.*\(2,\)", norm_weight=make(2))
    learned = make(3).requires_grad_()
    yield reject("gradient", "running_var cannot require a gradient", running_var=learned)
    yield reject(
        "residual", "residual must have the convolution's shape", residual=make(2, 4, 5, 5)
    )
    yield reject("dtype", "expected weight of the input's dtype", weight=w.double())
    yield reject(
        "activation", "activation must be None or one of relu", activation="elu", raises=ValueError
    )


def _cost(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> dict[str, Cost]:
    """All gradients wanted; the convolution is stored once, and read by nothing but the output."""
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = conv2d_reference(x, w, None, stride, padding, dilation, groups)
    products = 2 * y.numel() * weight[0].numel()
    operands = (input.numel() + weight.numel()) * input.element_size()
    stored = y.numel() * input.element_size()
    # the values before the activation are computed again from the convolution, which a residual is
    # read and written beside
    norm = 2 + 2 + 1 + 2 * (residual is not None)
    # of relu bits may stand for the output, which then nothing reads
    in_bits = residual is not None and keeps_bits(residual, residual, activation)
    bits = in_bits * y.numel() // 8
    return {
        "forward": Cost(
            products + (4 + 4 * training) * y.numel(),
            operands + (3 + (residual is not None)) * stored + bits,
        ),
        "backward": Cost(
            2 * products + 10 * y.numel(), 2 * operands + (2 + norm - in_bits) * stored + bits
        ),
    }


register(
    OpSpec(
        name="conv2d_batch_norm",
        op=conv2d_batch_norm,
        reference=conv2d_batch_norm_reference,
        kernels=(
            "activation.activation_backward_kernel",
            "conv.conv2d_kernel",
            "conv_tma.conv2d_tma_kernel",
            "conv_weight.conv2d_grad_weight_kernel",
            "conv_weight_tma.conv2d_grad_weight_tma_kernel",
            "depthwise.depthwise_conv2d_kernel",
            "depthwise.depthwise_conv2d_grad_weight_kernel",
            "matmul_tma.matmul_tma_kernel",
            "batch_norm_stats.batch_norm_stats_kernel",
            "batch_norm_stats.batch_norm_gather_stats_kernel",
            "batch_norm.batch_norm_forward_kernel",
            "batch_norm.batch_norm_backward_reduce_kernel",
            "batch_norm.batch_norm_grad_input_kernel",
            "reduce.channel_sum_kernel",
            "reduce.many_splits_sum_kernel",
            "reduce.split_sum_kernel",
            "reorder.reorder_kernel",
            "stem.pack_pixels_kernel",
        ),
        gradients=("input", "weight", "norm_weight", "norm_bias", "residual"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        autocast="lower",
        lowered=("input", "weight"),
        source="torch.nn.functional.conv2d, torch.nn.functional.batch_norm",
        mutates=("running_mean", "running_var"),
        notes="a convolution and the batch norm behind it, after tritorch.fuse",
    )
)
