"""SGD's update of many tensors: reference, launch over a table of addresses, declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import multi_tensor
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("sgd")


class _Lists(NamedTuple):
    """Tensors by number; no buffers without momentum."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]


@torch.no_grad()
def sgd_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """One tensor after the other, as torch's own loop does it."""
    buffers: Sequence[Tensor | None] = momentum_buffers if momentum else [None] * len(params)
    for param, grad, buffer in zip(params, grads, buffers, strict=True):
        if maximize:
            grad = -grad
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        if buffer is not None:
            if first:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(grad, alpha=-lr)


@binding.library_op(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
    "bool first) -> ()",
    fake=lambda *arguments: None,
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    like = params[0]
    if multi_tensor.is_captured(like):
        checks.fail(RuntimeError, "sgd_step", "a captured graph would outlive the table it reads")
    dense = multi_tensor.dense(params)
    paired_grads = multi_tensor.paired(grads, dense)
    paired_buffers = multi_tensor.paired(momentum_buffers, dense) if momentum else []
    config = launch.config(kernels.sgd_step_config, like.element_size())
    place = multi_tensor.place(like)
    counts = tuple([param.numel() for param in dense])
    owners, firsts, programs = multi_tensor.programs(counts, config.kwargs["BLOCK"], *place)
    lists = (dense, paired_grads, paired_buffers)
    rows = [multi_tensor.addresses(tensors, len(counts)) for tensors in lists]
    table = multi_tensor.table(*place, *rows, counts, firsts)
    flags = (
        ("HAS_MOMENTUM", momentum != 0),
        ("HAS_WEIGHT_DECAY", weight_decay != 0),
        ("NESTEROV", nesterov),
        ("MAXIMIZE", maximize),
    )
    run = _plan(config, programs, len(counts), int(first), flags)
    # a new buffer takes the gradient as it is
    gain = 1.0 if first else 1 - dampening
    run(like, like, owners, table, floats=(lr, momentum, gain, weight_decay))
    multi_tensor.write_back(params, dense)
    if momentum:
        multi_tensor.write_back(momentum_buffers, paired_buffers)


@launch.planned
def _plan(
    config: Any, programs: int, tensors: int, first: int, flags: tuple[tuple[str, bool], ...]
) -> launch.Prepared:
    numbers = (tensors, first)
    return launch.Prepared(kernels.sgd_step_kernel, (programs,), numbers, config, **dict(flags))


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """One step of stochastic gradient descent, in place, in one launch for each dtype and device.

    With g = grad, negated by `maximize`, plus weight_decay * param:

        buffer = momentum * buffer + (1 - dampening) * g        (buffer = g if `first`)
        param  = param - lr * (g + momentum * buffer if `nesterov` else buffer)

    and param - lr * g without momentum.  The kernels keep all of it in float32 (float64 for
    float64) and round buffer and param once; torch's loop rounds after every operation.  Nothing is
    recorded for autograd, and the version counters of written tensors increase.

    Args:
        params: any shapes, mixed dtypes; the kernels take float32, float16, bfloat16 and float64.
        grads: one for each parameter, of its shape and device.
        momentum_buffers: one for each parameter, of its shape and device; without momentum they are
            ignored, and the list may be empty.
        first: the buffers are new, and what they hold is not read.

    Tensors that do not lie in memory like a dense parameter are copied there and back.

    Raises:
        ValueError: the lists differ in length.
        RuntimeError: a shape or a device differs, or what is written is expanded.

    Source: `torch.optim.SGD`.
    """
    lists = _Lists(list(params), list(grads), list(momentum_buffers) if momentum else [])
    others = {"grads": lists.grads}
    if momentum:
        others["momentum_buffers"] = lists.momentum_buffers
    written = (*lists.params, *lists.momentum_buffers)
    multi_tensor.check_lists("sgd_step", lists.params, written, **others)
    scalars: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "first": first,
    }
    for group in multi_tensor.by_dtype_and_device(lists):
        beside = (*group.grads, *group.momentum_buffers)
        declined = multi_tensor.declined(group.params, beside, "a momentum buffer")
        takes = backend.runs_triton("sgd_step", *group.params, declined=declined)
        step = _sgd_step_ if takes else sgd_step_reference
        step(*group, **scalars)


def _made(
    make: Callable[..., Tensor], *shapes: tuple[int, ...], **scalars: float
) -> dict[str, Any]:
    return {n: [make(*shape) for shape in shapes] for n in _Lists._fields} | {"lr": 0.1} | scalars


def _samples(make: Maker) -> Iterator[Sample]:
    # a program takes 1024 or 2048 elements
    edges = ((1,), (0, 3), (), (1023,), (2048,), (2049,), (3, 5, 7))
    yield Sample("plain", **_made(make, *edges))
    yield Sample("weight-decay", **_made(make, (7, 5), weight_decay=0.1, maximize=True))
    yield Sample("first", **_made(make, (7,), (5, 3), momentum=0.9, dampening=0.5, first=True))
    yield Sample("dampening", **_made(make, *edges, momentum=0.9, dampening=0.5, maximize=True))
    images = _made(make, (2, 3, 5, 7), (31,), momentum=0.9, weight_decay=0.1, nesterov=True)
    yield Sample("nesterov", layouts=True, **images)
    # a slice of a flat parameter starts anywhere
    flat = _made(make, (2100,), momentum=0.9, weight_decay=0.1)
    yield Sample("misaligned", **flat | {name: [flat[name][0][1:]] for name in _Lists._fields})
    strided: dict[str, Any] = {
        "params": [make(4, 6)[:, ::2], make(2, 3, 5, 7), make(3, 4)],
        "grads": [make(3, 4).t(), make(2, 3, 7, 5).transpose(2, 3), make(4).expand(3, 4)],
        "momentum_buffers": [make(4, 3), make(2, 3, 5, 7), make(4, 3).t()],
    }
    yield Sample("strided", **strided, lr=0.1, momentum=0.9)
    yield Sample("none", **_made(make, momentum=0.9))


def _workloads(make: Maker) -> Iterator[Sample]:
    empty, shapes = make.empty, multi_tensor.resnet50_shapes()
    yield Sample("resnet50", **_made(empty, *shapes, momentum=0.9, weight_decay=1e-4))
    yield Sample("resnet50-nesterov", **_made(empty, *shapes, momentum=0.9, nesterov=True))
    yield Sample("one-odd", **_made(empty, (4099, 4097)))
    yield Sample("one-odd-maximize", **_made(empty, (4099, 4097), maximize=True))


def _rejects(make: Maker) -> Iterator[Reject]:
    good, four = _made(make, (3,), momentum=0.9), [make(4)]
    yield Reject("fewer-grads", r"as many grads.*params 1, grads 0", **good | {"grads": []})
    yield Reject("fewer-buffers", r"as many momentum_buffers", **good | {"momentum_buffers": []})
    yield Reject("grad-shape", r"expected grads.*\(3,\).*\(4,\)", **good | {"grads": four})
    yield Reject("buffer-shape", r"buffers.*\(4,\)", **good | {"momentum_buffers": four})
    yield Reject("expanded", r"expanded tensor", **good | {"params": [make(1).expand(3)]})


def _cost(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    **scalars: float,
) -> dict[str, Cost]:
    flops = 2 + 2 * bool(weight_decay) + maximize
    tensors = 3
    if momentum:
        flops += (0 if first else 3) + 2 * nesterov
        tensors += 1 if first else 2
    numel = sum(param.numel() for param in params)
    size = sum(param.numel() * param.element_size() for param in params)
    return {"forward": Cost(flops * numel, tensors * size), "backward": Cost(0, 0)}


register(
    OpSpec(
        name="sgd_step",
        op=sgd_step,
        reference=sgd_step_reference,
        kernels=("sgd.sgd_step_kernel",),
        gradients=(),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.optim.SGD",
        mutates=("params", "momentum_buffers"),
        double_backward=False,
        non_finite=(),
        notes="the update of tritorch.optim.SGD",
    )
)
