"""Watches a call, to do it again: what it allocates and copies, and which launches it makes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _pop_mode_temporarily

from tritorch import backend, descriptors, launch
from tritorch.repeats.listener import Listener

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
# of one tensor another one in memory of its own
_COPIES = frozenset((_aten.clone.default, _aten._to_copy.default))
# tells nothing of a tensor
_HARMLESS = frozenset((_aten.promote_types.default,))


class View(NamedTuple):
    """A tensor in the memory of the value at `place`, and where that begins without an `offset`."""

    place: int
    size: torch.Size
    strides: tuple[int, ...]
    offset: int | None

    def __call__(self, values: Sequence[Any]) -> Tensor:
        tensor: Tensor = values[self.place].as_strided(self.size, self.strides, self.offset)
        return tensor


class Described(NamedTuple):
    """A descriptor among the arguments of a launch, of what begins where the value at `place`
    does.
    """

    place: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def __call__(self, values: Sequence[Any]) -> Any:
        return descriptors.descriptor(values[self.place], self.shape, self.strides, self.block)


class Allocation(NamedTuple):
    allocate: Callable[..., Tensor]
    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def like(cls, tensor: Tensor) -> Allocation:
        allocate = _allocator(tensor.device)
        return cls(allocate, tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Copy(NamedTuple):
    function: Callable[..., Tensor]
    source: int | View
    options: Mapping[str, Any]

    def __call__(self, values: list[Any]) -> None:
        source = self.source
        tensor = values[source] if isinstance(source, int) else source(values)
        values.append(self.function(tensor, **self.options))


class Launch(NamedTuple):
    """`places`: of its arguments, which `take` makes of the values.  `on`: of the tensor on whose
    device it is.  `dropped`: of values that nothing uses later.
    """

    ready: launch.Ready
    on: int
    places: list[int | Described]
    take: Callable[[list[Any]], Sequence[Any]]
    dropped: list[int]

    @classmethod
    def of(cls, ready: launch.Ready, on: int, places: list[int | Described]) -> Launch:
        return cls(ready, on, places, _taker(places), [])


class Repeat(NamedTuple):
    """What a call did.

    `device`: where its launches go, which is the current one then; negative where they find their
    own way.  `written`: places of arguments whose versions count it.  `results`: where what it
    returns is, `alone` or in a tuple.
    """

    device: int
    steps: list[Allocation | Copy | Launch]
    written: list[int]
    results: list[int | View]
    alone: bool

    def __call__(self, arguments: Sequence[Any]) -> Any:
        """Does it with these arguments."""
        device = self.device
        stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else None
        values: list[Any] = [None, *arguments]
        # a call of a function for each step would take as long as the step
        for step in self.steps:
            if isinstance(step, Allocation):
                allocate, size, strides, dtype = step
                values.append(allocate(size, strides, dtype))
            elif isinstance(step, Launch):
                (_, run, grid, head, maps, rest), on, _, take, dropped = step
                tensors = take(values)
                if device < 0:
                    run(values[on], *tensors)
                else:
                    run(*grid, stream, *head, *(tensors if maps is None else maps(tensors)), *rest)
                for place in dropped:
                    values[place] = None
            else:
                step(values)
        for place in self.written:
            torch.autograd.graph.increment_version(values[place])
        if self.alone:
            (at,) = self.results
            return values[at] if isinstance(at, int) else at(values)
        return tuple([values[at] if isinstance(at, int) else at(values) for at in self.results])


def watch(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, Repeat | None]:
    """What `function(*arguments, **named)` returns, and what repeats the call, if anything does.

    What the call allocates is kept until it returns.
    """
    mode = _Mode((*arguments, *named.values()))
    result = mode.listen("watcher", function, arguments, named)
    return result, mode.repeat(result)


class _Mode(Listener):
    """Hears of all that a call does in torch, and as a watcher of its launches."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__(arguments)
        # of each tensor where it is
        self._views: dict[int, tuple[Tensor, View]] = {}
        self._steps: list[Any] = []
        self._written: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._add(result)
            self._steps.append(Allocation.like(result))
        elif func in _COPIES:
            source = self._where(args[0])
            self._is_repeatable &= source is not None and len(args) == 1
            self._add(result)
            self._steps.append(Copy(func, source or 0, kwargs or {}))
        elif func.is_view or func is _aten._unsafe_view.default:
            self._is_repeatable &= isinstance(result, Tensor) and self._sees(result, args[0])
        elif func not in _HARMLESS:
            self._is_repeatable = False
        return result

    def _sees(self, view: Tensor, base: Tensor) -> bool:
        """Whether it is known of which memory a view is."""
        whole = self._where(base)
        if whole is None or view.dtype != base.dtype:
            return False
        place = whole if isinstance(whole, int) else whole.place
        offset = None
        if view.data_ptr() != self._values[place].data_ptr():
            # where the memory of an argument begins no key says
            offset = int(view.storage_offset())
            if place < self._arguments:
                return False
        self._views[id(view)] = view, View(place, view.shape, view.stride(), offset)
        return True

    def _where(self, tensor: Any) -> int | View | None:
        """Where a tensor of the call is, or None; None where it is no tensor of the call."""
        place = self._places.get(id(tensor))
        if place is None:
            return self._views.get(id(tensor), (None, None))[1]
        return place

    def launches(
        self,
        prepared: launch.Prepared,
        on: Tensor,
        tensors: tuple[Any, ...],
        floats: tuple[float, ...],
    ) -> None:
        launch.thread.watcher = None
        try:
            with _pop_mode_temporarily():
                prepared(on, *tensors, floats=floats)
                ready = prepared.ready(on, tensors, floats)
        finally:
            launch.thread.watcher = self
        first, *places = [self._begins(tensor) for tensor in (on, *tensors)]
        known = [at for at in places if at is not None]
        self._is_repeatable &= isinstance(first, int) and len(known) == len(places)
        self._steps.append(Launch.of(ready, first if isinstance(first, int) else 0, known))

    def writes(self, tensors: tuple[Tensor, ...]) -> None:
        for tensor in tensors:
            place = self._begins(tensor)
            self._is_repeatable &= isinstance(place, int)
            self._written.append(place if isinstance(place, int) else 0)

    def _begins(self, tensor: Any) -> int | Described | None:
        """The place of the value that begins where a tensor does, or what describes it; or None."""
        if not (tensor is None or isinstance(tensor, Tensor)):
            place = self._begins(tensor.base)
            if not isinstance(place, int):
                return None
            return Described(place, tensor.shape, tensor.strides, tuple(tensor.block_shape))
        where = self._where(tensor)
        if isinstance(where, View):
            return where.place if where.offset is None else None
        return where

    def repeat(self, result: Any) -> Repeat | None:
        """What repeats a call with this result, if anything does."""
        results = result if type(result) is tuple else (result,)
        where = [self._result(one) for one in results]
        found = [at for at in where if at is not None]
        launches = [step for step in self._steps if isinstance(step, Launch)]
        devices = {step.ready.device for step in launches} or {-1}
        of_tensors = {value.device for value in self._values if isinstance(value, Tensor)}
        # two of one memory may have two shapes, and a part is made anew each time it is returned
        objects = dict(zip(map(id, results), where, strict=True))
        made = [at for at in objects.values() if isinstance(at, int) and at >= self._arguments]
        parts = [id(one) for one, at in zip(results, where, strict=True) if isinstance(at, View)]
        if (
            not self._is_repeatable
            or len(found) < len(where)
            or len(set(made)) < len(made)
            or len(set(parts)) < len(parts)
            or len(devices) > 1
            or len(of_tensors) > 1
        ):
            return None
        self._drop({at.place if isinstance(at, View) else at for at in found})
        alone = type(result) is not tuple
        return Repeat(devices.pop(), self._steps, self._written, found, alone)

    def _drop(self, results: set[int]) -> None:
        """Says of each launch which of the values that were made it is the last to use."""
        last: dict[int, Launch] = {}
        for step in self._steps:
            if isinstance(step, Copy):
                source = step.source
                last.pop(source.place if isinstance(source, View) else source, None)
            elif isinstance(step, Launch):
                for at in step.places:
                    last[at.place if isinstance(at, Described) else at] = step
        for place, step in last.items():
            if place >= self._arguments and place not in results:
                step.dropped.append(place)

    def _result(self, one: Any) -> int | View | None:
        """Where a result is; None if it is nowhere that a repeat could take it from."""
        where = self._where(one) if one is None or isinstance(one, Tensor) else None
        if not isinstance(where, View):
            return where
        if where.place < self._arguments:
            # a view of an argument is one for autograd too
            return None
        step = self._made()[where.place]
        is_whole = where.offset is None and _extent(one) == _extent(self._values[where.place])
        if is_whole and isinstance(self._steps[step], Allocation):
            # a tensor of its own, as torch's ops return
            self._steps[step] = Allocation.like(one)
            return where.place
        return where

    def _made(self) -> dict[int, int]:
        """The step that makes the value of each place."""
        steps = [at for at, step in enumerate(self._steps) if not isinstance(step, Launch)]
        return dict(enumerate(steps, self._arguments))


def _taker(places: Sequence[int | Described]) -> Callable[[list[Any]], Sequence[Any]]:
    indices = [at for at in places if isinstance(at, int)]
    # of one it would not make a sequence
    if len(indices) == len(places) > 1:
        return operator.itemgetter(*indices)
    return lambda values: [values[at] if isinstance(at, int) else at(values) for at in places]


@functools.cache
def _allocator(device: torch.device) -> Callable[..., Tensor]:
    allocate: Callable[..., Tensor] | None = None
    # those of the programs that torch.compile writes take half as long, and allocate on the current
    # device, which is the one of the launches
    if device.type == "cpu" or (device.type == "cuda" and not backend.INTERPRETING):
        guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        allocate = getattr(guards, f"_empty_strided_{device.type}", None)
    return allocate or functools.partial(_empty_strided, device)


def _empty_strided(
    device: torch.device, size: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(size, strides, dtype=dtype, device=device)


def _extent(tensor: Tensor) -> int:
    """Elements from its first to its last one."""
    if 0 in tensor.shape:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)
