"""What differs between two inspections of a kernel, and which of it is a worsening.

Both are rows as `Inspection.to_json` gives them, or parts of such rows: what only one of them has
is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritorch.bench import machine_code

Row = Mapping[str, Any]

# what says which kernel a row is of
LABEL = ("op", "call", "dtype", "which", "target", "configuration", "kernel", "number")
# what may grow before it is a worsening: registers, bytes, and shares of what it was
_REGISTERS, _SHARED, _HOT, _ESTIMATE = 8, 1024, 0.05, 0.05


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was; `worse` says what a GPU would have against it."""

    what: str
    old: Any
    new: Any
    worse: str = ""

    def __str__(self) -> str:
        text = f"{self.what} {_shown(self.old)} -> {_shown(self.new)}"
        return f"{text}: {self.worse}" if self.worse else text


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} x {name}" for name, count in value.items()) or "none"
    return "none" if value is None else str(value)


def key(row: Row, without: Iterable[str] = ()) -> tuple[Any, ...]:
    """What a row is of, as something to find it by."""
    return tuple(row.get(name) for name in LABEL if name not in without)


def changes(old: Row, new: Row) -> list[Change]:
    """Everything that differs between two rows, worsenings first."""
    found = []
    for what, read, judge in _COMPARED:
        before, after = read(old), read(new)
        if before is not _MISSING and after is not _MISSING and before != after:
            found.append(Change(what, before, after, judge(before, after)))
    return sorted(found, key=lambda change: not change.worse)


_MISSING = object()


def _field(*path: str) -> Callable[[Row], Any]:
    def read(row: Row) -> Any:
        value: Any = row
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                return _MISSING
            value = value[name]
        return value

    return read


def _never(before: Any, after: Any) -> str:
    return ""


def _more(than: float = 0.0, share: float = 0.0, why: str = "more") -> Callable[[Any, Any], str]:
    def judge(before: Any, after: Any) -> str:
        if before is None or after is None:
            return ""
        return why if after > before * (1 + share) + than else ""

    return judge


def _fewer(before: Any, after: Any) -> str:
    return "fewer blocks on a multiprocessor" if after < before else ""


def _smaller(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Of the matrix instructions: they vanish, or the largest becomes smaller."""
    if before and not after:
        return "no products by tensor cores"
    return "smaller products" if _largest(after) < _largest(before) else ""


def _largest(shapes: Mapping[str, int]) -> int:
    sizes = [machine_code.sizes_of(name) for name in shapes]
    return max((m * n * k for m, n, k in filter(None, sizes)), default=0)


def _narrower(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for kind in ("async copy", "global load", "global store"):
        old, new = before.get(kind), after.get(kind)
        if old and new and min(map(int, new)) < min(map(int, old)):
            return f"narrower ({kind} of {min(map(int, new))} bytes)"
    if "async copy" in before and "async copy" not in after and "global load" in after:
        return "operands are no longer copied asynchronously"
    return ""


def _lost_tma(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    return "TMA is no longer used" if "TMA load" in before and "TMA load" not in after else ""


def _problems(before: Sequence[str], after: Sequence[str]) -> str:
    return "a new problem" if len(after) > len(before) else ""


def _yes(before: bool, after: bool) -> str:
    return "every product is waited for" if after and not before else ""


def _hot_size(row: Row) -> Any:
    """Instructions of a hot loop that has no products to relate them to."""
    return _MISSING if row.get("per_product") is not None else _field("hot", "instructions")(row)


_COMPARED: tuple[tuple[str, Callable[[Row], Any], Callable[[Any, Any], str]], ...] = (
    ("registers", _field("registers"), _more(_REGISTERS)),
    ("stack bytes", _field("stack"), _more(why="spills")),
    ("spilling instructions", _field("spills"), _more(why="spills")),
    ("shared bytes", _field("shared"), _more(_SHARED)),
    ("blocks", _field("blocks"), _fewer),
    ("problems", _field("problems"), _problems),
    ("products", _field("hot", "shapes"), _smaller),
    ("kinds in the hot loop", _field("hot", "kinds"), _lost_tma),
    ("accesses in the hot loop", _field("hot", "widths"), _narrower),
    ("accesses", _field("widths"), _narrower),
    ("instructions per product", _field("per_product"), _more(share=_HOT)),
    ("instructions of the hot loop", _hot_size, _more(2, 2 * _HOT)),
    ("instructions", _field("instructions"), _never),
    ("waits for every product", _field("serialized"), _yes),
    ("grid", _field("grid"), _never),
    ("estimated us", _field("estimate", "us"), _more(0.1, _ESTIMATE, "slower by the estimate")),
)


@dataclass(frozen=True)
class Difference:
    """Two tables of rows: what changed in rows that both have, and what only one of them has."""

    changed: list[tuple[Row, Row, list[Change]]]
    gone: list[Row]
    new: list[Row]
    equal: int


def compare(old: Iterable[Row], new: Iterable[Row], without: Iterable[str] = ()) -> Difference:
    """Compares rows of the same label, `without` some of what labels have."""
    before = {key(row, without): row for row in old}
    after = {key(row, without): row for row in new}
    both = [(before[one], after[one]) for one in after if one in before]
    pairs = [(a, b, changes(a, b)) for a, b in both]
    return Difference(
        changed=[pair for pair in pairs if pair[2]],
        gone=[row for one, row in before.items() if one not in after],
        new=[row for one, row in after.items() if one not in before],
        equal=sum(not pair[2] for pair in pairs),
    )


def name_of(row: Row) -> str:
    """A row's label in words."""
    parts = [row.get("op"), row.get("call"), row.get("dtype"), row.get("which"), row.get("target")]
    text = " ".join(str(part) for part in parts if part)
    number = f" #{row['number']}" if row.get("number") else ""
    settings = f" ({row['configuration']})" if row.get("configuration") else ""
    return f"{row.get('kernel')}{number} of {text}{settings}"
