"""torch.nn with kernels: layers are torch's classes with another forward, the rest is torch's own.

A layer takes torch's arguments, holds torch's parameters and loads torch's checkpoints; its shapes,
dtypes and errors are those of its op in `tritorch.ops`.  `forward` of a linear layer, a 2d
convolution and a batch norm takes the op's `activation` and `residual` too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritorch import ops
from tritorch.nn import arguments
from tritorch.nn import functional as functional

# what `from tritorch.nn import *` brings
__all__ = [name for name in dir(torch.nn) if not name.startswith("_")]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})


class Linear(torch.nn.Linear):
    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return ops.linear(input, self.weight, self.bias, activation, residual=residual)


class Conv1d(torch.nn.Conv1d):
    # not forward: subclasses call this one with a weight of their own
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = arguments.padded(self, input)
        return ops.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    def _conv_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        input, padding = arguments.padded(self, input)
        geometry = self.stride, padding, self.dilation, self.groups
        return ops.conv2d(input, weight, bias, *geometry, activation, residual=residual)

    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        # a subclass may have a _conv_forward of torch's arguments alone
        if activation is None and residual is None:
            return super().forward(input)
        return self._conv_forward(input, self.weight, self.bias, activation, residual)


class Conv3d(torch.nn.Conv3d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = arguments.padded(self, input)
        return ops.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return arguments.transposed(self, ops.conv_transpose1d, input, output_size)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return arguments.transposed(self, ops.conv_transpose2d, input, output_size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return arguments.transposed(self, ops.conv_transpose3d, input, output_size)


class MaxPool1d(torch.nn.MaxPool1d):
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(torch.nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(torch.nn.MaxPool3d):
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool1d(torch.nn.AvgPool1d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(torch.nn.AvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(torch.nn.AdaptiveAvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return ops.adaptive_avg_pool3d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return ops.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class BatchNorm1d(torch.nn.BatchNorm1d):
    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        given = arguments.batch_norm(self)
        return ops.batch_norm(input, *given, activation=activation, residual=residual)


class BatchNorm2d(torch.nn.BatchNorm2d):
    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        given = arguments.batch_norm(self)
        return ops.batch_norm(input, *given, activation=activation, residual=residual)

    def behind(
        self,
        convolution: torch.nn.Conv2d,
        input: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """self(convolution(input)) in training, of a convolution without bias, zero-padded."""
        *given, training, momentum, eps = arguments.batch_norm(self)
        return ops.conv2d_batch_norm(
            input,
            convolution.weight,
            *given,
            stride=convolution.stride,
            padding=convolution.padding,
            dilation=convolution.dilation,
            groups=convolution.groups,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            residual=residual,
        )


class BatchNorm3d(torch.nn.BatchNorm3d):
    def forward(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        given = arguments.batch_norm(self)
        return ops.batch_norm(input, *given, activation=activation, residual=residual)


class GroupNorm(torch.nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class InstanceNorm1d(torch.nn.InstanceNorm1d):
    # not forward: that of a single image adds the batch and calls this
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return ops.instance_norm(input, *arguments.instance_norm(self))


class InstanceNorm2d(torch.nn.InstanceNorm2d):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return ops.instance_norm(input, *arguments.instance_norm(self))


class InstanceNorm3d(torch.nn.InstanceNorm3d):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return ops.instance_norm(input, *arguments.instance_norm(self))


class LayerNorm(torch.nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class ReLU(torch.nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return ops.relu(input, self.inplace)


class ReLU6(torch.nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return ops.relu6(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return ops.leaky_relu(input, self.negative_slope, self.inplace)


class SiLU(torch.nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return ops.silu(input, self.inplace)


class GELU(torch.nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class Sigmoid(torch.nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return ops.sigmoid(input)


class Tanh(torch.nn.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return ops.tanh(input)


class Hardswish(torch.nn.Hardswish):
    def forward(self, input: Tensor) -> Tensor:
        return ops.hardswish(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return ops.hardsigmoid(input, self.inplace)


class Softmax(torch.nn.Softmax):
    def forward(self, input: Tensor) -> Tensor:
        return ops.softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    def forward(self, input: Tensor) -> Tensor:
        return ops.log_softmax(input, self.dim)


class Dropout(torch.nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return ops.dropout(input, self.p, self.training, self.inplace)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class MSELoss(torch.nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCELoss(torch.nn.BCELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.binary_cross_entropy_with_logits(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
        )
