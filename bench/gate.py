"""Fails where a shipped configuration compiles to something worse than its baseline.

For each configuration in the kernels' tables, and for each kernel without a table, a row has its
resources and its estimated time; the rows are in `gated/`, one file for each version of Triton,
since another compiler generates other code.

    python -m tritorch.bench.gate            says what is worse, exits 1 if anything is
    python -m tritorch.bench.gate --write    makes the present state the baseline

Code that is the same as in its row is not inspected again, which saves its disassembly.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tritorch.bench import differences, inspection
from tritorch.bench.differences import Change, Row, key, name_of
from tritorch.bench.environment import SCHEMA
from tritorch.registry import OpSpec
from tritorch.testing import dry, products

BASELINES = Path(__file__).resolve().parent / "gated"
TARGETS = ("sm_80", "sm_90")
# the tables are by the size of an element: bfloat16 has float16's; float64 has no tensor cores to
# keep busy, and its code is a fraction of a GPU's work
DTYPES = (torch.float16, torch.float32)
COMMAND = "python -m tritorch.bench.gate --write"

# of an inspection, what is worth keeping
_KEPT = (
    "registers", "stack", "spills", "shared", "blocks", "instructions", "shapes", "widths", "hot",
    "per_product", "serialized", "problems",
)  # fmt: skip
_READERS = (
    "machine_code.py", "traffic.py", "translation.py", "ttir.py", "occupancy.py", "estimate.py",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """`worse`: rows with what is worse.  `unknown`: labels that the baseline lacks, or has left."""

    worse: list[tuple[str, list[Change]]]
    unknown: list[str]
    compared: int

    @property
    def ok(self) -> bool:
        return not self.worse and not self.unknown

    def lines(self) -> Iterator[str]:
        for name, changes in self.worse:
            yield name
            yield from (f"    {change}" for change in changes)
        yield from (f"{name}" for name in self.unknown)
        if not self.ok:
            yield f"where that is meant: {COMMAND}"


def path() -> Path:
    """The baseline of the Triton that is installed; the file need not exist."""
    return BASELINES / f"triton-{metadata.version('triton')}.json"


def load() -> dict[str, Any] | None:
    """The baseline: "rows", and "readers", a hash of what reads the code.  None: there is none."""
    file = path()
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def rows(spec: OpSpec, target: str, known: Iterable[Row] = ()) -> list[dict[str, Any]]:
    """The rows of an op on a target; those of `known` whose code is still the same as they are."""
    by_key = {key(row): row for row in known}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for dtype in DTYPES:
        if dtype not in spec.dtypes or spec.configurations_of:
            continue
        seen: set[str] = set()
        for label, launches in _of_dtype(spec, target, dtype):
            numbers: dict[tuple[str, str], int] = {}
            for which, launch in launches:
                if launch.compiled.hash in seen:
                    continue
                seen.add(launch.compiled.hash)
                number = numbers.setdefault((which, launch.kernel), 0)
                numbers[which, launch.kernel] += 1
                fields = {"which": which, "kernel": launch.kernel, "number": number}
                one = inspection.Label(**{**asdict(label), **fields})
                code = _hash(launch)
                row = by_key.get(one.key)
                if row is None or row["code"] != code:
                    row = _kept(inspection.inspected(launch, one)) | {"code": code}
                found[one.key] = dict(row)
    return list(found.values())


def _of_dtype(
    spec: OpSpec, target: str, dtype: torch.dtype
) -> Iterator[tuple[inspection.Label, list[tuple[str, dry.Launch]]]]:
    """What is launched as torch's flags are, then with products in TF32, which is then the dtype of
    the label.
    """
    yield from _launches(spec, target, dtype)
    if dtype == torch.float32 and spec.autocast == "lower":
        with products.allowing_tf32():
            for label, launches in _launches(spec, target, dtype):
                yield replace(label, dtype="tf32"), launches


def _launches(
    spec: OpSpec, target: str, dtype: torch.dtype
) -> Iterator[tuple[inspection.Label, list[tuple[str, dry.Launch]]]]:
    """What is launched in each shipped configuration, then by the first workload as it is."""
    chosen = None
    for label, recorded in inspection.recordings(spec, target, dtype, tables=True, most=1):
        launches = [("forward", one) for one in recorded.forward]
        launches += [("backward", one) for one in recorded.backward]
        if label.configuration:
            yield label, launches
        else:
            chosen = label, launches
    if chosen is not None:
        yield chosen


def _kept(one: inspection.Inspection) -> dict[str, Any]:
    row = one.to_json()
    kept = {name: row[name] for name in (*differences.LABEL, *_KEPT)}
    estimate = {name: row["estimate"][name] for name in ("us", "bound")}
    return {**kept, "estimate": estimate}


def _hash(launch: dry.Launch) -> str:
    """Of everything that a row follows from: the code without its places, the grid, the numbers."""
    ptx = launch.compiled.asm["ptx"].partition("\t.section")[0]
    code = re.sub(r"^\s*(\.loc|\.file|//).*\n", "", ptx, flags=re.MULTILINE)
    whole = repr((code, launch.grid, sorted(launch.numbers.items()), sorted(launch.sizes.items())))
    return hashlib.blake2b(whole.encode(), digest_size=12).hexdigest()


def readers() -> str:
    """A hash of the files that make rows of machine code."""
    folder = Path(__file__).resolve().parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in _READERS)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def judge(baseline: dict[str, Any], found: Sequence[Row], spec: OpSpec, target: str) -> Verdict:
    """Compares an op's rows on a target with those of the baseline."""
    own = [r for r in baseline["rows"] if r["op"] == spec.name and r["target"] == target]
    # another estimator would compare its own change
    alike = baseline["readers"] == readers()
    difference = differences.compare(own, found)
    worse = []
    for old, new, changes in difference.changed:
        bad = [c for c in changes if c.worse and (alike or c.what != "estimated us")]
        if bad and old["code"] != new["code"]:
            worse.append((name_of(new), bad))
    unknown = [f"{name_of(row)} has no baseline" for row in difference.new]
    unknown += [f"{name_of(row)} is not shipped any more" for row in difference.gone]
    return Verdict(worse, unknown, len(found))


def _write(found: Sequence[Row]) -> None:
    """One row a line, in the order of its label, so that a change is a line of a diff."""
    head = {"schema": SCHEMA, "kind": "gate", "triton": metadata.version("triton")}
    head["readers"] = readers()
    lines = ",\n".join(
        json.dumps(row, separators=(",", ":"))
        for row in sorted(found, key=lambda row: tuple(map(str, key(row))))
    )
    BASELINES.mkdir(exist_ok=True)
    text = json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'
    temporary = path().with_suffix(".writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path())


def _rows_of(task: tuple[str, str, list[Row]]) -> list[dict[str, Any]]:
    name, target, known = task
    (spec,) = inspection.own_ops([name])
    return rows(spec, target, known)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", help="these alone; all ops")
    parser.add_argument("--write", action="store_true", help="take everything as it is now")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    options = parser.parse_args()
    unknown = sorted(set(options.ops) - {spec.name for spec in inspection.own_ops([])})
    if unknown:
        parser.error(f"there is no op {', '.join(unknown)}")
    baseline = load()
    version = metadata.version("triton")
    if baseline is None and not options.write:
        versions = ", ".join(sorted(file.stem for file in BASELINES.glob("*.json"))) or "none"
        sys.exit(f"there is no baseline of triton {version}, there is {versions}")
    old: list[Row] = [] if baseline is None else baseline["rows"]
    same_readers = baseline is None or baseline["readers"] == readers()
    if options.write and options.ops and not same_readers:
        sys.exit("what reads the code has changed: write all ops, not some")
    specs = [spec for spec in inspection.own_ops(options.ops) if not spec.configurations_of]
    found: list[Row] = []
    failed = False
    for spec, target, made in _measured(specs, old if same_readers else [], options.jobs):
        found += made
        if options.write or baseline is None:
            print(f"{spec.name} {target}: {len(made)} rows", file=sys.stderr, flush=True)
            continue
        verdict = judge(baseline, made, spec, target)
        failed |= not verdict.ok
        for line in verdict.lines():
            print(line)
    if options.write:
        names = {spec.name for spec in specs}
        # rows of ops that were not named stay
        others = [row for row in old if row["op"] not in names] if options.ops else []
        _write([*others, *found])
        print(f"{path()}: {len(found)} rows written")
    elif failed:
        sys.exit(1)
    else:
        print(f"{len(found)} kernels are no worse than their baseline")


def _measured(
    specs: Sequence[OpSpec], known: Sequence[Row], jobs: int
) -> Iterator[tuple[OpSpec, str, list[dict[str, Any]]]]:
    """The rows of each op and target, by several processes."""
    pairs = [(spec, target) for spec in specs for target in TARGETS]
    tasks = [
        (spec.name, target, [r for r in known if (r["op"], r["target"]) == (spec.name, target)])
        for spec, target in pairs
    ]
    # Triton and threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for (spec, target), made in zip(pairs, pool.map(_rows_of, tasks), strict=True):
            yield spec, target, made


if __name__ == "__main__":
    main()
