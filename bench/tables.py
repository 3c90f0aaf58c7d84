"""The generated tables of the documentation: what the specs declare and what result files say.

`python -m tritorch.bench.tables README.md` rewrites every block between `<!-- table: name -->` and
`<!-- end -->`
of the files named; `--check` only says whether one is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import OpSpec, specs

RESULTS = Path(__file__).resolve().parent / "results"

_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
}


def ops_table() -> str:
    """One row per op: its layers, kernels, dtypes and second gradient."""
    rows = [
        (
            f"`{spec.name}`",
            ", ".join(f"`{layer}`" for layer in spec.layers) or spec.notes or "",
            _kernels(spec),
            " ".join(_SHORT[dtype] for dtype in spec.dtypes),
            _second_gradient(spec),
        )
        for spec in sorted(specs(), key=lambda spec: spec.name)
    ]
    return _markdown(("op", "layers", "kernels", "dtypes", "double backward"), rows)


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
    return "yes" if spec.double_backward else "raises"


def results_table(folder: Path = RESULTS) -> str:
    """One row per timed row of every committed result file, slowest claim first to be checked:
    verified or not.
    """
    rows = [
        (
            str(environment.get("gpu")),
            str(environment.get("date"))[:10],
            str(row["op"]),
            str(row["pass"]),
            str(row["implementation"]),
            f"{row['median_us']:.1f}",
            f"{row['speedup']:.2f}"
            if row.get("verified") and row.get("speedup")
            else "not verified",
        )
        for environment, row in _timed(folder)
    ]
    if not rows:
        return "No result of a GPU is committed yet: nothing is claimed about speed.\n"
    header = ("GPU", "date", "op", "pass", "implementation", "median, us", "speed-up over torch")
    return _markdown(header, rows)


def _timed(folder: Path) -> Iterator[tuple[dict[str, object], dict[str, float]]]:
    for path in sorted(folder.glob("*/**/*.json")):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if "median_us" in row and result["environment"].get("gpu"):
                yield result["environment"], row


def _markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("--",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"ops": ops_table, "results": results_table}


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
