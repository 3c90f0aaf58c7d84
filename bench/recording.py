"""What a call of an op or of a user's function launches, recorded while nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritorch import backend
from tritorch.testing import dry, hosting
from tritorch.testing.calls import call, map_tensors, outputs_of


@dataclass(frozen=True)
class Recorded:
    """The launches of both passes; `configurations` of the autotuned kernels, by name."""

    forward: list[dry.Launch]
    backward: list[dry.Launch]
    configurations: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def launches(self) -> list[dry.Launch]:
        return self.forward + self.backward


def record(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    target: str,
    *,
    gradients: Iterable[str] = (),
    hosted: bool = False,
    configuration: Any = None,
) -> Recorded:
    """Calls `function` for a target of `dry.TARGETS`, forward and, where gradients flow, backward.

    `hosted`: it is a user's, see `hosting`, and `configuration` is what its autotuned kernels run.
    """
    # tensors without memory would not reach the kernels, and this memory is never touched
    given: dict[str, Any] = {name: map_tensors(v, _unwritten) for name, v in arguments.items()}
    for name in gradients:
        if isinstance(given.get(name), Tensor) and given[name].is_floating_point():
            given[name].requires_grad_()
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.use("triton"))
        recorder = stack.enter_context(dry.compiling_for(target))
        host = stack.enter_context(hosting.hosted(configuration)) if hosted else None
        outputs = [o for o in outputs_of(call(function, given)) if o.requires_grad]
        before = len(recorder.launches)
        if outputs and leaves:
            grads = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    known = {} if host is None else host.configurations
    return Recorded(recorder.launches[:before], recorder.launches[before:], known)


def _unwritten(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu" and tensor.dim() == 0:
        # host code looks at numbers: a step count, say
        return tensor.detach().clone()
    if tensor.numel() == 0 or tensor.dtype.is_floating_point:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    # and at lengths and indices, of which zero is always one
    return torch.zeros_like(tensor, device="cpu")
