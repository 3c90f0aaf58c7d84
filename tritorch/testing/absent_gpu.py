"""A stand-in for an absent GPU: the answers that host code gets when it asks for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tritorch.testing import dry

DEVICE = torch.device("cuda", 0)
# of an H100 SXM, from its data sheet; kHz, bits, bytes
CLOCKS = {"sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}
REGISTERS = 65_536
_MEMORY = 80 << 30
_L2 = 50 << 20


def target() -> dry.Target:
    """The GPU that user code is told it has."""
    return dry.active() or dry.TARGETS["sm_90"]


class Device(contextlib.nullcontext[None]):
    """`torch.cuda.device`: there is one, so it is the current one."""

    def __init__(self, device: object) -> None:
        super().__init__()


class Stream:
    """A stream of the absent GPU: work put on it has already finished."""

    cuda_stream = stream_id = device_index = priority = 0
    device = DEVICE

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Event:
    """An event on such a stream."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        # no real time is measured, and zero would divide
        return 1.0


def _properties(device: object = None) -> SimpleNamespace:
    gpu = target()
    major, minor = _capability()
    return SimpleNamespace(
        name=_name(),
        major=major,
        minor=minor,
        total_memory=_MEMORY,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=REGISTERS,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=gpu.warp_size,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory,
        # the driver reserves one KiB of each block's
        shared_memory_per_multiprocessor=gpu.shared_memory + 1024,
        L2_cache_size=_L2,
        gcnArchName=str(gpu.arch),
        is_integrated=0,
        is_multi_gpu_board=0,
    )


def _capability(device: object = None) -> tuple[int, int]:
    digits = int("".join(filter(str.isdigit, target().name)))
    return (9, 4) if target().backend == "hip" else divmod(digits, 10)


def _name(device: object = None) -> str:
    gpu = target()
    return f"{'AMD Instinct' if gpu.backend == 'hip' else 'NVIDIA'} {gpu.product}"


def _context(*args: object, **options: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _seed(seed: int) -> None:
    # torch.manual_seed would come back here
    torch.default_generator.manual_seed(seed)


def _current(*args: object) -> Stream:
    return Stream()


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value


# torch.cuda, by name
_MODULE: dict[str, Callable[..., Any]] = {
    "is_available": _constant(True),
    "is_initialized": _constant(True),
    "is_bf16_supported": _constant(True),
    "is_current_stream_capturing": _constant(False),
    "init": _constant(None),
    "device_count": _constant(1),
    "current_device": _constant(0),
    "set_device": _constant(None),
    "get_device_name": _name,
    "get_device_capability": _capability,
    "get_device_properties": _properties,
    "get_arch_list": lambda: [f"sm_{n}" for n in (80, 90, 100)],
    "current_stream": _current,
    "default_stream": _current,
    "set_stream": _constant(None),
    "stream": _context,
    "device": Device,
    "device_of": Device,
    "synchronize": _constant(None),
    "empty_cache": _constant(None),
    "memory_allocated": _constant(0),
    "max_memory_allocated": _constant(0),
    "memory_reserved": _constant(0),
    "max_memory_reserved": _constant(0),
    "memory_stats": lambda *args: {},
    "reset_peak_memory_stats": _constant(None),
    "reset_max_memory_allocated": _constant(None),
    "mem_get_info": _constant((_MEMORY, _MEMORY)),
    "manual_seed": _seed,
    "manual_seed_all": _seed,
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    "Stream": Stream,
    "Event": Event,
}
_ACCELERATOR: dict[str, Callable[..., Any]] = {
    "is_available": _constant(True),
    "current_accelerator": _constant(torch.device("cuda")),
    "device_count": _constant(1),
    "current_device_index": _constant(0),
    "set_device_index": _constant(None),
    "current_stream": _current,
    "set_stream": _constant(None),
    "synchronize": _constant(None),
}
_NVTX: dict[str, Callable[..., Any]] = {
    "range": _context,
    "range_push": _constant(0),
    "range_pop": _constant(0),
    "mark": _constant(None),
}


# by the path of their owner below torch
ANSWERS: dict[str, dict[str, Callable[..., Any]]] = {
    "cuda": _MODULE,
    "cuda.nvtx": _NVTX,
    "accelerator": _ACCELERATOR,
}
