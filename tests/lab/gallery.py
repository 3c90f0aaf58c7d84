"""What the documentation of `tritorch check` shows of it, written by running it.

`python -m tests.lab.gallery` rewrites every block between `<!-- lab: name -->` and `<!-- end -->`
of docs/check.md and README.md; `--check` only says whether one is stale.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import click

from tritorch.cli.check import check
from tritorch.testing import findings, input_sizes, inputs, schedule

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = (ROOT / "docs" / "check.md", ROOT / "README.md")
EXAMPLES = ROOT / "examples" / "check"

# the first and the last line to show of each example, by a part of it
EXCERPTS = {
    "matmul": ("for k in range", "acc +="),
    "softmax": ("mask = cols < N", "shifted = "),
    "silu": ("def silu_backward_kernel", "grad_y = "),
    "gather_rows": ("row = tl.load", "values = "),
    "linear": ("acc = tl.zeros", "acc +="),
}
# what two machines need not agree on
_SECONDS = re.compile(r", \d+\.\d s$", re.MULTILINE)
_BLOCK = re.compile(r"(<!-- lab: (?P<name>[a-z_ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# the example and the tiles by which the levels are explained
_LEVEL_INPUTS, _LEVEL_TILES = "a[M, K] b[K, N]", (32, 64)


@functools.cache
def report(name: str) -> str:
    """What `tritorch check` prints of an example, without what differs from machine to machine."""
    done = run("-m", "tritorch", "check", target(name))
    if done.returncode != 1:
        raise RuntimeError(f"{target(name)}: expects findings: {done.stdout}{done.stderr}")
    return _SECONDS.sub("", done.stdout.replace(f"{ROOT}{os.sep}", "")).strip()


def passes(name: str) -> str:
    """Runs an example's own test, in Triton's interpreter as it is; what came of it."""
    done = run(f"examples/check/{name}.py", TRITON_INTERPRET="1")
    return "passes" if done.returncode == 0 else "fails"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in the checkout, whose tritorch comes before an installed one."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
    )


def target(name: str) -> str:
    """An example as the command line has it."""
    return f"examples/check/{name}.py:{name}"


def whole(name: str) -> str:
    """The command and all of its report."""
    return _fenced(f"$ tritorch check {target(name)}\n{report(name)}")


def brief(name: str) -> str:
    """The command and its findings, without the properties that it tried."""
    return _fenced(f"$ tritorch check {target(name)}\n...\n\n{findings_of(name)}")


def findings_of(name: str) -> str:
    """From the first finding on."""
    head, found, rest = report(name).partition("\n\n1. ")
    if not found:
        raise RuntimeError(f"{name}: no finding in {head}")
    return "1. " + rest


def gallery() -> str:
    """One section per example: the lines that matter, its test, what the check says."""
    return "\n".join(section(name) for name in EXCERPTS)


def section(name: str) -> str:
    """The section of one example."""
    file = EXAMPLES / f"{name}.py"
    source = file.read_text()
    tree = ast.parse(source)
    said = (ast.get_docstring(tree) or "").split("\n\n")
    (test,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "naive_test"]
    tested = ast.get_source_segment(source, test)
    outcome = f"Its test {passes(name)}; `tritorch check {target(name)}` says:\n"
    return "\n".join(
        [
            f"### [{name}.py](../{file.relative_to(ROOT).as_posix()})\n",
            *(" ".join(paragraph.split()) + "\n" for paragraph in said),
            _fenced(f"{excerpt(source, *EXCERPTS[name])}\n\n\n{tested}", "python"),
            outcome,
            _fenced(findings_of(name)),
        ]
    )


def excerpt(source: str, first: str, last: str) -> str:
    """The lines from the one that has `first` in it to the next that has `last`."""
    lines = source.splitlines()
    starts = [i for i, line in enumerate(lines) if first in line]
    if len(starts) != 1:
        raise RuntimeError(f"excerpt: expects {first!r} in one line, found it in {len(starts)}")
    (start,) = starts
    end = next(i for i, line in enumerate(lines) if i > start and last in line)
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def kinds() -> str:
    """One row per kind of finding."""
    return _table(
        ("finding", "means"), [(kind, meaning) for kind, meaning in findings.KINDS.items()]
    )


def options() -> str:
    """One row per option of the command."""
    rows = []
    for option in check.params:
        if not isinstance(option, click.Option):
            continue
        kind = option.type
        if isinstance(kind, click.Choice):
            value = f" [{'|'.join(map(str, kind.choices))}]"
        elif option.is_flag:
            value = ""
        else:
            value = f" {option.metavar or 'NUMBER'}"
        said = " ".join((option.help or "").split())
        default = f"`{option.default}`" if option.show_default else ""
        rows.append((f"`{option.opts[0]}{value}`", default, said))
    return _table(("option", "default", "means"), rows)


def levels() -> str:
    """What each level tries of one description of inputs."""
    text = inputs.parse(_LEVEL_INPUTS)
    rows = []
    for level in schedule.LEVELS:
        chosen = list(input_sizes.choices(text, _LEVEL_TILES, level, seed=0))
        if level == "quick":
            chosen += [dict(third) for *_, third in input_sizes.third_tiles(text, _LEVEL_TILES)]
        largest = max(max(sizes.values()) for sizes in chosen)
        most = max(map(text.elements, chosen))
        rows.append((f"`{level}`", str(len(chosen)), str(largest), str(most)))
    header = ("level", "choices of sizes", "largest size", "elements of the largest tensor")
    return _table(header, rows)


def _fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("--",) * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


BLOCKS: dict[str, Callable[[], str]] = {
    "kinds": kinds,
    "options": options,
    "levels": levels,
    "report": lambda: whole("matmul"),
    "brief": lambda: brief("gather_rows"),
    "gallery": gallery,
}


def blocks(text: str) -> dict[str, str]:
    """What stands in each block of a document."""
    return {
        match["name"]: match[0].removeprefix(match[1]).removesuffix(match[3])
        for match in _BLOCK.finditer(text)
    }


def regenerated(text: str) -> str:
    """`text` with every block written anew; KeyError for one that does not exist."""
    return _BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]]() + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if one is stale"
    )
    only_check = parser.parse_args().check
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        if (new := regenerated(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if not only_check:
                path.write_text(new)
    if only_check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python -m tests.lab.gallery")


if __name__ == "__main__":
    main()
