"""torch.optim with kernels: SGD, Adam and AdamW are torch's classes with another step, everything
else is torch's own.

`import tritorch.optim as optim` stands for `import torch.optim as optim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tritorch import backend, ops

_SCALARS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize")

# what `from tritorch.optim import *` brings
__all__ = torch.optim.__all__


def __getattr__(name: str) -> Any:
    return getattr(torch.optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` that updates a parameter group in one launch for each dtype and device.

    Arguments, state, checkpoints, hooks and errors are torch's.  16-bit parameters and buffers are
    updated in float32 and rounded once a step, as in torch's fused implementation but not in its
    others.  A step in which some parameters have their first gradient, and others do not, takes a
    second launch.

    A group goes to torch's own step, counted in `tritorch.backend.explain()`, if it asks for
    another implementation (`foreach=False`, `fused=True`, `differentiable=True`), if a number such
    as `lr` is a tensor on a GPU or one that requires a gradient, if a gradient is sparse, and while
    a CUDA graph is captured.  `foreach=True`, many tensors at once, is what the kernels do.

    Source: `torch.optim.SGD`.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)  # type: ignore[no-untyped-call]
        new = [i for i, buffer in enumerate(buffers) if buffer is None]
        declined = self._declined(group, params, has_sparse_grad)
        if backend.runs_triton("sgd_step", *params, declined=declined):
            _step(group, params, grads, buffers, new)
        else:
            sgd(
                params,
                grads,
                buffers,
                has_sparse_grad=has_sparse_grad,
                foreach=group["foreach"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                **{name: group[name] for name in (*_SCALARS, *_FLAGS)},
            )
        for i in new:
            self.state[params[i]]["momentum_buffer"] = buffers[i]

    def _declined(
        self, group: dict[str, Any], params: list[Tensor], has_sparse_grad: bool
    ) -> str | None:
        scalars = {name: group[name] for name in _SCALARS}
        sparse = "a sparse gradient" if has_sparse_grad else None
        return _declined(self, group, params, scalars) or sparse


def _declined(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    scalars: dict[str, Any],
) -> str | None:
    """Why a group goes to torch's own step."""
    for name in ("differentiable", "fused"):
        if group[name]:
            return f"{name}=True"
    # None leaves the choice to the optimizer
    if group["foreach"] is False:
        return "foreach=False"
    for name, value in scalars.items():
        if isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
            return f"{name} is a tensor on a GPU, or requires a gradient"
    if getattr(optimizer, "grad_scale", None) is not None:
        return "grad_scale is set"
    if params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def _step(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Any],
    new: list[int],
) -> None:
    """Steps by the kernels; puts buffers where `buffers` has None, at the places `new`."""
    arguments: dict[str, Any] = {name: float(group[name]) for name in _SCALARS}
    arguments |= {name: group[name] for name in _FLAGS}
    # there are none without momentum
    if not new:
        ops.sgd_step(params, grads, buffers, **arguments)
        return
    for i in new:
        buffers[i] = torch.empty_like(params[i])
    old = sorted(set(range(len(params))) - set(new))
    for chosen, first in ((old, False), (new, True)):
        lists = ([tensors[i] for i in chosen] for tensors in (params, grads, buffers))
        ops.sgd_step(*lists, **arguments, first=first)


class _AdamStep(torch.optim.Optimizer):
    """The step of Adam and AdamW."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        max_exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        has_complex = self._init_group(group, *lists)  # type: ignore[attr-defined]
        scalars: dict[str, Any] = {n: group[n] for n in ("lr", "eps", "weight_decay")}
        scalars["beta1"], scalars["beta2"] = group["betas"]
        flags: dict[str, Any] = {
            n: group[n] for n in ("amsgrad", "maximize", "decoupled_weight_decay")
        }
        capturable = group["capturable"]
        declined = _declined(self, group, params, scalars)
        if capturable and not all(step.is_cuda for step in steps):
            declined = declined or "capturable=True with steps that are not on a GPU"
        if backend.runs_triton("adam_step", *params, declined=declined):
            numbers: dict[str, Any] = {name: float(value) for name, value in scalars.items()}
            ops.adam_step(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                capturable=capturable,
                **numbers,
                **flags,
            )
            return
        adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            has_complex=has_complex,
            foreach=group["foreach"],
            capturable=capturable,
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            **scalars,
            **flags,
        )


class Adam(_AdamStep, torch.optim.Adam):
    """`torch.optim.Adam` that updates a parameter group in one launch for each dtype and device.

    Arguments, state, checkpoints, hooks and errors are torch's.  16-bit parameters and averages are
    updated in float32 and rounded once a step, as in torch's fused implementation but not in its
    others.  Parameters whose first gradient came later have another bias correction, and take a
    launch of their own.  With `capturable=True` the steps are on the GPU and the host waits for
    nothing.

    A group goes to torch's own step, counted in `tritorch.backend.explain()`, if it asks for
    another implementation (`foreach=False`, `fused=True`, `differentiable=True`), if a number is a
    tensor on a GPU or one that requires a gradient, if a parameter is complex, and while a CUDA
    graph is captured.  `foreach=True`, many tensors at once, is what the kernels do.

    Source: `torch.optim.Adam`.
    """


class AdamW(_AdamStep, torch.optim.AdamW):
    """`torch.optim.AdamW`; everything said of `Adam` applies.

    Source: `torch.optim.AdamW`.
    """
