"""One launch over many tensors: a table of addresses, and the programs that own parts of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tritorch import checks, launch

# device and stream: another stream would not wait for the copy of a table
Place = tuple[torch.device, int]

# a NamedTuple of lists of tensors
_Lists = TypeVar("_Lists", bound=tuple[list[Tensor], ...])


def place(like: Tensor) -> Place:
    """Device and stream of the tables for tensors like this one."""
    device = like.device
    return (device, torch.cuda.current_stream(device).cuda_stream if like.is_cuda else 0)


def dense(params: Sequence[Tensor]) -> list[Tensor]:
    """The parameters, or dense copies of those whose memory has gaps.

    Elements are paired by their position in memory: to support strides would slow every model for a
    rare one.
    """
    return [
        param
        if param.is_contiguous() or _has_no_gaps(param.shape, param.stride())
        else param.contiguous()
        for param in params
    ]


def paired(tensors: Sequence[Tensor], dense: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or copies of those that are not laid out like their dense parameter."""
    # there are hundreds, and a function call for each would take twice as long
    if [one.stride() for one in tensors] == [one.stride() for one in dense]:
        return list(tensors)
    return [_laid_out_like(*pair) for pair in zip(tensors, dense, strict=True)]


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


def write_back(written: Sequence[Tensor], walked: Sequence[Tensor]) -> None:
    """Copies results back from tensors in another layout; tells autograd of every write."""
    for tensor, copy in zip(written, walked, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)
    launch.count_write(*written)


@functools.lru_cache(maxsize=64)
def programs(
    counts: tuple[int, ...], block: int, device: torch.device, stream: int
) -> tuple[Tensor, tuple[int, ...], int]:
    """Each program's tensor, each tensor's first program, the number of programs."""
    programs = torch.tensor([-(-count // block) for count in counts], device="cpu")
    owners = torch.repeat_interleave(programs)
    firsts = programs.cumsum(0) - programs
    return _upload(owners.int(), device), tuple(firsts.tolist()), owners.numel()


@functools.lru_cache(maxsize=64)
def table(device: torch.device, stream: int, *rows: tuple[int, ...]) -> Tensor:
    """The rows on the device, int64: addresses, counts."""
    return _upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


def addresses(tensors: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """The tensors' addresses, as a row of a table; zeros if there are no tensors."""
    return tuple([tensor.data_ptr() for tensor in tensors]) or (0,) * count


def _upload(table: Tensor, device: torch.device) -> Tensor:
    # a copy from pinned memory is queued: the host waits for nothing
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def by_dtype_and_device(lists: _Lists) -> list[_Lists]:
    """The lists, split into groups that one launch can take; the first list is the parameters."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, param in enumerate(lists[0]):
        groups.setdefault((param.dtype, param.device), []).append(index)
    if len(groups) == 1:
        return [lists]
    return [chosen(lists, indices) for indices in groups.values()]


def chosen(lists: _Lists, indices: Sequence[int]) -> _Lists:
    """The tensors with these indices from each list; empty lists stay empty."""
    kind: Any = type(lists)
    picked: _Lists = kind(*([some[i] for i in indices] if some else [] for some in lists))
    return picked


def check_lists(
    op: str, params: Sequence[Tensor], written: Sequence[Tensor], **others: Sequence[Tensor]
) -> None:
    """ValueError or RuntimeError unless every list has a tensor of each parameter's shape and
    device, and tensors to be written can be.
    """
    shapes, devices = ([getattr(one, name) for one in params] for name in ("shape", "device"))
    for name, tensors in others.items():
        if len(tensors) != len(params):
            counts = {"params": len(params), name: len(tensors)}
            checks.fail(ValueError, op, f"expected as many {name} as params", **counts)
        if [one.shape for one in tensors] == shapes and [one.device for one in tensors] == devices:
            continue
        for param, tensor in zip(params, tensors, strict=True):
            if tensor.shape != param.shape or tensor.device != param.device:
                rule = f"expected {name} of the parameters' shapes and devices"
                checks.fail(RuntimeError, op, rule, param=param, **{name: tensor})
    compiling = torch.compiler.is_compiling()
    for tensor in written:
        if not tensor.is_contiguous() or (not compiling and tensor.is_inference()):
            checks.writable(op, tensor)


def declined(params: Sequence[Tensor], others: Sequence[Tensor], what: str) -> str | None:
    """Why no kernel takes parameters of one dtype with gradients and others, called `what`."""
    if {one.dtype for one in others} - {params[0].dtype}:
        return f"a gradient or {what} of another dtype than its parameter"
    if {one.layout for one in others} - {torch.strided}:
        return "a sparse gradient"
    return "a CUDA graph is being captured" if is_captured(params[0]) else None


def is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would outlive the table that it reads."""
    # torch.compile cannot trace the check, and knows the answer from the op's tag
    if torch.compiler.is_compiling():
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The parameters of ResNet-50, a workload."""
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
