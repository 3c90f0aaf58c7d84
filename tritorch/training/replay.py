"""Takes one training step through the kernels and compares every tensor it makes with the truth.

A network's gradient cannot be compared with a float64 network's as a whole: an activation within a
rounding error of zero lands on the other side of a ReLU, and a gradient that is right becomes
another.  So each layer is judged by itself, on the very inputs and the very incoming gradient that
the step gave it.  The truth is torch.nn's layer in float64, the yardstick torch.nn's layer in the
step's own dtype, the verdict that of the tolerance rule of `tritorch.testing.tolerances`.  What one
layer hands to the next is itself among the tensors compared, so that the chain has no gap.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritorch import backend
from tritorch.convert import revert
from tritorch.registry import specs
from tritorch.testing import cases, tolerances
from tritorch.testing.scales import Scale, derive_conditions, derive_scales
from tritorch.testing.tolerances import Verdict


@dataclass(frozen=True)
class Check:
    """One tensor of a replayed step: what it is ("conv2: gradient of weight") and how it did."""

    tensor: str
    verdict: Verdict


@dataclass
class _Call:
    """What a layer was given and made of it; `before` is torch.nn's layer as it was then."""

    name: str
    layer: Module
    before: Module
    arguments: tuple[Tensor, ...]
    output: Tensor


def replay(
    model: Module,
    loss: Module,
    optimizer: torch.optim.SGD,
    images: Tensor,
    labels: Tensor,
) -> list[Check]:
    """One training step of copies of `model` and `optimizer` through the kernels, compared.

    Compared are the output of each layer and of the loss, the gradient of each input and parameter,
    each buffer after the step, and each parameter and momentum buffer after the update.  Fresh
    memory is NaN meanwhile, so that an element which no kernel writes shows.

    Args:
        model: in training mode; every layer takes its first argument's gradient, if any, from one
            other layer, and no parameter is in two of them.
        loss: of `(model(images), labels)`.
        optimizer: steps the parameters of `model`.

    Raises:
        FallbackError: the kernels do not take a call.
    """
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    with backend.use("triton"), backend.strict(), cases.poisoned_memory():
        with _recorded({**_layers(model), "loss": loss}) as calls:
            loss(model(images), labels).backward()
        found = [check for call in calls for check in _judge(call)]
        truth, baseline = (_update(optimizer, d) for d in (torch.float64, images.dtype))
        optimizer.step()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return found + list(_judge_update(optimizer, truth, baseline, names))


def _layers(model: Module) -> dict[str, Module]:
    return {name: layer for name, layer in model.named_modules() if not any(layer.children())}


@contextlib.contextmanager
def _recorded(layers: dict[str, Module]) -> Iterator[list[_Call]]:
    calls: list[_Call] = []
    before: dict[Module, Module] = {}
    handles = []

    def remember(layer: Module, arguments: tuple[Tensor, ...]) -> None:
        twin = revert(copy.deepcopy(layer), inplace=True)
        # a copy that kept these hooks would record itself whenever it is judged
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
        before[layer] = twin

    def record(name: str, layer: Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        for tensor in (*arguments, output):
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.retain_grad()
        calls.append(_Call(name, layer, before[layer], arguments, output))

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(remember))
        handles.append(layer.register_forward_hook(lambda *found, name=name: record(name, *found)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _values(layer: Module, arguments: tuple[Tensor, ...], output: Tensor) -> dict[str, Tensor]:
    """Everything that a step leaves at a layer."""
    values = {"output": output.detach()}
    if arguments[0].grad is not None:
        values["gradient of input"] = arguments[0].grad
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            values[f"gradient of {name}"] = parameter.grad
    return values | dict(layer.named_buffers())


def _evaluate(call: _Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """What torch.nn's layer makes of the same call in `dtype`."""
    layer = copy.deepcopy(call.before).to(dtype)
    arguments = tuple(
        argument.detach().to(dtype).requires_grad_(argument.requires_grad)
        if argument.is_floating_point()
        else argument
        for argument in call.arguments
    )
    output = layer(*arguments)
    output.backward(_grad(call).to(dtype))
    return _values(layer, arguments, output)


def _grad(call: _Call) -> Tensor:
    grad = call.output.grad
    if grad is None:
        raise RuntimeError(f"replay: no gradient reached the output of {call.name}")
    return grad


def _judge(call: _Call) -> Iterator[Check]:
    accuracy = {layer: spec.accuracy for spec in specs() for layer in spec.layers}
    kind = accuracy.get(type(call.before).__name__, "composite")
    truth, baseline = _evaluate(call, torch.float64), _evaluate(call, call.output.dtype)
    scales = {} if kind == "exact" else _scales(call, kind)
    for what, value in _values(call.layer, call.arguments, call.output).items():
        verdict = tolerances.compare(
            value,
            baseline[what] if kind == "exact" else truth[what],
            baseline=baseline[what],
            exact=kind == "exact",
            **scales.get(what, {}),
        )
        yield Check(f"{call.name}: {what}", verdict)


def _scales(call: _Call, kind: str) -> dict[str, Scale]:
    layer = copy.deepcopy(call.before).double()
    parameters = dict(layer.named_parameters())
    count = len(call.arguments)

    def output(*values: Tensor) -> Tensor:
        named = dict(zip(parameters, values[count:], strict=True))
        made: Tensor = torch.func.functional_call(layer, named, values[:count])
        return made

    derive = derive_scales if kind == "multilinear" else derive_conditions
    derived = derive(output, [*call.arguments, *parameters.values()], _grad(call))
    names = ["input", *[""] * (count - 1), *parameters]
    grads = zip(names, derived.grads, strict=True)
    return {"output": derived.output} | {
        f"gradient of {name}": scale for name, scale in grads if scale is not None
    }


def _judge_update(
    ours: torch.optim.SGD,
    truth: torch.optim.SGD,
    baseline: torch.optim.SGD,
    names: dict[Tensor, str],
) -> Iterator[Check]:
    optimizers = (ours, truth, baseline)
    for parameters in zip(*map(_parameters, optimizers), strict=True):
        name = names[parameters[0]]
        yield Check(f"{name}: updated", _compare(*parameters))
        buffers = [
            optimizer.state[parameter].get("momentum_buffer")
            for optimizer, parameter in zip(optimizers, parameters, strict=True)
        ]
        if buffers[0] is not None:
            yield Check(f"{name}: momentum buffer", _compare(*buffers))


def _parameters(optimizer: torch.optim.SGD) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _compare(value: Tensor, truth: Tensor, baseline: Tensor) -> Verdict:
    return tolerances.compare(value, truth, baseline=baseline)


def _update(optimizer: torch.optim.SGD, dtype: torch.dtype) -> torch.optim.SGD:
    """torch's optimizer after the same step in `dtype`."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        copies = [parameter.detach().to(dtype, copy=True) for parameter in group["params"]]
        for made, parameter in zip(copies, group["params"], strict=True):
            made.grad = parameter.grad.to(dtype)
        groups.append({**group, "params": copies})
    torchs = torch.optim.SGD(groups)
    # a copy: buffers of the same dtype would be shared; of another they are converted
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torchs.step()
    return torchs
