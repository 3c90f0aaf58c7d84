"""Layers and the activations behind them in one kernel: what `tritorch.fuse` calls in a forward.

Every call inspects the modules it is given.  As long as each computes just what its class says, the
layer's kernel applies the activation; otherwise, for example with a hook on the value between the
two, the modules are called one after the other, as the model was written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from tritorch import nn
from tritorch.ops.activation import epilogue_reference

NORMS: tuple[type[Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS: tuple[type[Module], ...] = (*NORMS, nn.Linear, nn.Conv2d)
# the names that kernels give them, by class; torch's own classes stand for ours
_NAMES: dict[type[Module], str] = {
    getattr(home, layer): name
    for home in (torch.nn, nn)
    for layer, name in {
        "ReLU": "relu",
        "ReLU6": "relu6",
        "LeakyReLU": "leaky_relu",
        "SiLU": "silu",
        "GELU": "gelu",
        "Sigmoid": "sigmoid",
        "Tanh": "tanh",
        "Hardswish": "hardswish",
        "Hardsigmoid": "hardsigmoid",
    }.items()
}


# methods that a layer's own forward calls, and the kernels do not
_METHODS = frozenset(("forward", "_conv_forward", "_check_input_dim"))


def is_plain(module: Module) -> bool:
    """Whether calling it runs the forward of its class and nothing besides."""
    return not (
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not _METHODS.isdisjoint(vars(module))
    )


def is_convolution(module: Module) -> bool:
    """Whether its kernels can take the statistics of a batch norm behind it."""
    return type(module) is nn.Conv2d


def is_activation(module: Module) -> bool:
    """Whether it is a layer that computes an activation of the kernels, under any option."""
    return type(module) in _NAMES


def activation_name(activation: Module | str) -> str | None:
    """What the kernels call it; None if they have no such activation."""
    if isinstance(activation, str):
        return activation
    name = _NAMES.get(type(activation))
    if name == "leaky_relu":
        return name if activation.negative_slope == 0.01 else None
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(activation.approximate))
    return name


def takes(layer: Module, activation: str) -> bool:
    """Whether the layer's kernels apply the activation, and are faster for it."""
    return type(layer) in LAYERS and (type(layer) is not nn.Conv2d or activation == "relu")


def activated(layer: Module, activation: Module | str, input: Tensor) -> Tensor:
    """activation(layer(input))."""
    name = _fusable(layer, activation)
    if name is None:
        return _activate(activation, layer(input))
    output: Tensor = layer(input, activation=name)
    return output


def residual_activated(
    norm: Module, activation: Module | str, input: Tensor, residual: Tensor, inplace: bool
) -> Tensor:
    """activation(norm(input) + residual); `inplace` says whether += was written.

    The kernels add tensors of one shape and dtype; others are broadcast and promoted by torch.
    """
    name = _fusable(norm, activation)
    if name is not None and _alike(input, residual):
        output: Tensor = norm(input, activation=name, residual=residual)
        return output
    output = norm(input)
    if inplace:
        output += residual
    else:
        output = output + residual
    return _activate(activation, output)


def convolved(
    convolution: Module,
    norm: Any,
    activation: Module | str | None,
    input: Tensor,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """activation(norm(convolution(input)) + residual), with what is None left out.

    In training the convolution's kernel takes the norm's statistics while it stores.
    """
    name = None if activation is None else _fusable(norm, activation)
    if (
        (activation is None or name is not None)
        and _takes_statistics(convolution, norm, input)
        and (residual is None or _is_output(convolution, input, residual))
    ):
        output: Tensor = norm.behind(convolution, input, name, residual)
        return output
    output = convolution(input)
    if activation is None:
        output = norm(output)
        return output
    if residual is None:
        return activated(norm, activation, output)
    return residual_activated(norm, activation, output, residual, inplace)


def _takes_statistics(convolution: Any, norm: Any, input: object) -> bool:
    """Whether it is training, of images, by layers that compute what their classes say."""
    return (
        is_convolution(convolution)
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
        and is_plain(convolution)
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and is_plain(norm)
        and isinstance(input, Tensor)
        and input.dim() == 4
    )


def _is_output(convolution: Any, input: Tensor, residual: object) -> bool:
    """Whether the residual has the convolution's shape, and the dtype that it will have."""
    padding = convolution.padding
    if not isinstance(residual, Tensor) or isinstance(padding, str):
        return False
    shape = [input.shape[0], convolution.out_channels]
    for size, taps, stride, pad, dilation in zip(
        input.shape[2:],
        convolution.kernel_size,
        convolution.stride,
        padding,
        convolution.dilation,
        strict=True,
    ):
        shape.append((size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1)
    device = input.device.type
    # of meta tensors torch cannot be asked
    lowers = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    lowers = lowers and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lowers else input.dtype
    return (
        list(residual.shape) == shape
        and residual.dtype == dtype
        and residual.device == input.device
    )


def _fusable(layer: Module, activation: Module | str) -> str | None:
    name = activation_name(activation)
    if name is None or not takes(layer, name) or not is_plain(layer):
        return None
    return name if isinstance(activation, str) or is_plain(activation) else None


def _activate(activation: Module | str, input: Tensor) -> Tensor:
    if isinstance(activation, str):
        return epilogue_reference(input, activation)
    output: Tensor = activation(input)
    return output


def _alike(input: Tensor, residual: object) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )
