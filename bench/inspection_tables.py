"""Inspections as tables to read: plain columns, one kernel a line, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritorch.bench import differences
from tritorch.bench.differences import LABEL, Row
from tritorch.testing import dry

if TYPE_CHECKING:
    from rich.table import Table

_SHORT = {"num_warps": "warps", "num_stages": "stages"}


def table(rows: Sequence[Row], target: str) -> Table:
    """One line for each kernel that was compiled for the target."""
    gpu = dry.TARGETS[target]
    found = _table(
        f"{target} ({gpu.product}: {gpu.registers} registers a thread, "
        f"{gpu.shared_memory // 1024} KiB of shared memory a block)"
    )
    for name in ("#", "kernel", "of", "pass"):
        found.add_column(name, overflow="fold")
    for name in ("regs", "spills", "shared", "blocks", "occ."):
        found.add_column(name, justify="right")
    for name in ("products", "per product", "copies", "estimate"):
        found.add_column(name, overflow="fold")
    for number, row in enumerate(rows):
        found.add_row(
            str(number),
            f"{row['kernel']}\n{settings(row)}",
            f"{row['op']} {row['dtype']}\n{row['call']}",
            str(row["which"]),
            str(row["registers"]),
            f"{row['spills']}" + (f"\n{row['stack']} B" if row["stack"] else ""),
            f"{row['shared']}\n{row['shared'] / row['shared_limit']:.0%}",
            f"{row['blocks']}\n{row['limit']}",
            f"{row['warps'] / row['most_warps']:.0%}",
            counted(row["hot"].get("shapes") or row["shapes"]) or "none",
            "" if row["per_product"] is None else f"{row['per_product']:g}",
            _copies(row),
            f"{row['estimate']['us']:.1f} us\n{row['estimate']['bound']}",
            style="bold red" if row["problems"] else None,
        )
    return found


def settings(row: Row) -> str:
    """Tile, warps and stages on one line, without flags that are off."""
    shown = (
        f"{_SHORT.get(name, name.removeprefix('BLOCK_'))} {value}"
        for name, value in row["settings"].items()
        if name in _SHORT or name.startswith(("BLOCK", "GROUP"))
    )
    return " ".join(shown)


def details(row: Row) -> Table:
    """The instruction mix of one kernel, of all its code and of one turn of its hot loop."""
    found = _table(differences.name_of(row))
    found.add_column("instructions", overflow="fold")
    found.add_column("all", justify="right")
    found.add_column("hot loop", justify="right")
    hot = row["hot"]
    inside = hot.get("kinds", {})
    for kind, count in row["kinds"].items():
        found.add_row(kind, str(count), str(inside.get(kind, "")))
    found.add_row("total", str(row["instructions"]), str(hot.get("instructions", "")))
    for name, count in row["shapes"].items():
        turn = hot.get("shapes", {}).get(name, "")
        found.add_row(f"  product {name}", str(count), str(turn))
    for kind, widths in row["widths"].items():
        for width, count in widths.items():
            turn = hot.get("widths", {}).get(kind, {}).get(width, "")
            found.add_row(f"  {kind} of {width} bytes a thread", str(count), str(turn))
    return found


def notes(row: Row) -> list[str]:
    """Of one kernel, the parts of the estimate, and what had to be assumed for it."""
    estimate = row["estimate"]
    parts = ", ".join(f"{name} {us:.1f}" for name, us in estimate["parts"].items() if us >= 0.05)
    grid = "x".join(map(str, row["grid"]))
    return [
        f"estimate, not measured: {estimate['us']:.1f} us on a grid of {grid}, "
        f"{estimate['waves']:g} waves; alone each would take, in us: {parts}",
        *(f"not known: {unknown}" for unknown in estimate["unknown"]),
    ]


def difference(
    old: Sequence[Row], new: Sequence[Row], without: Sequence[str] = ()
) -> tuple[Table, str]:
    """What changed between two tables of rows, worsenings marked; and how much, in a sentence."""
    compared = differences.compare(old, new, without)
    found = _table("what changed")
    found.add_column("kernel", overflow="fold")
    found.add_column("what", overflow="fold")
    found.add_column("old", overflow="fold", justify="right")
    found.add_column("new", overflow="fold", justify="right")
    found.add_column("", overflow="fold")
    for _, row, changes in compared.changed:
        name = differences.name_of({k: v for k, v in row.items() if k not in without})
        for change in changes:
            old_text, new_text = texts(change)
            worse = change.worse
            style = "red" if worse else None
            found.add_row(name, change.what, old_text, new_text, worse, style=style)
            name = ""
    for row in compared.gone:
        found.add_row(differences.name_of(row), "only in the first")
    for row in compared.new:
        found.add_row(differences.name_of(row), "only in the second")
    return found, f"{len(compared.changed)} kernels changed, {compared.equal} are as they were"


def texts(change: differences.Change) -> tuple[str, str]:
    """Old and new value in words; of counts only those that differ."""
    if isinstance(change.old, Mapping) and isinstance(change.new, Mapping):
        names = [
            name
            for name in dict.fromkeys([*change.old, *change.new])
            if change.old.get(name) != change.new.get(name)
        ]
        return (
            counted({name: change.old.get(name, 0) for name in names}),
            counted({name: change.new.get(name, 0) for name in names}),
        )
    return str(change.old), str(change.new)


def counted(counts: Mapping[str, Any]) -> str:
    """ "4 x 64x256x16", one a line; counts within counts in brackets."""
    return "\n".join(
        f"{name}: {counted(count).replace(chr(10), ', ')}"
        if isinstance(count, Mapping)
        else f"{count} x {name}"
        for name, count in counts.items()
    )


def _copies(row: Row) -> str:
    kinds = row["hot"].get("kinds") or row["kinds"]
    widths = row["hot"].get("widths") or row["widths"]
    found = ["TMA"] if "TMA load" in kinds else []
    for kind, name in (("async copy", "async"), ("global load", "load"), ("global store", "store")):
        if kind in widths:
            found.append(f"{name} {'/'.join(widths[kind])} B")
    return "\n".join(found) or "none"


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def selected(rows: Sequence[Row], which: str) -> list[Row]:
    """The rows of a configuration: of its number in the table, or part of its settings' text."""
    if which.isdigit() and int(which) < len(rows):
        one = rows[int(which)]
        return [
            row
            for row in rows
            if row["configuration"] == one["configuration"] and row["settings"] == one["settings"]
        ]
    return [row for row in rows if which in f"{row['configuration']} {settings(row)}"]


# what two configurations of one kernel need not have in common
OF_CONFIGURATION = tuple(name for name in LABEL if name in ("configuration", "call", "number"))
