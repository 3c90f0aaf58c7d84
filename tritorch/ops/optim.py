"""SGD's update of many tensors: reference, launch over a table of addresses, declaration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("optim")


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
    if _is_captured(like):
        checks.fail(RuntimeError, "sgd_step", "a captured graph would outlive the table it reads")
    # elements are paired by their place in memory: strides would slow every model for a rare one
    dense = [param if _is_dense(param) else param.contiguous() for param in params]
    paired_grads = [_laid_out_like(*pair) for pair in zip(grads, dense, strict=True)]
    paired_buffers = momentum_buffers
    if momentum:
        paired_buffers = [
            _laid_out_like(*pair) for pair in zip(momentum_buffers, dense, strict=True)
        ]
    config = launch.config(kernels.sgd_step_config, like.element_size())
    device = like.device
    place = (device, torch.cuda.current_stream(device).cuda_stream if like.is_cuda else 0)
    counts = tuple([param.numel() for param in dense])
    owners, firsts, programs = _programs(counts, config.kwargs["BLOCK"], *place)
    table = _table(
        tuple([param.data_ptr() for param in dense]),
        tuple([grad.data_ptr() for grad in paired_grads]),
        tuple([buffer.data_ptr() for buffer in paired_buffers]),
        counts,
        firsts,
        *place,
    )
    launch.run(
        kernels.sgd_step_kernel,
        (programs,),
        like,
        owners,
        table,
        len(counts),
        lr,
        momentum,
        # a new buffer takes the gradient as it is
        1.0 if first else 1 - dampening,
        weight_decay,
        int(first),
        on=like,
        config=config,
        HAS_MOMENTUM=momentum != 0,
        HAS_WEIGHT_DECAY=weight_decay != 0,
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
    )
    for written, walked in ((params, dense), (momentum_buffers, paired_buffers)):
        for tensor, copy in zip(written, walked, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
        torch.autograd.graph.increment_version(written)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or _has_no_gaps(tuple(tensor.shape), tensor.stride())


@functools.lru_cache(maxsize=1024)
def _has_no_gaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _laid_out_like(tensor: Tensor, dense: Tensor) -> Tensor:
    if (tensor.is_contiguous() and dense.is_contiguous()) or tensor.stride() == dense.stride():
        return tensor
    return torch.empty_like(dense).copy_(tensor)


@functools.lru_cache(maxsize=64)
def _programs(
    counts: tuple[int, ...], block: int, device: torch.device, stream: int
) -> tuple[Tensor, tuple[int, ...], int]:
    """Each program's tensor, each tensor's first program, the number of programs."""
    programs = torch.tensor([-(-count // block) for count in counts], device="cpu")
    owners = torch.repeat_interleave(programs)
    firsts = programs.cumsum(0) - programs
    return _upload(owners.int(), device), tuple(firsts.tolist()), owners.numel()


# keyed by the stream too: another one would not wait for the copy
@functools.lru_cache(maxsize=64)
def _table(
    params: tuple[int, ...],
    grads: tuple[int, ...],
    momentum_buffers: tuple[int, ...],
    counts: tuple[int, ...],
    firsts: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> Tensor:
    rows = [params, grads, momentum_buffers or (0,) * len(params), counts, firsts]
    return _upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    # a copy from pinned memory is queued: the host waits for nothing
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


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
    recorded for autograd, and the version counters of what is written move.

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
    _check(lists.params, lists.grads, lists.momentum_buffers if momentum else None)
    scalars: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
        "first": first,
    }
    for group in _by_dtype_and_device(lists):
        takes = backend.runs_triton(
            "sgd_step",
            *group.params,
            *group.grads,
            *group.momentum_buffers,
            declined=_declined(*group),
        )
        step = _sgd_step_ if takes else sgd_step_reference
        step(*group, **scalars)


def _check(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor] | None
) -> None:
    for name, others in (("grads", grads), ("momentum_buffers", momentum_buffers)):
        if others is None:
            continue
        if len(others) != len(params):
            counts = {"params": len(params), name: len(others)}
            checks.fail(ValueError, "sgd_step", f"expected as many {name} as params", **counts)
        for param, other in zip(params, others, strict=True):
            if other.shape != param.shape or other.device != param.device:
                rule = f"expected {name} of the parameters' shapes and devices"
                checks.fail(RuntimeError, "sgd_step", rule, param=param, **{name: other})
    for tensor in (*params, *(momentum_buffers or ())):
        if not tensor.is_contiguous():
            checks.writable("sgd_step", tensor)


def _by_dtype_and_device(lists: _Lists) -> list[_Lists]:
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, param in enumerate(lists.params):
        groups.setdefault((param.dtype, param.device), []).append(index)
    if len(groups) == 1:
        return [lists]
    return [
        _Lists(*([tensors[index] for index in indices] if tensors else [] for tensors in lists))
        for indices in groups.values()
    ]


def _declined(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]
) -> str | None:
    dtype = params[0].dtype
    if any(tensor.dtype != dtype for tensor in (*grads, *momentum_buffers)):
        return "a gradient or a momentum buffer of another dtype than its parameter"
    return "a CUDA graph is being captured" if _is_captured(params[0]) else None


def _is_captured(tensor: Tensor) -> bool:
    # the compiler cannot trace the question, and knows the answer from the op's tag
    if torch.compiler.is_compiling():
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convs.append((4 * width, inputs, 1, 1))
            for conv in convs:
                shapes += [conv, conv[:1], conv[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _made(
    make: Callable[..., Tensor], *shapes: tuple[int, ...], **scalars: float
) -> dict[str, Any]:
    return {n: [make(*shape) for shape in shapes] for n in _Lists._fields} | {"lr": 0.1} | scalars


def _samples(make: Maker) -> Iterator[Sample]:
    # a program takes 1024 or 2048 elements
    edges = ((1,), (0, 3), (), (1023,), (2048,), (2049,), (3, 5, 7))
    yield Sample("none", **_made(make, momentum=0.9))
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


def _workloads(make: Maker) -> Iterator[Sample]:
    empty, shapes = make.empty, _resnet50_shapes()
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
        kernels=("optim.sgd_step_kernel",),
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
