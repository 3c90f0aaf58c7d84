"""The estimate beside what a run has measured: how far off it is, kept with the result.

It needs no GPU: kernels are compiled by several processes, most of them found in Triton's cache.
`python -m tritorch.bench.calibration RESULT` does the same for an old result, in a file beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritorch.bench import compare, predictions
from tritorch.bench.environment import environment
from tritorch.bench.precompile import target_of
from tritorch.bench.predictions import Measured, Prediction
from tritorch.bench.store import Store

# children take the rows from here: cases do not travel
_rows: Sequence[Measured] = ()


def add(
    store: Store, workers: int, until: float | None = None, *, fresh: bool | None = None
) -> None:
    """Adds the estimates of a run's rows to its result, and prints how far off they are.

    `until`: a moment of `time.time` after which the rest is left out.  `fresh`: whether the rows
    are of today's kernels, where that is known without a look at git; if they are not, what is
    said is how far the kernels have moved as well.
    """
    found = predictions.measured_in([store.content()], fresh=fresh)
    if not found:
        print("calibration: no row of a GPU that an estimate could be compared with")
        return
    made, failures = _estimated(found, workers, until)
    errors = [one.error for one in made]
    left = len(found) - len(made) - len(failures)
    store.more["calibration"] = [_row(one) for one in made]
    store.more["calibration_summary"] = {
        "about": "estimates from code and grid, beside what was measured",
        "errors": predictions.spread(errors) if errors else "",
        "same_kernels": all(one.fresh for one in found),
        "left_out": left,
        "failures": failures,
    }
    store.write()
    print("calibration: how far off the estimate is; it is never a measurement")
    if not all(one.fresh for one in found):
        print("(the rows were measured with other kernels, which may have moved too)")
    if made:
        predictions.print_table([predictions.HEADER, *predictions.summary(made)])
        print(predictions.spread(errors))
    for what in (*failures, f"{left} rows: no time left" if left else ""):
        if what:
            print(f"skipped: calibration: {what}")


def _row(one: Prediction) -> dict[str, Any]:
    kept = ("op", "name", "shape", "dtype", "layout", "pass")
    row = {name: one.of.row.get(name) for name in kept}
    return row | {
        "measured_us": one.of.row["median_us"],
        "estimated_us": one.us,
        "error": math.expm1(one.error),
    }


def _estimated(
    found: Sequence[Measured], workers: int, until: float | None
) -> tuple[list[Prediction], list[str]]:
    """What was estimated in time, and what could not be."""
    global _rows
    _rows = found
    made: list[Prediction] = []
    failures: list[str] = []
    # as `gpu` does: imports and plans are there already
    with multiprocessing.get_context("fork").Pool(max(1, workers), _lower) as pool:
        for number, us, why in pool.imap(_one, range(len(found))):
            if us is not None:
                made.append(Prediction(found[number], us))
            elif why:
                failures.append(f"{found[number].case.op} {found[number].case.name}: {why}")
            if until is not None and time.time() > until:
                pool.terminate()
                break
    return made, failures


def _lower() -> None:
    # the parent ends its workers, by the one or the other
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(5)
    torch.set_num_threads(1)


def _one(number: int) -> tuple[int, float | None, str]:
    try:
        for prediction in predictions.predicted([_rows[number]]):
            return number, prediction.us, ""
    except Exception as error:
        return number, None, f"{type(error).__name__}: {error}"[:300]
    return number, None, "a fallback to torch, which has no estimate"


def known(target: str, results: Path = predictions.RESULTS) -> str:
    """How far off estimates for a target were in the newest result that says it; "" for none."""
    newest: tuple[str, str] = "", ""
    for path in results.glob("*/**/*.json"):
        text = path.read_text(encoding="utf-8")
        if '"calibration"' not in text:
            continue
        content: Mapping[str, Any] = json.loads(text)
        where, rows = content["environment"], content.get("calibration")
        if rows and target_of(where.get("capability")) == target:
            summary = content["calibration_summary"]
            said = f"{summary['errors']} of {len(rows)} rows on {where['gpu']}"
            said += "" if summary["same_kernels"] else ", measured with earlier kernels"
            newest = max(newest, (str(where.get("date")), said))
    return newest[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="a result of make gpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    path: Path = options.result
    try:
        compare.read(path)
    except compare.NoResult as error:
        parser.error(str(error))
    measured = Store(path)
    measured.again()
    store = Store(None, "calibration")
    store.rows, store.environment = measured.rows, measured.environment
    add(store, options.workers)
    store.rows, store.path = (
        [],
        path.with_name(f"{path.stem.removesuffix('-gpu')}-calibration.json"),
    )
    # the numbers that it is about stay where they are
    store.more |= {"source": path.name, "estimated_at": environment()["commit"]}
    store.write()
    print(f"calibration: {store.path}")


if __name__ == "__main__":
    main()
