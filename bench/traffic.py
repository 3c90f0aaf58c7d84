"""How often a kernel's loops turn, and what it loads, stores and multiplies, from its own code.

Every number that decides how often something happens, a loop's bound, a branch, follows from the
arguments and the program's place in the grid, mostly; those computations are made here, without the
tiles, for some programs of the grid.  What depends on loaded values is not known: a loop turns
once then, a branch is taken, and `Traffic.unknown` says so.  A tile counts whole, masked or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritorch.bench.translation import Event, translated
from tritorch.testing import dry

# programs of a grid that are followed, spread over it evenly
_PROGRAMS = 32


@dataclass(frozen=True)
class Traffic:
    """What one program of a launch does, on average over the grid.

    `events` with how often each happens, `turns` of each loop, whose order is that of the text, and
    the loop around each loop.
    """

    events: tuple[tuple[Event, float], ...]
    turns: tuple[float, ...]
    parents: tuple[int, ...]
    unknown: tuple[str, ...] = field(default=())

    def total(self, *what: str) -> float:
        """Bytes, or operations, of one program."""
        return sum(event.amount * count for event, count in self.events if event.what in what)

    def within(self, loop: int, *what: str) -> int:
        """Bytes, or operations, of one turn of a loop."""
        return sum(e.amount for e, _ in self.events if e.loop == loop and e.what in what)

    @property
    def innermost(self) -> list[int]:
        """The loops that hold no other and in which something happens."""
        busy = {event.loop for event, _ in self.events}
        return [
            loop for loop in range(len(self.turns)) if loop in busy and loop not in self.parents
        ]


def of_launch(launch: dry.Launch) -> Traffic:
    """The traffic of one launch; empty, and `unknown` says why, where it cannot be followed."""
    try:
        return _followed(launch)
    except Exception as error:
        # what the language will have next year must not hide the registers of a kernel
        return Traffic((), (), (), (f"what it moves: {type(error).__name__}: {error}",))


def _followed(launch: dry.Launch) -> Traffic:
    program = translated(launch.compiled.asm["ttir"], tuple(_parameters(launch)))
    grid = launch.grid
    count = math.prod(grid)
    counts = [0.0] * program.counters
    followed = min(count, _PROGRAMS)
    for i in range(followed):
        number = int((i + 0.5) * count / followed)
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        seen = [0.0] * program.counters
        program.run(seen, place, grid, dict(launch.numbers))
        counts = [total + one / followed for total, one in zip(counts, seen, strict=True)]
    return Traffic(
        events=tuple((event, counts[n]) for n, event in program.events.items()),
        turns=tuple(counts[n] for n in program.loops),
        parents=tuple(program.parents),
        unknown=tuple(dict.fromkeys(program.unknown)),
    )


def _parameters(launch: dry.Launch) -> list[str]:
    """The names of what the compiled function takes, in order."""
    names: list[str] = []
    constants = set(launch.compiled.src.constants)

    def add(name: str, kind: Any, path: tuple[int, ...]) -> None:
        if isinstance(kind, tuple):
            for i, one in enumerate(kind):
                add(f"{name}[{i}]", one, (*path, i))
        elif kind != "constexpr" and path not in constants:
            names.append(name)

    for i, (name, kind) in enumerate(launch.compiled.src.signature.items()):
        add(name, kind, (i,))
    return names


def by_pointer(traffic: Traffic, sizes: Mapping[str, int], programs: int) -> dict[str, float]:
    """Bytes of a launch that must come from or go to memory, by argument.

    What several programs load comes once, and no more than there is.
    """
    wanted: dict[tuple[str, str], float] = {}
    for event, count in traffic.events:
        if event.what == "dot":
            continue
        name = event.pointer[0] if len(event.pointer) == 1 else "elsewhere"
        way = "w" if event.what == "store" else "r"
        wanted[name, way] = wanted.get((name, way), 0.0) + event.amount * count * programs
    found: dict[str, float] = {}
    for (name, _), amount in wanted.items():
        found[name] = found.get(name, 0.0) + min(amount, sizes.get(name, amount))
    return found
