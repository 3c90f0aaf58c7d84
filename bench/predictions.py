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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_KERNELS = (
    "kernels",
    "tritorch/ops",
    "tritorch/launch.py",
    "tritorch/hardware.py",
    "tritorch/descriptors.py",
    "tritorch/tuned.py",
    "tritorch/data/tuned",
)
# errors that a reader may ask about, in either direction
_NEAR = (0.1, 0.2, 0.5)


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
    contents = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*/**/*.json"))]
    return measured_in([c for c in contents if c.get("kind") == "bench"], ops)


def measured_in(
    contents: Sequence[Mapping[str, Any]], ops: Sequence[str] = (), *, fresh: bool | None = None
) -> list[Measured]:
    """The same of the contents of result files; `fresh` where it is known without a look at git."""
    known = {}
    for content in contents:
        environment = content.get("environment", {})
        target = target_of(environment.get("capability"))
        if target is None:
            continue
        same = _same_kernels(environment.get("commit")) if fresh is None else fresh
        for row in content["rows"]:
            wanted = not ops or row["op"] in ops
            if wanted and row.get("implementation") == OURS and row.get("median_us"):
                named = str(environment["gpu"]), row["op"], row["name"], row["dtype"], row["pass"]
                place = *named, *row["shape"]
                known[place] = row, target, same
    cases = _Cases()
    found = []
    for row, target, same in known.values():
        case = cases.of(row)
        # what slowed the GPU down, or kept it waiting, is none of the estimate's business
        if case is not None and not row.get("host_bound") and not row.get("throttled"):
            found.append(Measured(row, case, target, same))
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


def spread(errors: Sequence[float]) -> str:
    """How the errors are distributed, in words."""
    ordered = sorted(errors)
    ends = [math.expm1(ordered[round(part * (len(ordered) - 1))]) for part in (0.1, 0.5, 0.9)]
    low, middle, high = (f"{end:+.0%}" for end in ends)
    count = len(errors)
    near = [sum(abs(error) <= math.log1p(most) for error in errors) / count for most in _NEAR]
    shares = (f"{part:.0%} within {most:.0%}" for part, most in zip(near, _NEAR, strict=True))
    said = f"median {middle}, eight of ten between {low} and {high}"
    return f"{said}; {', '.join(shares)}"


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


HEADER = ("op", "pass", "rows", "median", "typical", "mean", "worst")


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
        print_table([HEADER, *summary(some)])
        print(spread([one.error for one in some]))
    return 0


def print_table(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
