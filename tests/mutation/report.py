"""The result of the mutation score: its file, its totals, its table in CONTRIBUTING.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.mutation import catalogue
from tritorch.bench.environment import write_result

FOLDER = Path(__file__).resolve().parent
RESULT = FOLDER / "result.json"
GUIDE = FOLDER.parents[1] / "CONTRIBUTING.md"

_BLOCK = re.compile(r"(<!-- mutation score -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = dict[str, dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows of a result file by their ids; none where there is no file yet."""
    if not path.exists():
        return {}
    return {row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def write(path: Path, rows: Rows) -> None:
    """Writes those that the catalogue has, in its order, and the table of the committed result."""
    ordered = [rows[mutant.id] for mutant in catalogue.read() if mutant.id in rows]
    write_result(path, "mutation", ordered, overwrite=True, totals=totals(ordered))
    if path == RESULT:
        GUIDE.write_text(regenerated(GUIDE.read_text(), ordered))


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many defects each half has seen and killed; those that none can see do not count."""
    found: dict[str, Any] = {"mutants": len(rows)}
    found["equivalent"] = sum("survives" in row for row in rows)
    for half in ("suite", "check"):
        measured = [row[half] for row in rows if half in row and "survives" not in row]
        killed = sum(outcome["killed"] for outcome in measured)
        share = round(100 * killed / len(measured), 1) if measured else None
        found[half] = {"measured": len(measured), "killed": killed, "percent": share}
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row per family, and their sum."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = ["| family | defects | found by the tests | found by `tritorch check` |"]
    lines.append("|--|--|--|--|")
    for name in [*families, "all"]:
        some = [row for row in rows if name in (row["family"], "all")]
        counts = totals(some)
        seen = [
            f"{counts[half]['killed']} of {counts[half]['measured']}" for half in ("suite", "check")
        ]
        lines.append(f"| {name} | {len(some)} | {' | '.join(seen)} |")
    lines += ["", *_missed(rows), "", *_unmeasured(rows)]
    return "\n".join(lines) + "\n"


def _missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each defect that a check does not find, with the reason."""
    alive = [
        row for row in rows if "survives" not in row and not row.get("check", {}).get("killed", 1)
    ]
    if not alive:
        return []
    reasons = {mutant.id: mutant.unchecked for mutant in catalogue.read()}
    said = [f"- `{row['id']}`, {row['defect']}: {reasons.get(row['id'], '')}." for row in alive]
    return ["What `tritorch check` does not find:", "", *said]


def _unmeasured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many entries of the catalogue the result does not have as they are."""
    known = {row.get("id"): (row.get("before"), row.get("after")) for row in rows}
    new = sum(known.get(mutant.id) != (mutant.before, mutant.after) for mutant in catalogue.read())
    if not new:
        return []
    return [f"{new} entries of the catalogue are new, or of lines that have changed since."]


def regenerated(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """`text` with its table written anew."""
    return _BLOCK.sub(lambda match: match[1] + table(rows) + match[2], text)
