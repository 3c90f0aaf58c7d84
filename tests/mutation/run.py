"""The mutation score: which defects of the catalogue the tests find, and which `tritorch check`.

`python -m tests.mutation.run` takes the committed tree, applies the one-line defects of
tests/mutation/catalogue to a copy of it in a temporary folder, one at a time, and runs the tests on
each until one fails: first those of its ops, and where it survives them the other files.  A check
is a full one, up to its first finding.  In the end the tests that found something run without a
defect, and must pass.  The result, tests/mutation/result.json, is written after every defect, and
the next run goes on there: what it has is measured again only where the line or its replacement has
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutation import catalogue, report
from tests.mutation.catalogue import Mutant

ROOT = Path(__file__).resolve().parents[2]

# what is tried first: the op's own properties; then the tests of its family, then the other files
_OF_OP = {
    "cross_entropy": "cross_entropy and not binary",
    "binary_cross_entropy": "binary_cross_entropy and not logits",
}
# words of the tests that are made for a class of defects
_OF_KIND = {
    "NaN semantics": "special",
    "TF32 always": "tf32",
    "ignored strides": "layout",
    "missing memory format": "layout_of_results",
    "wrong needs_input_grad index": "alone",
}
_FILE_OF_KIND = {
    "alignment hint": "tests/test_hints.py",
    "TF32 always": "tests/test_tf32.py",
    "lost int64 cast": "tests/test_offsets.py",
    "missing memory format": "tests/test_formats.py",
}
_OF_FAMILY = {
    "conv": ["tests/test_residual.py"],
    "conv_batch_norm": ["tests/test_conv_batch_norm.py"],
    "depthwise": ["tests/test_residual.py"],
    "losses": ["tests/test_loss.py", "tests/test_cross_entropy.py"],
    "matmul": ["tests/test_residual.py"],
    "batch_norm": ["tests/test_batch_norm.py", "tests/test_batch_norm_stages.py"],
    "sgd": ["tests/test_sgd.py", "tests/test_sgd_protocol.py"],
    "pool": ["tests/test_pool.py", "tests/test_adaptive_pool.py"],
    "reduce": ["tests/test_reduce.py"],
    "activation": ["tests/test_in_place.py"],
}
# no other interpreted test takes these for a GPU's
_OF_DESCRIPTORS = {
    "kernels/conv_tma.py": ["tests/test_conv_tma.py"],
    "kernels/conv_weight_tma.py": ["tests/test_conv_weight_tma.py", "tests/test_conv_tma.py"],
    "kernels/matmul_tma.py": [
        "tests/test_matmul_tma.py",
        "tests/test_matmul_tma_float32.py",
        "tests/test_pointwise_tma.py",
    ],
}
# what has run by then, and what tests no op
_ELSEWHERE = (
    "test_ops.py",
    "test_memory.py",
    "test_interpreter.py",
    "test_interpreter_numbers.py",
    "lab",
)
_PYTEST = ("-v", "--tb=no", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Kill:
    """What ended the life of a mutant: a test or a finding, what it said, on which rung."""

    by: str
    said: str
    rung: str = ""


class Tree:
    """A copy of the committed tree, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit = _git("rev-parse", "HEAD").strip()
        archive = folder / "tree.tar"
        _git("archive", "--output", str(archive), self.commit)
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
        archive.unlink()
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def ask(self, mode: str, **request: object) -> tuple[int, str]:
        """Exit status of what `server.py` does in a mode of Triton, and what it printed.

        The status is the negative number of a signal where one ended it.
        """
        output = self.folder / f"{mode}.out"
        server = self._server(mode)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request | {"output": str(output)}) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), output.read_text(errors="replace")

    def _server(self, mode: str) -> subprocess.Popen[str]:
        """The process of a mode of Triton, with the lowest claim on the machine."""
        if mode not in self._servers:
            environment = os.environ | {
                "PYTHONPATH": str(self.folder),
                # Triton reads it once, when it is imported
                "TRITON_INTERPRET": "1" if mode == "interpret" else "0",
                # a line replaced within the second would leave the bytecode of the old one valid
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "MPLBACKEND": "agg",
                # of the summary, where a test says why it failed
                "COLUMNS": "400",
            }
            self._servers[mode] = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, Path(__file__).with_name("server.py")],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._servers[mode]

    @contextlib.contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Has the defect inside the block."""
        file = self.folder / mutant.file
        source = file.read_text()
        file.write_text(mutant.applied(source))
        try:
            yield
        finally:
            file.write_text(source)

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers.values():
            server.communicate()

    def first_failure(self, rung: str, *selected: str) -> Kill | None:
        """The first test of those selected that fails, or None."""
        arguments = [*_PYTEST, "-x", "--rung", rung, *selected]
        status, printed = self.ask(rung, arguments=arguments)
        # 5: none of this class and op
        if status in (0, 5):
            return None
        if failed := _failed(printed):
            return Kill(*failed[0], rung)
        running = re.findall(r"^(tests/\S+::\S+) ", printed, re.MULTILINE)
        if status < 0 and running:
            return Kill(running[-1], f"ended by {signal.Signals(-status).name}", rung)
        raise RuntimeError(f"pytest on {selected} ended with {status}: {printed[-2000:]}")

    def first_finding(self, mode: str, op: str, level: str) -> Kill | None:
        """What `tritorch check` finds first of an op, or None."""
        status, printed = self.ask(mode, check=[mode, op, level])
        if status == 0:
            return None
        if status < 0:
            return Kill("crash", f"{op}: ended by {signal.Signals(-status).name}", mode)
        try:
            found = json.loads(printed.splitlines()[-1])
        except ValueError:
            raise RuntimeError(f"check {op} ended with {status}: {printed[-2000:]}") from None
        place = f"{found['file'].rpartition('/')[2]}:{found['line']}" if found["line"] else ""
        return Kill(f"{found['kind']} {place}".strip(), f"{op}: {found['message']}", mode)

    def failing(self, rung: str, tests: Sequence[str]) -> set[str]:
        """Those of the tests that fail."""
        status, printed = self.ask(rung, arguments=[*_PYTEST, "--rung", rung, *tests])
        if status not in (0, 1):
            raise RuntimeError(f"pytest ended with {status}: {printed[-2000:]}")
        return {test for test, _ in _failed(printed)}


def _failed(printed: str) -> list[tuple[str, str]]:
    """Tests that failed and what they said, of pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", printed, re.MULTILINE)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _stages(mutant: Mutant, thorough: bool) -> Iterator[tuple[str, list[str]]]:
    """Rungs and selections of tests, the likeliest to fail first."""
    if thorough:
        yield "interpret", ["tests", *(f"--ignore=tests/{name}" for name in _ELSEWHERE)]
        return
    ops = " or ".join(f"({_OF_OP.get(op, op)})" for op in mutant.ops)
    if mutant.kind in catalogue.COMPILED:
        yield "compile", ["tests/test_compile.py", "-k", f"every_configuration and ({ops})"]
        yield "compile", ["tests/test_compile.py", "-k", ops]
        yield "interpret", ["tests/test_ops.py", "-k", ops]
        return
    for file in _OF_DESCRIPTORS.get(mutant.file, []):
        yield "interpret", [file]
    if file := _FILE_OF_KIND.get(mutant.kind):
        yield "interpret", [file, "-k", ops]
    if word := _OF_KIND.get(mutant.kind):
        yield "interpret", ["tests/test_ops.py", "-k", f"{word} and ({ops})"]
    files = ["tests/test_ops.py", "tests/test_memory.py"]
    if mutant.kind == "dropped mask":
        files.reverse()
    for file in files:
        yield "interpret", [file, "-k", ops]
    for file in _OF_FAMILY.get(mutant.family, []):
        yield "interpret", [file]


def killed_by_suite(mutant: Mutant, tree: Tree, thorough: bool) -> Kill | None:
    """The first test that fails with the defect: of those of its ops, or of the other files."""
    kills = (tree.first_failure(rung, *chosen) for rung, chosen in _stages(mutant, thorough))
    return next((kill for kill in kills if kill is not None), None)


def killed_by_check(mutant: Mutant, tree: Tree, thorough: bool) -> Kill | None:
    """What a full check finds first with the defect; it is as thorough as can be."""
    modes = ["interpret", "compile"]
    if mutant.kind in catalogue.COMPILED:
        modes.reverse()
    kills = (tree.first_finding(mode, op, "full") for mode in modes for op in mutant.ops)
    return next((kill for kill in kills if kill is not None), None)


def measure(mutants: Sequence[Mutant], halves: Sequence[str], path: Path, again: bool) -> None:
    """Measures what `path` does not have, and writes it there after each; survivors twice."""
    rows = report.read(path)
    with (
        tempfile.TemporaryDirectory(prefix="tritorch-mutation-") as name,
        contextlib.closing(Tree(Path(name))) as tree,
    ):
        unseen = [mutant for mutant in catalogue.read() if mutant.survives]
        for mutant in {m.id: m for m in (*mutants, *unseen)}.values():
            row = _row(mutant, tree, rows.get(mutant.id, {}))
            rows[mutant.id] = {n: v for n, v in row.items() if not again or n not in halves}
        for thorough in (False, True):
            for number, mutant in enumerate(mutants, 1):
                for half in halves:
                    known = rows[mutant.id].get(half)
                    if known and (known["killed"] or known["thorough"] >= thorough):
                        continue
                    rows[mutant.id][half] = found = _measured(mutant, tree, half, thorough)
                    said = f"killed by {found['by']}" if found["killed"] else "SURVIVES"
                    print(f"{number}/{len(mutants)} {mutant.id}: {half}: {said}", flush=True)
                    report.write(path, rows)
        _confirm(rows, tree)
        report.write(path, rows)


def _measured(mutant: Mutant, tree: Tree, half: str, thorough: bool) -> dict[str, Any]:
    started = time.monotonic()
    with tree.changed(mutant):
        kill = HALVES[half](mutant, tree, thorough)
    return {
        "killed": kill is not None,
        **(_shown(kill) if kill else {}),
        "thorough": thorough or half == "check",
        "seconds": round(time.monotonic() - started, 1),
        "commit": tree.commit[:12],
    }


def _shown(kill: Kill) -> dict[str, str]:
    shown = {"by": kill.by, "said": kill.said[:200]}
    return shown | {"rung": kill.rung} if kill.rung else shown


def _confirm(rows: report.Rows, tree: Tree) -> None:
    """Forgets what was killed by what is also found without the defect."""
    for half in HALVES:
        kills = [row for row in rows.values() if row.get(half, {}).get("killed")]
        unsure = [row for row in kills if "confirmed" not in row[half]]
        alarms = {
            (mode, alarm)
            for mode in ("interpret", "compile")
            for alarm in _alarms(
                half, tree, mode, [r[half] for r in unsure if r[half]["rung"] == mode]
            )
        }
        for row in unsure:
            row[half]["confirmed"] = True
            if (row[half]["rung"], row[half]["by"]) in alarms:
                print(f"{row['id']}: {half}: {row.pop(half)['by']} without the defect, too")


def _alarms(half: str, tree: Tree, mode: str, kills: Sequence[Mapping[str, str]]) -> set[str]:
    """Of the tests, or findings, of these kills those that the unchanged tree has."""
    if not kills:
        return set()
    if half == "suite":
        return tree.failing(mode, sorted({kill["by"] for kill in kills}))
    ops = sorted({kill["said"].partition(":")[0] for kill in kills})
    found = (tree.first_finding(mode, op, "full") for op in ops)
    return {finding.by for finding in found if finding is not None}


def _row(mutant: Mutant, tree: Tree, known: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a mutant without results, or with those that still hold."""
    source = (tree.folder / mutant.file).read_text()
    row: dict[str, Any] = {
        "id": mutant.id,
        "family": mutant.family,
        "file": mutant.file,
        "line": mutant.line(source),
        "before": mutant.before,
        "after": mutant.after,
        "class": mutant.kind,
        "defect": mutant.defect,
    }
    if mutant.survives:
        row["survives"] = mutant.survives
    same = all(known.get(name) == row[name] for name in ("file", "before", "after"))
    return row | {half: known[half] for half in HALVES if same and half in known}


HALVES = {"suite": killed_by_suite, "check": killed_by_check}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ids", nargs="*", help="these entries; by default all that can be seen")
    parser.add_argument("--half", choices=HALVES, action="append", help="by default every one")
    parser.add_argument("--again", action="store_true", help="measure also what the result has")
    parser.add_argument("--survivors", action="store_true", help="again, what survived before")
    parser.add_argument("--result", type=Path, default=report.RESULT, help="the file")
    options = parser.parse_args()
    mutants = catalogue.read()
    if unknown := set(options.ids) - {mutant.id for mutant in mutants}:
        parser.error(f"no such entry: {', '.join(sorted(unknown))}")
    halves = options.half or list(HALVES)
    chosen = [m for m in mutants if (m.id in options.ids if options.ids else not m.survives)]
    if options.survivors:
        rows = report.read(options.result)
        alive = {
            i for i, row in rows.items() for h in halves if not row.get(h, {}).get("killed", 1)
        }
        chosen = [mutant for mutant in chosen if mutant.id in alive]
    measure(chosen, halves, options.result, options.again or options.survivors)


if __name__ == "__main__":
    main()
