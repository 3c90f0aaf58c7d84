"""Watches a call, to do it again: which tensors it allocates, and which launches it makes of them.

Values of a call have places: None, the call's arguments, then what it allocates, in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tritorch import checks, launch

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
# tells nothing of a tensor
_HARMLESS = frozenset((_aten.promote_types.default,))


class Described(NamedTuple):
    """A descriptor among the arguments of a launch: of what begins where the value at `place`
    does.
    """

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Part(NamedTuple):
    """A view, among the results of a call, of the value at `place`."""

    place: int
    size: torch.Size
    strides: tuple[int, ...]
    offset: int


class Step(NamedTuple):
    """A launch, and the tensors that are allocated before it: a function, and what it is given.

    `places`: of its arguments.  `on`: of the tensor on whose device it is.  `dropped`: of values
    that nothing uses later.
    """

    allocations: list[tuple[Any, ...]]
    launch: launch.Ready
    on: int
    places: list[int | Described]
    dropped: list[int]


class Repeat(NamedTuple):
    """What a call did.

    `written`: places of arguments whose versions count it.  `results`: where what it returns is,
    `alone` or in a tuple.
    """

    device: int
    steps: list[Step]
    written: list[int]
    results: list[int | Part]
    alone: bool

    def is_here(self) -> bool:
        """Whether the device is the current one, to which launches go."""
        device = self.device
        return device < 0 or device == torch._C._cuda_getDevice()

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Does it with these arguments."""
        device = self.device
        stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else None
        values: list[Any] = [None, *arguments]
        for allocations, (_, run, grid, head, maps, rest), on, places, dropped in self.steps:
            for allocate, size, strides, dtype in allocations:
                values.append(allocate(size, strides, dtype))
            tensors = [
                values[at] if isinstance(at, int) else launch.descriptor(values[at.place], *at[1:])
                for at in places
            ]
            if device < 0:
                run(values[on], *tensors)
            else:
                run(*grid, stream, *head, *(tensors if maps is None else maps(tensors)), *rest)
            for place in dropped:
                values[place] = None
        for place in self.written:
            torch.autograd.graph.increment_version(values[place])
        results = [
            values[at] if isinstance(at, int) else values[at.place].as_strided(*at[1:])
            for at in self.results
        ]
        return results[0] if self.alone else tuple(results)


def watch(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, Repeat | bool]:
    """What `function(*arguments, **named)` returns, and what repeats the call; False where it
    cannot be repeated.
    """
    watch = _Watch((*arguments, *named.values()))
    warned = checks.warned
    with watch:
        launch.thread.watcher = watch.launch
        try:
            result = function(*arguments, **named)
        finally:
            launch.thread.watcher = None
    # each call warns anew
    return result, checks.warned == warned and (watch.repeat(result) or False)


class _Watch(TorchDispatchMode):
    """Hears of all that a call does in torch, and of its launches."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # views too, so that no other tensor gets their id
        self._kept: list[Any] = []
        self._values: list[Any] = [None]
        self._places: dict[int, int] = {id(None): 0}
        self._parts: dict[int, Part] = {}
        self._arguments = 1 + len(arguments)
        self._launches: list[tuple[int, launch.Ready, list[Any]]] = []
        self._is_repeatable = True
        for argument in arguments:
            if isinstance(argument, Tensor):
                # twice the same tensor does not tell which of two is meant
                self._is_repeatable &= id(argument) not in self._places
                self._places[id(argument)] = len(self._values)
            self._values.append(argument)
        self._versions = [_version(value) for value in self._values]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._places[id(result)] = len(self._values)
            self._values.append(result)
            return result
        is_view = func.is_view or func is _aten._unsafe_view.default
        if is_view and isinstance(result, Tensor):
            self._is_repeatable &= self._views(result, args[0])
        elif func not in _HARMLESS:
            self._is_repeatable = False
        return result

    def _views(self, view: Tensor, base: Tensor) -> bool:
        """Whether a view is noted: of which memory it is."""
        place = self._places.get(id(base))
        if place is None or view.dtype != base.dtype:
            return False
        self._kept.append(view)
        if view.data_ptr() == base.data_ptr():
            self._places[id(view)] = place
        elif place >= self._arguments:
            offset = int(view.storage_offset())
            self._parts[id(view)] = Part(place, view.shape, view.stride(), offset)
        return True

    def launch(
        self,
        prepared: launch.Prepared,
        on: Tensor,
        tensors: tuple[Any, ...],
        floats: tuple[float, ...],
    ) -> None:
        launch.thread.watcher = None
        try:
            with _disable_current_modes():
                prepared(on, *tensors, floats=floats)
                ready = prepared.ready(on, tensors, floats)
        finally:
            launch.thread.watcher = self.launch
        places = [self._place(tensor) for tensor in (on, *tensors)]
        self._launches.append((len(self._values), ready, places))

    def _place(self, tensor: Any) -> int | Described | None:
        """Of a tensor or a descriptor; None where it is not one of the call's."""
        if tensor is None or isinstance(tensor, Tensor):
            return self._places.get(id(tensor))
        place = self._places.get(id(tensor.base))
        if place is None:
            return None
        return Described(place, tensor.shape, tensor.strides, tuple(tensor.block_shape))

    def repeat(self, result: Any) -> Repeat | None:
        """What repeats a call with this result, if anything does."""
        results = result if type(result) is tuple else (result,)
        allocations = [_allocation(value) for value in self._values[self._arguments :]]
        where = [self._result(one, allocations) for one in results]
        found = [at for at in where if at is not None]
        devices = {ready.device for _, ready, _ in self._launches} or {-1}
        of_tensors = {value.device for value in self._values if isinstance(value, Tensor)}
        known = all(None not in places for _, _, places in self._launches)
        # what is returned twice may have two shapes
        made = [at for at in found if isinstance(at, int) and at >= self._arguments]
        if (
            not (self._is_repeatable and known)
            or len(found) < len(where)
            or len(set(made)) < len(made)
            or len(devices) > 1
            or len(of_tensors) > 1
        ):
            return None
        of_results = [at.place if isinstance(at, Part) else at for at in found]
        last: dict[int, int] = {}
        for step, (_, _, places) in enumerate(self._launches):
            for at in places:
                last[at.place if isinstance(at, Described) else at] = step
        steps, first = [], 0
        for step, (count, ready, (on, *places)) in enumerate(self._launches):
            new, first = allocations[first : count - self._arguments], count - self._arguments
            dropped = [
                place
                for place, final in last.items()
                if final == step and place >= self._arguments and place not in of_results
            ]
            steps.append(Step(new, ready, on, places, dropped))
        if first < len(allocations):
            return None
        versions = [_version(value) for value in self._values[: self._arguments]]
        written = [place for place, v in enumerate(versions) if v != self._versions[place]]
        alone = type(result) is not tuple
        return Repeat(devices.pop(), steps, written, found, alone)

    def _result(self, one: Any, allocations: list[tuple[Any, ...]]) -> int | Part | None:
        """Where a result is; None if it is nowhere that a repeat could take it from."""
        place = self._places.get(id(one))
        if place is None:
            return self._parts.get(id(one))
        value = self._values[place]
        if one is value:
            return place
        if place < self._arguments:
            # a view of an argument is one for autograd too
            return None
        if _extent(one) != _extent(value):
            return Part(place, one.shape, one.stride(), 0)
        # no view where torch returns none
        allocations[place - self._arguments] = _allocation(one)
        return place


def _version(value: Any) -> int | None:
    """How often it was written, where torch counts that."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _allocation(tensor: Tensor) -> tuple[Any, ...]:
    """The function that allocates one like it, and what that is given."""
    return _allocator(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.dtype


@functools.cache
def _allocator(device: torch.device) -> Callable[..., Tensor]:
    # those of the programs that torch.compile writes take half as long, and allocate on the current
    # device, which is the one of the launches
    if device.type in ("cpu", "cuda"):
        allocate: Callable[..., Tensor] = getattr(
            torch._C._dynamo.guards, f"_empty_strided_{device.type}"
        )
        return allocate
    return lambda size, strides, dtype: torch.empty_strided(
        size, strides, dtype=dtype, device=device
    )


def _extent(tensor: Tensor) -> int:
    """Elements from its first to its last one."""
    if 0 in tensor.shape:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)
