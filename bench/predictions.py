"""The estimate beside what was measured, for every row of the result files that is of our kernels.

The kernels that are compiled are today's.  Where a file was measured with others, its rows say how
far the kernels have moved, not how far off the estimate is: they are summed up by themselves.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tritorch.bench import estimate
from tritorch.bench.cases import OURS, Case, workloads
from tritorch.bench.precompile import target_of
from tritorch.bench.recording import record
from tritorch.bench.resnet50 import Shapes

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
# what decides which kernels run, and in which configuration
_KERNELS = ("kernels", "tritorch/ops", "tritorch/launch.py")


@dataclass(frozen=True)
class Measured:
    """A row of a result file, the case that it is of, and whether its kernels are today's."""

    row: dict[str, Any]
    case: Case
    target: str
    fresh: bool


@dataclass(frozen=True)
class Prediction:
    """Microseconds, estimated and measured."""

    of: Measured
    us: float

    @property
    def error(self) -> float:
        """The logarithm of estimated over measured: as far off in either direction."""
        return math.log(self.us / self.of.row["median_us"])


def measured(results: Path = RESULTS, ops: Sequence[str] = ()) -> list[Measured]:
    """The newest row of each case and pass that a GPU measured and that its host did not bound."""
    known = {}
    for path in sorted(results.glob("*/**/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        environment = content.get("environment", {})
        target = target_of(environment.get("capability"))
        if target is None or content.get("kind") != "bench":
            continue
        fresh = _same_kernels(environment.get("commit"))
        for row in content["rows"]:
            wanted = not ops or row["op"] in ops
            if wanted and row.get("implementation") == OURS and row.get("median_us"):
                named = str(environment["gpu"]), row["op"], row["name"], row["dtype"], row["pass"]
                known[(*named, *row["shape"])] = row, target, fresh
    cases = _Cases()
    found = []
    for row, target, fresh in known.values():
        case = cases.of(row)
        if case is not None and not row.get("host_bound"):
            found.append(Measured(row, case, target, fresh))
    return found


class _Cases:
    """The cases that rows are of, by op and shape."""

    def __init__(self) -> None:
        self._by_batch: dict[tuple[int, str], dict[tuple[Any, ...], Case]] = {}

    def of(self, row: dict[str, Any]) -> Case | None:
        """None where no case of today makes such a row."""
        shape = tuple(row["shape"])
        batch, dtype = (256 if row["op"] == "linear" else shape[0] if shape else 0), row["dtype"]
        if batch not in (32, 256):
            return None
        if (batch, dtype) not in self._by_batch:
            self._by_batch[batch, dtype] = dict(self._made(batch, getattr(torch, dtype)))
        known = self._by_batch[batch, dtype]
        case = known.get((row["op"], row["name"], shape)) or known.get((row["op"], "", shape))
        return case if case is not None and row["pass"] in case.passes else None

    def _made(self, batch: int, dtype: torch.dtype) -> Iterator[tuple[tuple[Any, ...], Case]]:
        shapes = Shapes(batch, dtype)
        made = (
            shapes.convolutions, shapes.products, shapes.batch_norms, shapes.pools,
            shapes.elementwise, lambda: workloads(dtype=dtype),
        )  # fmt: skip
        for make in made:
            for case in make():
                yield (case.op, "", tuple(case.shape)), case
                yield (case.op, case.name, tuple(case.shape)), case


def _same_kernels(commit: str | None) -> bool:
    if commit is None:
        return False
    command = ["git", "-C", str(_ROOT), "diff", "--quiet", commit, "--", *_KERNELS]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def predicted(
    found: Sequence[Measured], tell: Callable[[str], None] = lambda text: None
) -> Iterator[Prediction]:
    """The estimate of each row, whose kernels are compiled for its GPU."""
    for one in found:
        tell(f"{one.case.op} {one.case.name} {one.row['pass']}")
        wanted = one.case.passes[one.row["pass"]]
        function = one.case.implementations[OURS]
        launched = record(function, one.case.arguments, one.target, gradients=wanted)
        both = {"forward": launched.forward, "both": launched.launches}
        launches = both.get(one.row["pass"], launched.backward)
        # a call that falls back to torch has no kernel to estimate
        if launches:
            yield Prediction(one, estimate.of_launches(launches, one.target))


def summary(predictions: Sequence[Prediction]) -> list[tuple[str, ...]]:
    """Rows of a table: op, pass, how many, the typical factor too long or short, the worst."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one in predictions:
        key = one.of.row["op"], one.of.row["pass"]
        groups.setdefault(key, []).append(one.error)
    everything = [error for errors in groups.values() for error in errors]
    rows = [(*key, *_errors(errors)) for key, errors in groups.items()]
    return [*rows, ("all", "", *_errors(everything))] if rows else []


def _errors(errors: Sequence[float]) -> tuple[str, ...]:
    signed = statistics.median(errors)
    sizes = [abs(error) for error in errors]
    worst = max(errors, key=abs)
    return (
        str(len(errors)),
        f"{math.expm1(signed):+.0%}",
        f"x{math.exp(statistics.median(sizes)):.2f}",
        f"x{math.exp(statistics.mean(sizes)):.2f}",
        f"{math.expm1(worst):+.0%}",
    )


_HEADER = ("op", "pass", "rows", "median", "typical", "mean", "worst")


def report(results: Path = RESULTS, ops: Sequence[str] = (), *, rows: bool = False) -> int:
    """Prints the errors of the estimate; says so where nothing is measured."""
    found = measured(results, ops)
    if not found:
        print("nothing is measured yet that the estimate could be compared with")
        return 0

    def tell(text: str) -> None:
        print(f"\r{text:<60.60}", end="", file=sys.stderr, flush=True)

    everything = list(predicted(found, tell))
    tell("")
    print("", file=sys.stderr)
    for fresh, title in (
        (True, "with today's kernels: how far off the estimate is"),
        (False, "measured with other kernels: how far off, and how much the kernels have changed"),
    ):
        some = [one for one in everything if one.of.fresh == fresh]
        if not some:
            continue
        print(f"\n{title}")
        if rows:
            for one in some:
                row = one.of.row
                print(
                    f"  {row['op']} {row['name']} {row['shape']} {row['pass']}: measured "
                    f"{row['median_us']:.1f} us, estimated {one.us:.1f} us, "
                    f"{math.expm1(one.error):+.0%}"
                )
        _print([_HEADER, *summary(some)])
    return 0


def _print(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
