"""The table of what peers were measured at, beside torch and us in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tritorch.bench.cases import OURS, TORCH
from tritorch.bench.measured import RESULTS, markdown
from tritorch.bench.peers import NAMES
from tritorch.bench.rows import key

_COLUMNS = (OURS, *NAMES)


def table(folder: Path = RESULTS) -> str:
    """One row per call and pass that a peer has: times as fast as torch, of the newest run."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/**/*.json"))]
    for result in sorted(results, key=lambda result: str(result["environment"].get("date"))):
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in result["rows"]:
            if "implementation" in row:
                of_call = str(result["environment"].get("gpu")), *key(row)[:-1]
                found.setdefault(of_call, {})[row["implementation"]] = row
        # not a peer of one run beside us of another
        groups |= {call: rows for call, rows in found.items() if rows.keys() & set(NAMES)}
    if not groups:
        return "No result of a GPU has peers yet.\n"
    rows = [_row(call[0], found) for call, found in sorted(groups.items())]
    header = ("GPU", "op", "call", "dtype", "pass", "torch, us", *_COLUMNS)
    return markdown(header, rows)


def _row(gpu: str, found: dict[str, Any]) -> tuple[str, ...]:
    torchs = found[TORCH]
    call = f"{torchs['name']} {torchs['shape']}"
    cells = (gpu, torchs["op"], call, torchs["dtype"], torchs["pass"], f"{torchs['median_us']:.1f}")
    return *cells, *(_cell(found.get(name)) for name in _COLUMNS)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["median_us"] is None:
        return "raises"
    return f"{row['speedup']:.2f}" if row["verified"] else "wrong"
