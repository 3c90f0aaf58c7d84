"""Which accesses of memory by two programs of a launch nothing orders.

An access is a number: the program's turn, how many times the program has released by then, the line
and whether it is atomic, so that a later access is a larger number.  An atomic that releases hands
on what its program has done, and what that one had been handed, to every program that acquires from
the same address later: as vector clocks do, with one entry per program.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tritorch.testing.places import Place
from tritorch.testing.shadow import Storage

Array = npt.NDArray[Any]

_TURN = 32
_RELEASES = 18
_MOST_RELEASES = 2**14 - 1
_MOST_PLACES = 2**17 - 1


class Conflict(NamedTuple):
    """`did`: what the other did; `lanes`: which of the elements; `other`: the access of one."""

    did: str
    lanes: Array
    other: int


class Races:
    """What the programs of the launches did in turn."""

    def __init__(self) -> None:
        self.turn = 0
        self._first = 0
        self._mine = 0
        self._releases = 0
        # of the program that runs: how many releases of another program it has been handed
        self._known: dict[int, int] = {}
        # by address: what an acquire there is handed
        self._handed: dict[int, dict[int, int]] = {}
        self._numbers: dict[Place, int] = {}
        self._places: list[Place] = []

    def begin_launch(self) -> None:
        """A launch is ordered after the ones before it."""
        self._first = self.turn + 1
        self._handed = {}

    def begin_program(self) -> None:
        """The next program runs, and knows of no other."""
        self.turn += 1
        self._mine = self.turn << _TURN
        self._releases = 0
        self._known = {}

    def place(self, access: int) -> Place:
        """The line of an access."""
        return self._places[(access >> 1) & _MOST_PLACES]

    def position(self, access: int) -> int:
        """Which program of the launch it was, in the order in which they ran."""
        return (access >> _TURN) - self._first

    def _access(self, place: Place, atomic: bool) -> int:
        number = self._numbers.get(place)
        if number is None:
            number = self._numbers[place] = min(len(self._places), _MOST_PLACES)
            self._places.append(place)
        releases = min(self._releases, _MOST_RELEASES)
        return self._mine | releases << _RELEASES | number << 1 | atomic

    def acquire(self, addresses: Iterable[int]) -> None:
        """The program that runs is handed what others had done when they released there."""
        for address in addresses:
            _update(self._known, self._handed.get(address, {}))

    def release(self, addresses: Iterable[int]) -> None:
        """The program that runs hands on what it has done so far, and what it was handed."""
        for address in addresses:
            handed = self._handed.setdefault(address, {})
            _update(handed, self._known)
            handed[self.turn] = self._releases + 1
        self._releases += 1

    def released_at(self, address: int) -> int | None:
        """The position of another program that released at the address; None if none did."""
        turns = [turn for turn in self._handed.get(address, {}) if turn != self.turn]
        return turns[-1] - self._first if turns else None

    def read(
        self, storage: Storage, index: Array, place: Place, *, atomic: bool = False
    ) -> Conflict | None:
        """A load; the elements that another program wrote before, unordered.

        `atomic`: as one that waits for another program's atomic is.
        """
        found = None
        if storage.last_write >= self._first << _TURN:
            found = self._foreign(storage.made_writer()[index], "wrote", plain_alone=atomic)
        if atomic:
            return found
        reader, access = storage.made_reader(), self._access(place, atomic=False)
        if storage.last_read >= self._first << _TURN:
            before = reader[index]
            others = self._foreign_readers(before)
            if self._known and others.any():
                others &= (before < 0) | ~self._ordered(before)
            # negative where several programs read, and none of them orders the others
            reader[index] = np.where(others, -access, access)
        else:
            reader[index] = access
        storage.last_read = access
        return found

    def write(self, storage: Storage, index: Array, place: Place) -> list[Conflict]:
        """A store; the elements that another program wrote or read before, unordered."""
        found = self._against(storage, index, plain_writers_alone=False)
        writer, access = storage.made_writer(), self._access(place, atomic=False)
        writer[index] = access
        storage.last_write = access
        return found

    def atomic(self, storage: Storage, index: Array, place: Place) -> list[Conflict]:
        """An atomic; the elements that another program wrote or read plainly, unordered.

        To be called before its own `acquire`: nothing says that it comes after the atomic that it
        is handed something by, unless the program waits for that.
        """
        found = self._against(storage, index, plain_writers_alone=True)
        writer, access = storage.made_writer(), self._access(place, atomic=True)
        before = writer[index]
        # what the program stored before an atomic of its own stays a store to others
        stored = (before >= self._mine) & (before & 1 == 0)
        writer[index] = np.where(stored, before, access)
        storage.last_write = access
        return found

    def _against(self, storage: Storage, index: Array, plain_writers_alone: bool) -> list[Conflict]:
        found = []
        if storage.last_write >= self._first << _TURN:
            before = storage.made_writer()[index]
            found.append(self._foreign(before, "wrote", plain_writers_alone))
        if storage.last_read >= self._first << _TURN:
            before = storage.made_reader()[index]
            others = self._foreign_readers(before)
            if others.any():
                readers = np.abs(before)
                if self._known:
                    # one that reads along says nothing of those that read before it
                    mine = readers >= self._mine
                    others &= ~mine & ~self._ordered(readers)
                found.append(_conflict("read", others, readers))
        return [conflict for conflict in found if conflict is not None]

    def _foreign(self, before: Array, did: str, plain_alone: bool = False) -> Conflict | None:
        others = (before >= self._first << _TURN) & (before < self._mine)
        if plain_alone:
            others &= before & 1 == 0
        if self._known and others.any():
            others &= ~self._ordered(before)
        return _conflict(did, others, before)

    def _foreign_readers(self, before: Array) -> Array:
        first = self._first << _TURN
        others: Array = ((before >= first) & (before < self._mine)) | (before <= -first)
        return others

    def _ordered(self, accesses: Array) -> Array:
        """Whether the program that runs has been handed them."""
        known, inverse = np.unique(np.abs(accesses) >> _RELEASES, return_inverse=True)
        turns, releases = known >> (_TURN - _RELEASES), known & _MOST_RELEASES
        handed = np.array(
            [
                count == _MOST_RELEASES or self._known.get(turn, 0) > count
                for turn, count in zip(turns.tolist(), releases.tolist(), strict=True)
            ],
            np.bool_,
        )
        ordered: Array = handed[inverse.reshape(accesses.shape)]
        return ordered


def _conflict(did: str, lanes: Array, accesses: Array) -> Conflict | None:
    if not lanes.any():
        return None
    return Conflict(did, lanes, int(accesses[lanes][0]))


def _update(clock: dict[int, int], other: dict[int, int]) -> None:
    for turn, count in other.items():
        if clock.get(turn, 0) < count:
            clock[turn] = count
