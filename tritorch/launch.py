"""Launches kernels: which configuration, on which device, under which of Triton's modes.

Knows no op.  Kernels are imported when the first one is launched, so that the reference path needs
no Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from tritorch import backend, bound, hardware, tuned
from tritorch.protocols import Composer, Watcher
from tritorch.testing import dry, interpreter

# programs along the second and the third axis of a grid, of which CUDA takes no more
_MAX_GRID_YZ = 65535

_Item = TypeVar("_Item")

_overrides: dict[str, Any] = {}
_recorders: list[list[str]] = []
_choices: list[list[tuple[str, Any]]] = []
_questions: list[list[tuple[str, tuple[int, ...]]]] = []


class _Thread(threading.local):
    watcher: Watcher | None = None
    composer: Composer | None = None
    # whether a call is under way of which nothing is repeated in parts
    is_whole = False


thread = _Thread()
_interpreting = threading.RLock()
# of the lists of `choices`, `questions` and `recorded`, which are read as tuples: a list that
# shrinks meanwhile would be read with gaps
_blocks = threading.Lock()
# how many detectors see every allocation and launch
detectors = 0


def count_write(*tensors: Tensor) -> None:
    """Has the versions of tensors count what a kernel writes, as autograd wants it."""
    torch.autograd.graph.increment_version(tensors)
    for listener in (thread.watcher, thread.composer):
        if listener is not None:
            listener.writes(tensors)


class Family:
    """The names of `tritorch.kernels.<family>`, imported when the first of them is asked for.

    Not importlib's lazy module: `inspect` looks at every module that Python knows, and so would
    import Triton.
    """

    def __init__(self, family: str) -> None:
        self._module = f"tritorch.kernels.{family}"

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        # later look-ups do not come here
        setattr(self, name, value)
        return value


def kernels(family: str) -> Family:
    """The device code of a family of ops, without importing it yet."""
    return Family(family)


def config(choose: Callable[..., Any], *sizes: int) -> Any:
    """The configuration for these sizes: the forced one inside `override`, else a measured one,
    else what `choose` says.

    `choose` is a kernel module's plain function `<kernel>_config`, from integers to a
    `triton.Config`, or to None where its kernel is not the one to launch.
    """
    name = choose.__name__
    if name in _overrides:
        chosen = _overrides[name]
    else:
        own = choose(*sizes)
        chosen = tuned.find(name, sizes, own or entry_of(choose)) or own
    for questions in tuple(_questions):
        questions.append((name, sizes))
    if chosen is not None:
        for record in tuple(_choices):
            record.append((name, chosen))
    return chosen


def is_decided(choose: Callable[..., Any], *sizes: int) -> bool:
    """Whether the configuration for these sizes is forced or measured, and no estimate."""
    name = choose.__name__
    if name in _overrides:
        return True
    return tuned.find(name, sizes, choose(*sizes) or entry_of(choose), warns=False) is not None


def entry_of(choose: Callable[..., Any]) -> Any:
    """Of the table that it chooses from the first, which has the numbers that its kernel takes."""
    table = getattr(sys.modules[choose.__module__], f"{choose.__name__.upper()}S", ())
    entries = next(iter(table.values())) if isinstance(table, Mapping) else table
    return entries[0] if entries else None


@contextlib.contextmanager
def override(name: str, forced: Any) -> Iterator[None]:
    """Inside the block the function `name` (`matmul_config`, ...) always chooses `forced`."""
    # None may be forced too
    previous = {name: _overrides[name]} if name in _overrides else {}
    _overrides[name] = forced
    try:
        yield
    finally:
        del _overrides[name]
        _overrides.update(previous)


@contextlib.contextmanager
def _collected(open_blocks: list[list[_Item]]) -> Iterator[list[_Item]]:
    """A list that is in `open_blocks` inside the block."""
    items: list[_Item] = []
    with _blocks:
        open_blocks.append(items)
    try:
        yield items
    finally:
        # the last one may be that of another thread, and lists of the same items are equal
        with _blocks:
            open_blocks[:] = [other for other in open_blocks if other is not items]


@contextlib.contextmanager
def choices() -> Iterator[list[tuple[str, Any]]]:
    """Collects (name of the choosing function, configuration) of the launches inside the block."""
    with _collected(_choices) as record:
        yield record


@contextlib.contextmanager
def questions() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Collects (name of the choosing function, sizes) of what the plans inside the block ask."""
    with _collected(_questions) as record:
        yield record


_Plan = TypeVar("_Plan")


def planned(plan: Callable[..., _Plan]) -> Callable[..., _Plan]:
    """Remembers what `plan` makes of its arguments, all hashable: layouts, numbers.

    Inside `override`, `choices`, `questions` and `tuned.using` it is asked again, because it may
    ask for a configuration.
    """
    remembered = functools.lru_cache(maxsize=4096)(plan)

    @functools.wraps(plan)
    def planned(*arguments: Any) -> _Plan:
        return (plan if _asks_again() else remembered)(*arguments)

    return planned


def planned_by_kernel(plan: Callable[..., _Plan]) -> Callable[..., _Plan]:
    """As `planned`, of a plan whose first argument is a kernel: Triton would hash its source."""
    by_kernel: dict[int, Callable[..., _Plan]] = {}

    @functools.wraps(plan)
    def planned(kernel: Any, *arguments: Any) -> _Plan:
        if _asks_again():
            return plan(kernel, *arguments)
        remembered = by_kernel.get(id(kernel))
        if remembered is None:
            # which holds the kernel, so that no other can have its address
            own = functools.partial(plan, kernel)
            remembered = by_kernel[id(kernel)] = functools.lru_cache(maxsize=4096)(own)
        return remembered(*arguments)

    return planned


def _asks_again() -> bool:
    return bool(_overrides or _choices or _questions or tuned.forced is not None)


def circumstances() -> tuple[Any, ...] | None:
    """The choices in force on which launches depend, besides what they are given; None where plans
    are asked again, somebody wants to hear of each launch, torch fills what is allocated, or
    nothing is to be repeated.
    """
    if (
        detectors
        or not backend.REPEATING
        or _recorders
        or _asks_again()
        or _is_watched()
        or torch.are_deterministic_algorithms_enabled()
    ):
        return None
    target = dry.active()
    return backend.current(), hardware.pretended, target and target.name


def is_captured() -> bool:
    """Whether the current stream is captured as a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Collects the names of the kernels launched inside the block, in order."""
    with _collected(_recorders) as names:
        yield names


class Prepared:
    """A launch of which all but the tensors is known: what a plan holds.

    The kernel takes tensors (descriptors, None), then `numbers`, then floats; `constants` are its
    `tl.constexpr` parameters (and num_warps where there is no `config`).  A grid with a zero
    launches nothing.
    """

    __slots__ = ("_bound", "_grid", "config", "constants", "grid", "kernel", "numbers")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        config: Any = None,
        **constants: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.config, self.constants = config, constants
        self._grid = (*grid, 1, 1)[:3]
        # compiled kernels by what Triton compiles tensors for: dtype and alignment, of descriptors
        # dtype and tile
        self._bound: dict[tuple[Any, ...], bound.Bound] = {}

    def __call__(self, on: Tensor, *tensors: Any, floats: tuple[float, ...] = ()) -> None:
        """Launches on the device of `on`."""
        if 0 in self._grid:
            return
        if thread.watcher is not None:
            thread.watcher.launches(self, on, tensors, floats)
            return
        device = _gpu(on)
        if device < 0 or backend.INTERPRETING:
            self._by_triton(on, (*tensors, *self.numbers, *floats))
            return
        if device != torch._C._cuda_getDevice():
            # a launch goes to the current device, which need not be the tensor's
            with torch.cuda.device(device):
                return self(on, *tensors, floats=floats)
        if _recorders or _is_watched():
            # what is compiled for a profiler must not outlive it
            self._by_triton(on, (*tensors, *self.numbers, *floats))
            return
        key = _key(device, tensors)
        found = self._bound.get(key)
        if found is None:
            arguments = (*tensors, *self.numbers, *floats)
            compiled = self._by_triton(on, arguments)
            options = hardware.options(self.config, self.constants)
            self._bound[key] = bound.bind(self.kernel, compiled, arguments, options)
            return
        run, head, maps, constants = found
        run(
            *self._grid,
            torch._C._cuda_getCurrentRawStream(device),
            *head,
            *(tensors if maps is None else maps(tensors)),
            *self.numbers,
            *floats,
            *constants,
        )

    def ready(self, on: Tensor, tensors: Sequence[Any], floats: tuple[float, ...]) -> Ready:
        """The launch that was made of these, for tensors that Triton compiles alike."""
        device = _gpu(on)
        found = None if device < 0 else self._bound.get(_key(device, tensors))
        if found is None:
            return Ready(-1, functools.partial(self, floats=floats), (), (), None, ())
        run, head, maps, constants = found
        return Ready(device, run, self._grid, head, maps, (*self.numbers, *floats, *constants))

    def _by_triton(self, on: Tensor, arguments: tuple[Any, ...]) -> Any:
        """Launches as Triton does it, which takes ten times as long, and returns what it compiled.

        Raises:
            RuntimeError: there is nothing that could run the kernel.
            ValueError: the grid is larger than CUDA takes.
        """
        name = self.kernel.__name__
        if any(size > _MAX_GRID_YZ for size in self.grid[1:]):
            raise ValueError(
                f"launch: {name} has a grid of {self.grid}, of which CUDA takes at most "
                f"{_MAX_GRID_YZ} along the second and the third axis"
            )
        for names in tuple(_recorders):
            names.append(name)
        launch, options = self.kernel[self.grid], hardware.options(self.config, self.constants)
        if backend.INTERPRETING:
            # CUDA tensors too: the interpreter copies them to the CPU and back; it changes Triton's
            # own modules while it runs, so that threads take turns
            with _interpreting, interpreter.corrected():
                return launch(*arguments, **options)
        if _gpu(on) < 0 and dry.active() is None:
            raise RuntimeError(
                f"launch: {name} needs a CUDA tensor, or TRITON_INTERPRET=1 in the environment "
                f"before Python starts, received a tensor on {on.device}"
            )
        return launch(*arguments, **options)


class Ready(NamedTuple):
    """A launch on the device, called as run(*grid, stream, *head, *tensors, *rest) with the tensors
    as `maps` makes them; or, of device -1, as run(tensor on the device, *tensors).
    """

    device: int
    run: Callable[..., None]
    grid: tuple[int, ...]
    head: tuple[Any, ...]
    maps: bound.Maps | None
    rest: tuple[Any, ...]


def _key(device: int, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of the tensors, descriptors and Nones it is given."""
    seen: list[Any] = [device]
    for tensor in tensors:
        if tensor is None:
            seen.append(None)
        elif isinstance(tensor, Tensor):
            seen += tensor.dtype, tensor.data_ptr() % 16
        else:
            seen += tensor.base.dtype, tensor.block_shape
    return tuple(seen)


def _gpu(tensor: Tensor) -> int:
    """The index of the tensor's GPU, negative where it is on none."""
    return tensor.get_device()


def _is_watched() -> bool:
    """Whether a profiler wants to hear of launches from Triton itself."""
    # without importing it
    triton = sys.modules.get("triton")
    if triton is None:
        return False
    knobs: Any = triton.knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or getattr(knobs.compilation, "instrumentation_mode", "")
    )


def input_precision(dtype: torch.dtype, family: Literal["matmul", "conv"]) -> str:
    """Triton's `input_precision` of a product: TF32 for float32 where torch's own flag of the
    family allows it.
    """
    if dtype != torch.float32:
        return "ieee"
    of_matmul, of_conv = precisions()
    return "tf32" if (of_matmul if family == "matmul" else of_conv) == "tf32" else "ieee"


def precisions() -> tuple[str, str]:
    """torch's flags for products of float32, of matrices and of convolutions."""
    # `torch.backends` asks the same and takes six times as long.  The older `allow_tf32` raises
    # once a program has set one of these.
    flag: Any = torch._C._get_fp32_precision_getter
    return flag("cuda", "matmul"), flag("cuda", "conv")
