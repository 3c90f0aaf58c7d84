"""The generated tables of the documentation: what the specs declare and what result files say.

`python -m tritorch.bench.tables README.md` rewrites every block between `<!-- table: name -->` and
`<!-- end -->` of the files named; `--check` only says whether one is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.bench import peers_table, regret, resnet50_tables
from tritorch.bench.cases import OURS
from tritorch.bench.measured import RESULTS, markdown, newest
from tritorch.bench.rows import head, key
from tritorch.bench.sections import Setting, planned
from tritorch.registry import Maker, OpSpec, specs

_RAISES = "raises"
_NOTHING = "No result of a GPU is committed yet: nothing is claimed about speed.\n"
_PASSES = ("forward", "backward", "grad_input", "grad_weight")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}


def ops_table() -> str:
    """One row for all ops that are alike in what the columns say: kernels, dtypes, layouts, second
    gradient.  Ops without a layer come last, each with what it is for.
    """
    alike: dict[tuple[str, ...], list[OpSpec]] = {}
    for spec in specs():
        dtypes = " ".join(_SHORT[dtype] for dtype in spec.dtypes)
        cells = _kernels(spec), dtypes, _layouts(spec), _second_gradient(spec)
        alike.setdefault((spec.notes, *cells), []).append(spec)
    rows = []
    for (notes, *said), ops in alike.items():
        layers = _code(layer for spec in ops for layer in spec.layers)
        rows.append((layers or notes, _code(spec.name for spec in ops), *said))
    rows.sort(key=lambda row: (not row[0].startswith("`"), row[0].lower()))
    table = markdown(("layers", "ops", "kernels", "dtypes", "layouts", "double backward"), rows)
    if any(row[-1] == _RAISES for row in rows):
        table += f'\n"{_RAISES}": the first gradient is right, a second one is an error.\n'
    return table


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names, key=str.lower))


def _layouts(spec: OpSpec) -> str:
    """What becomes of the layout of images: every op takes any strides."""
    dims = {
        value.dim()
        for sample in spec.samples(Maker(spec.dtypes[0], "meta"))
        for value in sample.arguments.values()
        if isinstance(value, torch.Tensor)
    }
    if not dims & {4, 5} or not spec.layers:
        return "any strides"
    kept = "channels_last kept" if spec.keeps_format else "the input's kept"
    return f"any strides, {kept}"


def _kernels(spec: OpSpec) -> str:
    families = dict.fromkeys(name.partition(".")[0] for name in spec.kernels)
    return " ".join(f"[{family}](kernels/{family}.py)" for family in families)


def _second_gradient(spec: OpSpec) -> str:
    if not spec.gradients:
        return ""
    return "yes" if spec.double_backward else _RAISES


def results_table(folder: Path = RESULTS) -> str:
    """One row per GPU, op and pass: the newest time of each call, summed over the calls that the
    sections of `make gpu` have, but for `layers`.

    A call counts as often as its workload has it.  No speed-up is given where one of them was not
    verified.
    """
    header = ("GPU", "op", "pass", "shapes", "tritorch, us", "torch, us", "speed-up", "weakest")
    return markdown(header, rows) if (rows := _summed_up(folder)) else _NOTHING


def _summed_up(folder: Path) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    # what a user names himself has no section
    for gpu, row in newest(folder, lambda row: row.get("section") not in (None, "layers")):
        op, which = str(row["op"]), str(row["pass"])
        # sums of whole steps would mix batch sizes
        shape = str(row["shape"]) if which.startswith("train_step") else ""
        groups.setdefault((gpu, op, which, shape), []).append(row)
    return [(*key[:3], *_summed(key[3], rows)) for key, rows in sorted(groups.items())]


def speedups_table(folder: Path = RESULTS) -> str:
    """One row per GPU and op: how many times as fast as torch, and the weakest shape where there
    are several.

    They are those of `results_table`, without what is timed on the host and without whole steps.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for gpu, op, which, shapes, _, _, speedup, weakest in _summed_up(folder):
        if which in _PASSES:
            cell = weakest if not speedup or shapes == "1" else f"{speedup} ({weakest})"
            found.setdefault((gpu, op), {})[which] = cell
    if not found:
        return _NOTHING
    rows = [(*key, *(cells.get(which, "") for which in _PASSES)) for key, cells in found.items()]
    return markdown(("GPU", "op", *_PASSES), rows)


def layers_table(folder: Path = RESULTS) -> str:
    """One row per GPU and op: the newest times of one typical call, forward and backward.

    A call that an earlier section has too is measured there.
    """
    calls = {
        key(head(case, which, OURS))
        for case in planned("layers", Setting())
        for which in case.passes
    }

    def wanted(row: dict[str, Any]) -> bool:
        section = row.get("section")
        return section == "layers" or (section is not None and key(row) in calls)

    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for gpu, row in newest(folder, wanted):
        found.setdefault((gpu, str(row["op"])), {})[str(row["pass"])] = row
    if not found:
        return _NOTHING
    rows = []
    for (gpu, op), passes in sorted(found.items()):
        arguments = passes["forward"]["arguments"]
        cells = [_side_by_side(passes.get(which)) for which in ("forward", "backward")]
        rows.append((gpu, op, arguments, *(cell for pair in cells for cell in pair)))
    header = (
        "GPU",
        "op",
        "call",
        "forward, us",
        "speed-up",
        "backward, us",
        "speed-up",
    )
    return markdown(header, rows)


def _side_by_side(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return f"{row['median_us']:.1f}", f"{row['speedup']:.2f}" if row["speedup"] else "not verified"


def _summed(shape: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    ours, torchs = (
        sum(row.get("count", 1) * row[key] for row in rows) for key in ("median_us", "baseline_us")
    )
    wrong = sum(not row["verified"] for row in rows)
    if rows[0]["pass"].startswith("host"):
        speedup, weakest = "", ""
    elif wrong:
        speedup, weakest = "", f"{wrong} not verified"
    else:
        speedup = f"{torchs / ours:.2f}"
        weakest = f"{min(row['speedup'] for row in rows):.2f}"
    return shape or str(len(rows)), f"{ours:.0f}", f"{torchs:.0f}", speedup, weakest


TABLES: dict[str, Callable[[], str]] = {
    "ops": ops_table,
    "results": results_table,
    "speedups": speedups_table,
    "layers": layers_table,
    "convolutions": resnet50_tables.convolutions,
    "convolutions-sums": resnet50_tables.sums,
    "peers": peers_table.table,
    "outcome-products": resnet50_tables.outcome_of("Matrix products and 1x1 convolutions"),
    "outcome-convolutions": resnet50_tables.outcome_of("3x3 convolutions"),
    "outcome-stem": resnet50_tables.outcome_of("The first convolution"),
    "outcome-train": resnet50_tables.train_steps,
    "steps": resnet50_tables.newest_steps,
    "regret": regret.table,
}


def regenerated(text: str) -> str:
    """`text` with every table block written anew; KeyError for a table that does not exist."""
    return _BLOCK.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if one is stale"
    )
    options = parser.parse_args()
    stale = []
    for path in options.files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            sys.exit(f"{path}: {error}")
        if unknown := {match["name"] for match in _BLOCK.finditer(text)} - TABLES.keys():
            known = ", ".join(sorted(TABLES))
            sys.exit(f"{path}: there is no table '{min(unknown)}', there are {known}")
        new = regenerated(text)
        if new != text:
            stale.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if options.check and stale:
        sys.exit(
            f"stale: {', '.join(map(str, stale))}; run python -m tritorch.bench.tables on them"
        )


if __name__ == "__main__":
    main()
