"""Convolution of signals, which are images of one row: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch.ops import conv_cost
from tritorch.ops.conv import convolution, reference_of
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

Single = int | Sequence[int]


def conv1d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Single = 1,
    padding: Single | str = 0,
    dilation: Single = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """activation(cross-correlation of signals with filters + bias)."""
    given = stride, padding, dilation, groups, activation
    return reference_of(1, input, weight, bias, *given)


@repeated
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Single = 1,
    padding: Single | str = 0,
    dilation: Single = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Cross-correlation of signals with filters: the kernels of `conv2d` on views of one row.

    Args:
        input: (N, C, L) or (C, L), any strides; dtypes as for `conv2d`.  Fastest where the channels
            are contiguous: 16-bit and TF32 signals in another order are copied to that one, and
            results from it, where the products are worth the copies.
        weight: (K, C / groups, S), the input's dtype and device.  Fastest where the channels are
            contiguous: from another order each call, and each gradient of the input, may copy it.
        bias: (K,) or None.
        stride: steps between positions of the filter.
        padding: zeros on each side; "valid" for none; "same" for an output of the input's length,
            with a stride of 1 and any odd zero at the end.
        dilation: steps between taps of the filter.
        groups: output channels read the input channels of their own group alone.
        activation: that of `conv2d`.

    Returns:
        (N, K, Q) or (K, Q), Q = (L + 2 * padding - dilation * (S - 1) - 1) // stride + 1;
        contiguous unless the channels of the weight are.  Sums, TF32 and padding are those of
        `conv2d`.

    Raises:
        RuntimeError: as `conv2d`.
        TypeError: `input` or `weight` is not a tensor.
        ValueError: an unknown activation.

    Source: `torch.nn.functional.conv1d`.
    """
    given = stride, padding, dilation, groups, activation
    return convolution(1, conv1d_reference, input, weight, bias, *given)


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: tuple[int, ...],
        weight: tuple[int, ...],
        *,
        bias: bool = True,
        layouts: bool = False,
        gradcheck: bool = False,
        **given: Any,
    ) -> Sample:
        steps = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": None, **given}
        return Sample(
            name,
            layouts=layouts,
            gradcheck=gradcheck,
            input=make(*input),
            weight=make(*weight),
            bias=make(weight[0]) if bias else None,
            **steps,
        )

    yield sample("typical", (2, 5, 19), (18, 5, 3), padding=1, layouts=True)
    yield sample("stride-3-dilation-2", (2, 5, 20), (6, 5, 4), stride=3, padding=3, dilation=2)
    yield sample("same-even", (2, 3, 7), (4, 3, 4), padding="same", dilation=3, bias=False)
    yield sample("groups", (2, 6, 9), (4, 3, 2), padding="valid", groups=2)
    yield sample("depthwise", (2, 5, 11), (5, 1, 3), stride=2, padding=2, groups=5)
    yield sample("many-channels", (2, 32, 9), (24, 32, 5), stride=2, padding=1)
    yield sample("relu", (2, 5, 9), (6, 5, 3), activation="relu")
    yield sample("unbatched", (4, 8), (3, 4, 3), padding=(2,))
    yield sample("empty-batch", (0, 4, 8), (3, 4, 3))
    yield sample("tiny", (1, 1, 3), (2, 1, 2), stride=2, padding=1, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    for name, n, c, k, length, kernel, stride, groups in (
        ("wav2vec-512", 16, 512, 512, 3199, 3, 2, 1),
        ("tcn-512", 16, 512, 512, 2048, 3, 1, 1),
        ("conformer-depthwise", 16, 256, 256, 1000, 31, 1, 256),
    ):
        yield Sample(
            name,
            input=make.empty(n, c, length),
            weight=make.empty(k, c // groups, kernel),
            bias=make.empty(k),
            stride=stride,
            padding=kernel // 2,
            dilation=1,
            groups=groups,
        )


def _rejects(make: Maker) -> Iterator[Reject]:
    x, w = make(2, 4, 8), make(6, 4, 3)
    yield Reject(
        "channels", "conv1d: weight expects 5 input channels", input=x, weight=make(6, 5, 3)
    )
    yield Reject("input-dim", "conv1d: input must have 3 dimensions", input=make(8), weight=w)
    yield Reject("weight-dim", "conv1d: weight must have 3 dimensions", input=x, weight=make(6, 4))
    yield Reject(
        "padding-two", "padding must be one integer or 1", input=x, weight=w, padding=(1, 1)
    )
    yield Reject("padding-word", "padding must be 'same'", input=x, weight=w, padding="full")
    yield Reject(
        "same-stride", "conv1d: padding 'same' takes", input=x, weight=w, padding="same", stride=2
    )
    yield Reject("kernel", "conv1d: the filter is larger", input=x, weight=make(6, 4, 9))
    yield Reject("no-signal", "the filter is larger", input=make(2, 4, 0), weight=w, padding=2)


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Single = 1,
    padding: Single | str = 0,
    dilation: Single = 1,
    groups: int = 1,
    activation: str | None = None,
) -> dict[str, Cost]:
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = conv1d_reference(x, w, None, stride, padding, dilation, groups)
    return conv_cost.of_convolution(input, weight, y.shape, stride)


register(
    OpSpec(
        name="conv1d",
        op=conv1d,
        reference=conv1d_reference,
        kernels=(
            "activation.activation_backward_kernel",
            "conv.conv2d_kernel",
            "conv_tma.conv2d_tma_kernel",
            "conv_weight.conv2d_grad_weight_kernel",
            "conv_weight_tma.conv2d_grad_weight_tma_kernel",
            "depthwise.depthwise_conv2d_kernel",
            "depthwise.depthwise_conv2d_grad_weight_kernel",
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
        source="torch.nn.functional.conv1d",
        layers=("Conv1d",),
        configurations_of="conv2d",
    )
)
