"""What result files say: the rows that a GPU timed, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tritorch.bench.rows import key

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def newest(folder: Path, wanted: Callable[[Row], bool]) -> Iterator[tuple[str, Row]]:
    """GPU and newest row of each call and pass that was timed."""
    found: dict[tuple[str, ...], tuple[str, Row]] = {}
    for environment, row in timed(folder):
        if wanted(row):
            gpu, of_call = str(environment["gpu"]), key(row)
            if row["pass"].startswith("host"):
                # a call whose host time counts is any small one
                of_call = str(row["op"]), str(row["pass"])
            on_gpu = gpu, *of_call
            found[on_gpu] = gpu, row
    yield from found.values()


def timed(folder: Path) -> Iterator[tuple[Row, Row]]:
    """Environment and row of all of ours that have a baseline, of the oldest result first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/**/*.json"))]
    results = [result for result in results if result["environment"].get("gpu")]
    for result in sorted(results, key=lambda result: str(result["environment"].get("date"))):
        for row in result["rows"]:
            ours = row.get("implementation", "tritorch") == "tritorch"
            if ours and row.get("baseline_us") and row.get("median_us"):
                yield result["environment"], row


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("--",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
