"""Convolution of volumes: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch.ops import conv_cost
from tritorch.ops.conv import convolution, reference_of
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

Triple = int | Sequence[int]


def conv3d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Triple | str = 0,
    dilation: Triple = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """activation(cross-correlation of volumes with filters + bias)."""
    given = stride, padding, dilation, groups, activation
    return reference_of(3, input, weight, bias, *given)


@repeated
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Triple | str = 0,
    dilation: Triple = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Cross-correlation of volumes with filters.

    One number stands for all three axes of the volume in `stride`, `padding` and `dilation`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides; dtypes as for `conv2d`.  Fastest as
            channels_last_3d: 16-bit and TF32 volumes in another order are copied to it, and results
            from it, where the products are worth the copies.
        weight: (K, C / groups, T, R, S), the input's dtype and device.  Fastest as
            channels_last_3d: from another order each call, and each gradient of the input, may copy
            it.
        bias: (K,) or None.
        stride: voxels between positions of the filter.
        padding: zeros on each side; "valid" for none; "same" for an output of the input's size,
            with a stride of 1 and any odd slice of zeros at the end.
        dilation: voxels between taps of the filter.
        groups: output channels read the input channels of their own group alone.
        activation: that of `conv2d`.

    Returns:
        (N, K, Z, P, Q) or (K, Z, P, Q), each axis
        (its size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1; channels_last_3d if the
        input or the weight is.  Sums, TF32 and padding are those of `conv2d`.

    Raises:
        RuntimeError: as `conv2d`.
        TypeError: `input` or `weight` is not a tensor.
        ValueError: an unknown activation.

    Source: `torch.nn.functional.conv3d`.
    """
    given = stride, padding, dilation, groups, activation
    return convolution(3, conv3d_reference, input, weight, bias, *given)


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: tuple[int, ...],
        weight: tuple[int, ...],
        *,
        bias: bool = True,
        channels_last: bool = False,
        layouts: bool = False,
        gradcheck: bool = False,
        **given: Any,
    ) -> Sample:
        x, w = make(*input), make(*weight)
        if channels_last:
            x, w = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, w))
        steps = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": None, **given}
        return Sample(
            name,
            layouts=layouts,
            gradcheck=gradcheck,
            input=x,
            weight=w,
            bias=make(weight[0]) if bias else None,
            **steps,
        )

    yield sample("typical", (2, 3, 3, 4, 3), (4, 3, 2, 3, 2), padding=1, layouts=True)
    yield sample(
        "each-axis",
        (1, 2, 6, 5, 7),
        (3, 2, 3, 2, 2),
        stride=(2, 3, 1),
        padding=(2, 0, 1),
        dilation=(1, 2, 3),
        bias=False,
    )
    # rows of the depth and of the height that no tap reaches
    yield sample("gaps", (1, 2, 5, 4, 2), (3, 2, 2, 1, 1), stride=(4, 3, 1), dilation=(2, 1, 1))
    yield sample("same-even", (1, 2, 3, 2, 3), (3, 2, 2, 4, 1), padding="same")
    yield sample("groups", (2, 4, 3, 2, 3), (6, 2, 2, 1, 2), padding="valid", groups=2)
    yield sample("depthwise", (1, 2, 3, 2, 2), (4, 1, 2, 2, 1), padding=1, groups=2)
    yield sample("many-channels", (1, 16, 2, 3, 3), (16, 16, 3, 2, 2), padding=1)
    yield sample("relu", (1, 2, 3, 2, 3), (3, 2, 2, 1, 2), activation="relu")
    yield sample("unbatched", (3, 4, 2, 3), (2, 3, 2, 2, 2))
    yield sample("empty-batch", (0, 3, 4, 2, 3), (2, 3, 2, 2, 2))
    # channels along memory, sums over several splits
    yield sample("split-sum", (1, 256, 2, 1, 1), (16, 256, 3, 1, 1), padding=1, channels_last=True)
    # several tiles of pixels in each slice
    yield sample("pixel-tiles", (1, 2, 3, 12, 13), (3, 2, 2, 1, 1), channels_last=True)
    yield sample("tiny", (1, 1, 2, 2, 1), (2, 1, 2, 1, 1), stride=(1, 2, 1), gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    for name, n, c, k, size, kernel, stride in (
        ("resnet3d-s1-3x3x3", 8, 64, 64, (16, 56, 56), 3, 1),
        ("resnet3d-stem", 8, 3, 64, (16, 112, 112), 7, 2),
    ):
        yield Sample(
            name,
            input=make.empty(n, c, *size).contiguous(memory_format=torch.channels_last_3d),
            weight=make.empty(k, c, *(kernel,) * 3),
            bias=make.empty(k),
            stride=stride,
            padding=kernel // 2,
            dilation=1,
            groups=1,
        )


def _rejects(make: Maker) -> Iterator[Reject]:
    x, w = make(2, 4, 3, 3, 3), make(6, 4, 2, 2, 2)
    wide = make(6, 5, 2, 2, 2)
    yield Reject("channels", "conv3d: weight expects 5 input channels", input=x, weight=wide)
    yield Reject("input-dim", "conv3d: input must have 5 dimensions", input=make(3, 3), weight=w)
    yield Reject(
        "padding-two", "padding must be one integer or 3", input=x, weight=w, padding=(1, 1)
    )
    yield Reject(
        "same-stride", "conv3d: padding 'same' takes", input=x, weight=w, padding="same", stride=2
    )
    deep = make(6, 4, 4, 1, 1)
    yield Reject("kernel", "conv3d: the filter is larger", input=x, weight=deep)


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = 1,
    padding: Triple | str = 0,
    dilation: Triple = 1,
    groups: int = 1,
    activation: str | None = None,
) -> dict[str, Cost]:
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = conv3d_reference(x, w, None, stride, padding, dilation, groups)
    return conv_cost.of_convolution(input, weight, y.shape, stride)


register(
    OpSpec(
        name="conv3d",
        op=conv3d,
        reference=conv3d_reference,
        kernels=(
            "activation.activation_backward_kernel",
            "conv.conv2d_kernel",
            "conv_weight.conv2d_grad_weight_kernel",
            "reduce.channel_sum_kernel",
            "reduce.many_splits_sum_kernel",
            "reduce.split_sum_kernel",
            "reorder.reorder_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.nn.functional.conv3d",
        layers=("Conv3d",),
    )
)
