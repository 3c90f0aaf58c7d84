"""What a user of torch would have called instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from tritorch.registry import OpSpec

COMPILED = "torch.compile"


def of_torch(spec: OpSpec) -> Callable[..., Any]:
    """Torch's fast counterpart of an op: its reference, but where that is written to be read."""
    return _COUNTERPARTS.get(spec.name, spec.reference)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, **_: object) -> Tensor:
    return F.dropout(input, p, training)


def _sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    buffers: list[Tensor | None] = list(momentum_buffers) if momentum else [None] * len(params)
    sgd(
        params,
        grads,
        buffers if not first else [None] * len(params),
        has_sparse_grad=False,
        # what torch.optim chooses for tensors on a GPU
        foreach=params[0].is_cuda,
        fused=False,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
    )


def _adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    decoupled_weight_decay: bool = False,
    capturable: bool = False,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    step: Any = adamw if decoupled_weight_decay else adam
    step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        foreach=params[0].is_cuda,
        # which torch takes on a GPU alone
        capturable=capturable and params[0].is_cuda,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
    )


_COUNTERPARTS: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "sgd_step": _sgd_step,
    "adam_step": _adam_step,
}


def compiled(function: Callable[..., Any], *, again: bool = False) -> Callable[..., Any]:
    """The function under torch.compile, for the shapes of its calls alone.

    `again`: whether one call is differentiated again and again.  Forgets what was compiled before:
    the compiler gives up on a function that it has compiled for eight shapes.
    """
    torch.compiler.reset()
    config: Any = importlib.import_module("torch._functorch.config")
    # otherwise a gradient may be computed in the memory of what it is computed from
    config.donated_buffer = not again
    return torch.compile(function, dynamic=False)


def use_fast_algorithms() -> None:
    """What a careful user of torch sets: the fastest convolution of those that cuDNN has."""
    torch.backends.cudnn.benchmark = True


def use_full_float32() -> None:
    """No TF32 on either side."""
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = "ieee"
