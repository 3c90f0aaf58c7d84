"""The generated tables of the documentation: what the specs declare and what result files say.

`python -m tritorch.bench.tables README.md` rewrites every block between `<!-- table: name -->` and
`<!-- end -->`
of the files named; `--check` only says whether one is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.bench import peers_table, regret, resnet50_tables
from tritorch.bench.measured import RESULTS, markdown, newest
from tritorch.registry import Maker, OpSpec, specs

_RAISES = "raises"
_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}


def ops_table() -> str:
    """One row per layer, then one per op without: its kernels, dtypes, layouts, second gradient."""
    with_layer = [(f"`{layer}`", spec) for spec in specs() for layer in spec.layers]
    without = [(spec.notes or "", spec) for spec in specs() if not spec.layers]
    ordered = [*sorted(with_layer, key=_named), *sorted(without, key=_named)]
    rows = [
        (
            layer,
            f"`{spec.name}`",
            _kernels(spec),
            " ".join(_SHORT[dtype] for dtype in spec.dtypes),
            _layouts(spec),
            _second_gradient(spec),
        )
        for layer, spec in ordered
    ]
    table = markdown(("layer", "op", "kernels", "dtypes", "layouts", "double backward"), rows)
    if any(row[-1] == _RAISES for row in rows):
        table += f'\n"{_RAISES}": the first gradient is right, a second one is an error.\n'
    return table


def _named(row: tuple[str, OpSpec]) -> tuple[str, str]:
    return row[0].lower(), row[1].name


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
    families: dict[str, list[str]] = {}
    for name in spec.kernels:
        family, _, kernel = name.partition(".")
        families.setdefault(family, []).append(kernel.removesuffix("_kernel"))
    return "; ".join(
        f"[{family}](kernels/{family}.py): {', '.join(kernels)}"
        for family, kernels in families.items()
    )


def _second_gradient(spec: OpSpec) -> str:
    if not spec.gradients:
        return ""
    return "yes" if spec.double_backward else _RAISES


def results_table(folder: Path = RESULTS) -> str:
    """One row per GPU, op and pass: the newest time of each shape, summed over the shapes.

    A shape counts as often as its workload has it.  No speed-up is given where one of the shapes
    was not verified.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, row in newest(folder, lambda row: row.get("section") != "layers"):
        gpu, op, which, shape = key
        # sums of whole steps would mix batch sizes
        shape = shape if which.startswith("train_step") else ""
        groups.setdefault((gpu, op, which, shape), []).append(row)
    if not groups:
        return "No result of a GPU is committed yet: nothing is claimed about speed.\n"
    rows = [(*key[:3], *_summed(key[3], rows)) for key, rows in sorted(groups.items())]
    header = ("GPU", "op", "pass", "shapes", "tritorch, us", "torch, us", "speed-up", "weakest")
    return markdown(header, rows)


def layers_table(folder: Path = RESULTS) -> str:
    """One row per GPU and op: the newest times of one typical call, forward and backward."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for (gpu, op, which, _), row in newest(folder, lambda row: row.get("section") == "layers"):
        found.setdefault((gpu, op), {})[which] = row
    if not found:
        return "No result of a GPU is committed yet: nothing is claimed about speed.\n"
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
    "layers": layers_table,
    "convolutions": resnet50_tables.convolutions,
    "convolutions-sums": resnet50_tables.sums,
    "peers": peers_table.table,
    "outcome-products": resnet50_tables.outcome_of("Matrix products and 1x1 convolutions"),
    "outcome-convolutions": resnet50_tables.outcome_of("3x3 convolutions"),
    "outcome-stem": resnet50_tables.outcome_of("The first convolution"),
    "outcome-train": resnet50_tables.train_steps,
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
        text = path.read_text()
        if (new := regenerated(text)) != text:
            stale.append(path)
            if not options.check:
                path.write_text(new)
    if options.check and stale:
        sys.exit(
            f"stale: {', '.join(map(str, stale))}; run python -m tritorch.bench.tables on them"
        )


if __name__ == "__main__":
    main()
