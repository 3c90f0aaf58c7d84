"""What one `detectors.detecting` block watches with, and what it found."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tritorch.testing import corrections, marks, places
from tritorch.testing.findings import Finding
from tritorch.testing.places import Place
from tritorch.testing.races import Races
from tritorch.testing.shadow import Extent, Memory, Storage, is_plain

Array = npt.NDArray[Any]
Order = Literal["forward", "reverse"] | int

# how often one program may ask the same of one address without anything changing
SPIN_LIMIT = 10_000
# a launch of more programs is cut to its corners where memory is virtual
_MOST_VIRTUAL_PROGRAMS = 1024
# bytes between an address and the tensor that it may have been meant for
_FAR = 2**40


class ProgramOrderError(RuntimeError):
    """A program waits for what no program that has run gives it: the launch was given up.

    `finding`: what the detector has noted of it.
    """

    def __init__(self, message: str, finding: Finding) -> None:
        super().__init__(message)
        self.finding = finding


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, its integer constants by name, its programs."""

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, int | bool]
    programs: int


@dataclass(frozen=True)
class UndefinedLoad:
    """A load that had lanes masked off without `other`: where, and the first such lanes."""

    kernel: str
    argument: str
    program: tuple[int, int, int] | None
    lanes: tuple[tuple[int, ...], ...]
    count: int


@dataclass(frozen=True)
class Poison:
    """What a lane holds that was masked off without `other`, instead of NaN.

    `high`: a large number, else a large negative one.  `site`: the one load, by its place, that it
    is for; None for every load.
    """

    high: bool
    site: tuple[str, int] | None = None


class Detector:
    """What `detecting` watches with and what it found.

    `launches`: in order.  `undefined_loads`: by (file, line), the loads with lanes that were masked
    off without `other`.
    """

    def __init__(
        self, order: Order, whole_storage: bool, virtual: bool, poison: Poison | None
    ) -> None:
        self.launches: list[Launch] = []
        self.undefined_loads: dict[tuple[str, int], UndefinedLoad] = {}
        self.memory = Memory()
        self.races = Races()
        self._found: dict[tuple[str, str, str, str, int], Finding] = {}
        # the first argument that a wrapped offset was for
        self._wrapped: dict[tuple[str, Place], str] = {}
        self.order = order
        self.whole_storage = whole_storage
        self._virtual = virtual
        self._poison = poison
        # of the launch that runs
        self.kernel = ""
        self._defined = Place("", 0)
        self._constexprs: list[str] = []
        self._grid = (1, 1, 1)
        self._programs: Array = np.zeros(0, np.int64)
        self.program: tuple[int, int, int] | None = None
        self._extents: dict[int, tuple[Extent, Storage]] = {}
        self._storages: dict[Extent, Storage] = {}
        self._spins: dict[Any, int] = {}
        self._last_scalar: tuple[Any, int] = (None, 0)
        self.gave_up: ProgramOrderError | None = None

    @property
    def findings(self) -> list[Finding]:
        """One per `Finding.key`, with the first program's lanes and the count of all."""
        return list(self._found.values())

    def check_written(self, outputs: dict[str, Tensor]) -> None:
        """Adds an 'unwritten output' for each tensor with elements that nothing has written.

        It knows the tensors that torch gave without values inside the block (`torch.empty` and its
        kin): an element is written by a kernel, or by torch.
        """
        for name, output in outputs.items():
            if output.device.type != "cpu" or output.numel() == 0 or not is_plain(output):
                continue
            storage = self.memory.storage_of(output)
            addresses = _addresses(output)
            index = storage.elements(addresses, output.element_size())
            version = None if output.is_inference() else output._version
            unwritten = storage.unwritten(index, version)
            if unwritten is None:
                continue
            lanes = unwritten.reshape(addresses.size, -1).any(1).reshape(addresses.shape)
            count = int(lanes.sum())
            kernels = sorted({kernel for kernel, _ in storage.passed})
            argument = next((argument for _, argument in storage.passed), name)
            place = storage.stored or Place("", 0)
            given = f"; {', '.join(kernels)} got it" if kernels else "; no kernel got it"
            self._add(
                Finding(
                    "unwritten output",
                    f"{count} of the {output.numel()} elements of `{name}` "
                    f"(shape {tuple(output.shape)}) are never written{given}",
                    kernel=", ".join(kernels),
                    argument=argument,
                    file=place.file,
                    line=place.line,
                    source=places.statement(place) if place.file else "",
                    lanes=_first(np.asarray(lanes)),
                    count=count,
                )
            )

    def last_store(self, tensor: Tensor, lanes: Array) -> tuple[Place, str, str] | None:
        """The last store of a kernel to the first of these elements that one has stored to.

        Its line, the kernel and the argument; None where no kernel has.
        """
        storage = self.memory.storage_of(tensor)
        if storage.writer is None:
            return None
        accesses = storage.writer[
            storage.elements(_addresses(tensor)[lanes], tensor.element_size())
        ]
        if not accesses.any():
            return None
        place = self.races.place(int(accesses[accesses > 0][0]))
        return place, *storage.stores[place]

    def _add(self, finding: Finding) -> None:
        known = self._found.get(finding.key)
        if known is not None:
            finding = replace(known, count=known.count + finding.count)
        self._found[finding.key] = finding

    def report(
        self,
        kind: str,
        place: Place,
        say: Callable[[], str],
        *,
        argument: str = "",
        lanes: Array | None = None,
    ) -> Finding:
        """Adds a finding of the program that runs; `say` is called for the first of its key.

        Returns what is known of that key by now.
        """
        if kind == "int32 overflow":
            # one offset may serve many arguments
            argument = self._wrapped.setdefault((self.kernel, place), argument)
        count = 0 if lanes is None else int(lanes.sum())
        key = (kind, self.kernel, argument, place.file, place.line)
        known = self._found.get(key)
        if known is not None:
            self._found[key] = replace(known, count=known.count + count)
            return self._found[key]
        self._found[key] = Finding(
            kind,
            say(),
            kernel=self.kernel,
            argument=argument,
            file=place.file,
            line=place.line,
            source=places.statement(place),
            program=self.program,
            lanes=() if lanes is None else _first(lanes),
            count=count,
        )
        return self._found[key]

    # launches

    def begin_launch(self, kernel: str, defined: Place, constexprs: list[str]) -> None:
        self.kernel, self._defined, self._constexprs = kernel, defined, constexprs
        self._extents, self._storages = {}, {}
        self.gave_up = None
        self.memory.begin_launch()
        self.races.begin_launch()
        marks.forget()

    def bind(self, name: str, given: Any, host: Any) -> None:
        """Notes an argument, as the caller gave it and as the interpreter holds it."""
        if isinstance(host, tuple):
            fields = getattr(host, "_fields", None)
            for i, (one, held) in enumerate(zip(given, host, strict=True)):
                self.bind(f"{name}[{i}]" if fields is None else f"{name}.{fields[i]}", one, held)
        elif isinstance(getattr(host, "block_shape", None), list):
            # a descriptor made on the host
            self.bind(name, given.base, host.base)
        elif hasattr(host, "data_ptr"):
            tensor = host if isinstance(host, Tensor) else host.base
            origin = given if isinstance(given, Tensor) else given.base
            extent = Extent(name, tensor, whole_storage=self.whole_storage)
            extent.version = None if origin.is_inference() else origin._version
            storage = self.memory.storage_of(tensor)
            storage.passed[self.kernel, name] = None
            storage.stored = storage.stored or self._defined
            self._extents[id(host)] = extent, storage
            self._storages[extent] = storage

    def extents(self) -> Collection[tuple[Extent, Storage]]:
        """The arguments' extents, and their storages."""
        return self._extents.values()

    def storage_of(self, extent: Extent) -> Storage:
        """The storage of an argument."""
        return self._storages[extent]

    def nearest(self, addresses: Array) -> Extent | None:
        """The argument whose memory is nearest to an address; None where that is far."""
        address = int(addresses.flat[0])
        far = [
            (max(extent.base - address, address - extent.base - extent.nbytes), extent.name, extent)
            for extent, _ in self._extents.values()
        ]
        distance, _, extent = min(far, default=(_FAR, "", None), key=lambda entry: entry[:2])
        return extent if distance < _FAR else None

    def extent_of(self, host: Any) -> Extent | None:
        """The extent of an argument, as the interpreter holds it."""
        known = self._extents.get(id(host))
        return None if known is None else known[0]

    def begin_grid(self, grid: tuple[int, ...], bound: dict[str, Any]) -> tuple[int, ...]:
        """The grid to run for the grid that is launched: one program for each in its order."""
        sizes = [operator.index(size) for size in grid] + [1] * (3 - len(grid))
        self._grid = (sizes[0], sizes[1], sizes[2])
        count = math.prod(sizes)
        constants = {name: getattr(bound[name], "value", bound[name]) for name in self._constexprs}
        self.launches.append(
            Launch(
                self.kernel,
                self._grid,
                {name: value for name, value in constants.items() if isinstance(value, int)},
                count,
            )
        )
        if self._virtual and count > _MOST_VIRTUAL_PROGRAMS:
            ends = [sorted({*range(size)[:2], *range(size)[-2:]}) for size in sizes]
            self._programs = np.ravel_multi_index(np.ix_(*ends), self._grid).ravel()
        else:
            self._programs = np.arange(count)
        if self.order == "reverse":
            self._programs = self._programs[::-1]
        elif self.order != "forward":
            self._programs = np.random.default_rng(self.order).permutation(self._programs)
        return (len(self._programs),)

    def begin_program(self, turn: int) -> tuple[int, int, int]:
        """The program whose turn it is, as its index into the grid that is launched."""
        self.program = program = self.program_at(turn)
        self.races.begin_program()
        self.note_change()
        return program

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid that is launched."""
        return self._grid

    def end_launch(self) -> None:
        self.program = None

    def program_at(self, turn: int) -> tuple[int, int, int]:
        """The index of the program of a turn."""
        x, y, z = np.unravel_index(self._programs[turn], self._grid)
        return int(x), int(y), int(z)

    # lanes that hold nothing

    def note_undefined(self, place: Place, extent: Extent | None, lanes: Array) -> None:
        """A load with these lanes masked off has no `other`."""
        count, known = int(lanes.sum()), self.undefined_loads.get(place)
        if known is None:
            name = "" if extent is None else extent.name
            known = UndefinedLoad(self.kernel, name, self.program, _first(lanes), 0)
        self.undefined_loads[place] = replace(known, count=known.count + count)

    def poison(self, shape: tuple[int, ...], dtype: Any, place: Place) -> Array:
        """What lanes of a load hold that are not loaded."""
        poison = self._poison
        if poison is None or poison.site not in (None, place):
            return corrections.poison(shape, dtype)
        if dtype.kind == "b":
            return np.zeros(shape, dtype)
        if dtype.kind == "f":
            largest = np.finfo(dtype).max / 8
            return np.full(shape, largest if poison.high else -largest, dtype)
        # odd, and far from what the corrections put there
        info = np.iinfo(dtype)
        return np.full(shape, info.max - 2 if poison.high else info.min + 3, dtype)

    # a program that waits

    def note_scalar(
        self, key: Any, place: Place, extent: Extent | None, address: int, *, waits: bool
    ) -> None:
        """A program asks one address something, which the key says: does it wait in vain?

        `waits`: of an atomic or a volatile load, which a loop may mix with others.
        """
        if waits:
            self._spins[key] = count = self._spins.get(key, 0) + 1
        else:
            before, count = self._last_scalar
            count = count + 1 if key == before else 1
            self._last_scalar = key, count
        if count > SPIN_LIMIT:
            self._give_up(place, "" if extent is None else extent.name, address, count)

    def _give_up(self, place: Place, argument: str, address: int, count: int) -> None:
        holder = self.races.released_at(address)
        if holder is None:
            order = f"{self.order} order" if isinstance(self.order, str) else "shuffled order"
            kind, why = "program order", f"in {order} no program before it gives what it waits for"
        else:
            kind = "hang"
            why = f"program {self.program_at(holder)}, which is done, has left it as it is"
        message = (
            f"program {self.program} asks `{argument}` the same {count} times and nothing changes: "
            f"{why}"
        )
        finding = self.report(kind, place, lambda: message, argument=argument)
        self.gave_up = ProgramOrderError(f"{self.kernel}: {message}", finding)
        raise self.gave_up

    def note_change(self) -> None:
        """The program changed memory: a loop may go on."""
        self._spins.clear()
        self._last_scalar = None, 0

    def note_tile(self) -> None:
        """The program accessed a tile: no loop that waits for one address does."""
        self._last_scalar = None, 0


def _addresses(tensor: Tensor) -> Array:
    """Of every element, in the tensor's shape."""
    offsets = np.zeros(tensor.shape, np.int64)
    for axis, stride in enumerate(tensor.stride()):
        steps = np.arange(tensor.shape[axis]) * (stride * tensor.element_size())
        offsets += steps.reshape([-1] + [1] * (tensor.dim() - axis - 1))
    addresses: Array = (offsets + tensor.data_ptr()).astype(np.uint64)
    return addresses


def _first(lanes: Array) -> tuple[tuple[int, ...], ...]:
    """The indices of the first four."""
    return tuple(tuple(int(i) for i in lane) for lane in np.argwhere(lanes)[:4])
