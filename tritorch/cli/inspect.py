"""`tritorch inspect`: what the compiler made of a kernel, for GPUs that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tritorch.cli.options import check_folder, stop, words

_USAGE, _UNABLE = 2, 3
_KIND = "inspect"
# of `tritorch.bench.inspection`, which is not imported before it is known that Triton is there
_STAGES = ("ttir", "ttgir", "llir", "ptx", "sass", "amdgcn")
_ESTIMATED = "estimate: what the launch should take by its code and grid; nothing was measured"
# tables on paper, in a file, in a pipe
_WIDTH = 180


@click.command()
@click.argument("target", required=False)
@click.option(
    "--arch",
    "targets",
    callback=words,
    default="sm_90",
    show_default=True,
    metavar="A,B",
    help="GPUs to compile for: sm_80, sm_90, sm_100, gfx942.",
)
@click.option(
    "--dtypes", callback=words, default="", metavar="A,B", help="float32, bfloat16, ...  [float16]"
)
@click.option(
    "--tf32", is_flag=True, help="Products of float32 may be TF32's, as torch's flags can say."
)
@click.option(
    "--inputs",
    default="",
    metavar="TEXT",
    help="What the arguments of a function of yours look like, 'x[M, K] w[K, N] M=4096'.  "
    "[INPUTS beside it, else a guess by the reference beside it]",
)
@click.option(
    "--gradients", callback=words, default="", metavar="A,B", help="Its arguments with a gradient."
)
@click.option("--calls", default="", metavar="TEXT", help="Part of the name of an op's workloads.")
@click.option("--kernel", default="", metavar="TEXT", help="Part of the name of the kernels.")
@click.option(
    "--configs",
    type=click.Choice(["chosen", "all"]),
    default="chosen",
    show_default=True,
    help="all: an op's workloads also in every shipped configuration.",
)
@click.option("--details", is_flag=True, help="The instruction mix of every kernel.")
@click.option(
    "--rank",
    is_flag=True,
    help="An op's shipped configurations for each workload, the fastest by the estimate first.",
)
@click.option(
    "--why",
    nargs=2,
    default=None,
    metavar="OP SHAPE",
    help="Which kernels and configurations a shape of conv2d, linear or matmul runs, and why.",
)
@click.option(
    "--emit",
    "stages",
    multiple=True,
    type=click.Choice(_STAGES),
    help="The kernels' text at a stage, instead of a table; may be repeated.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where --emit writes a file for each kernel and stage.  [to the terminal]",
)
@click.option(
    "--diff",
    nargs=2,
    metavar="A B",
    help="What differs between two reports of --json, of two commits say, or between two "
    "configurations: their numbers in the table, or part of their settings.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Write the report there; - is stdout, and the text goes to stderr.",
)
@click.option("--force", is_flag=True, help="Let --json replace what is there.")
def inspect(target: str | None, json_file: Path | None, force: bool, **options: Any) -> None:
    """Show what the compiler made of a Triton kernel; no GPU needed.

    TARGET is an op of tritorch's own, "all" of them, or a Python function that takes tensors and
    launches kernels: package.module:function or path/to/file.py:function.  Nothing runs.

    For every kernel: registers, spills, shared memory against the limit, blocks and occupancy of a
    multiprocessor and what limits them, the products of the tensor cores by shape, instructions per
    product in the hot loop, copies by TMA or asynchronously, how many bytes a thread moves at once,
    and an estimate of the time of the launch, which is never a measurement.

    Exit status: 0, 2 a wrong call, 3 something is missing or does not compile.
    """
    console = Console(
        stderr=str(json_file) == "-", highlight=False, emoji=False, markup=False, soft_wrap=False
    )
    if not console.is_terminal:
        console.width = _WIDTH
    _check(json_file, force, options)
    with contextlib.ExitStack() as stack:
        if options["tf32"]:
            from tritorch.testing import products

            stack.enter_context(products.allowing_tf32())
        _answer(target, json_file, force, options, console)


def _answer(
    target: str | None,
    json_file: Path | None,
    force: bool,
    options: dict[str, Any],
    console: Console,
) -> None:
    diff = options["diff"]
    if diff and _are_files(diff):
        _diff_of_files(diff, console)
        return
    if options["why"]:
        _why(options, console)
        return
    if target is None:
        raise click.UsageError("Missing argument 'TARGET', or two reports after --diff.")
    if options["rank"]:
        _rank(target, options, console)
        return
    found = _inspected(target, options)
    rows = [one.to_json() for one in found]
    if not rows:
        named = [f"--{n} {options[n]}" for n in ("calls", "kernel") if options[n]]
        which = f" with {' '.join(named)}" if named else ""
        stop(f"{target} launches no kernel{which}", _UNABLE)
    if options["stages"]:
        _emit(found, options["stages"], options["out"], console)
    elif diff:
        _diff_of_configurations(rows, diff, console)
    else:
        _show(rows, options, console)
    if json_file is not None:
        _write(rows, target, json_file, force)


def _are_files(names: tuple[str, str]) -> bool:
    return all(Path(name).is_file() for name in names)


def _check(json_file: Path | None, force: bool, options: dict[str, Any]) -> None:
    """Before a minute of compiling."""
    if json_file is not None and str(json_file) != "-":
        check_folder(json_file.parent)
        if json_file.exists() and not force:
            raise click.UsageError(f"--json {json_file} exists: name a new file, or add --force")
    if options["out"] is not None:
        if not options["stages"]:
            raise click.UsageError("--out needs --emit")
        check_folder(options["out"])
    if json_file is not None:
        # what these answer is no report
        told = [f"--{name}" for name in ("why", "rank") if options[name]]
        told += ["--diff of two reports"] if options["diff"] and _are_files(options["diff"]) else []
        if told:
            raise click.UsageError(f"--json holds the report of a TARGET, not {' or '.join(told)}")
    if importlib.util.find_spec("triton") is None:
        stop("tritorch inspect needs Triton: pip install triton", _UNABLE)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        stop("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it", _UNABLE)
    from tritorch.testing import dry

    unknown = sorted(set(options["targets"]) - dry.TARGETS.keys())
    if unknown or not options["targets"]:
        received = unknown[0] if unknown else "none"
        raise click.UsageError(f"--arch: expects {', '.join(dry.TARGETS)}, received {received}")


def _inspected(target: str, options: dict[str, Any]) -> list[Any]:
    import torch

    from tritorch.bench import inspection
    from tritorch.testing import dry, requests
    from tritorch.testing.errors import RequestError

    found: list[inspection.Inspection] = []
    status = Console(stderr=True)
    try:
        dtypes = [requests.dtype_of(name, _KIND) for name in options["dtypes"]]
        with status.status(f"compiling {target}"):
            for arch in options["targets"]:
                if ":" in target:
                    one = inspection.user_function(target, options["inputs"], options["gradients"])
                    for dtype in dtypes or (one.dtypes or (torch.float16,))[:1]:
                        found += inspection.of_function(one, arch, dtype)
                    continue
                for spec in inspection.own_ops([] if target == "all" else [target]):
                    for dtype in dtypes or (torch.float16,):
                        found += inspection.of_op(
                            spec,
                            arch,
                            dtype,
                            calls=options["calls"],
                            tables=options["configs"] == "all",
                        )
    except RequestError as error:
        stop(f"{error}", _USAGE)
    except dry.CompileError as error:
        stop(f"{error}", _UNABLE)
    return [one for one in found if options["kernel"] in one.label.kernel]


def _why(options: dict[str, Any], console: Console) -> None:
    import torch

    from tritorch.bench import decisions
    from tritorch.testing import requests
    from tritorch.testing.errors import RequestError

    op, shape = options["why"]
    try:
        dtypes = [requests.dtype_of(name, _KIND) for name in options["dtypes"]] or [torch.bfloat16]
        for arch in options["targets"]:
            for dtype in dtypes:
                console.print(f"{arch}, {str(dtype).removeprefix('torch.')}", style="bold")
                for line in decisions.lines(decisions.decisions(op, shape, arch, dtype)):
                    console.print(line, soft_wrap=True)
    except RequestError as error:
        stop(f"{error}", _USAGE)


def _rank(target: str, options: dict[str, Any], console: Console) -> None:
    import torch

    from tritorch.bench import inspection, ranking
    from tritorch.testing import requests
    from tritorch.testing.errors import RequestError

    if ":" in target:
        raise click.UsageError("--rank is of the tables of tritorch's own ops")
    try:
        dtypes = [requests.dtype_of(name, _KIND) for name in options["dtypes"]] or [torch.float16]
        specs = inspection.own_ops([] if target == "all" else [target])
    except RequestError as error:
        stop(f"{error}", _USAGE)
    ranked = False
    for arch in options["targets"]:
        for dtype in dtypes:
            for spec in specs:
                for title, entries in ranking.of_op(spec, arch, dtype, options["calls"]):
                    ranked = True
                    console.print(f"{title}, {arch}, {dtype}, all passes", style="bold")
                    for one in entries:
                        mark = "  chosen" if one.chosen else ""
                        console.print(f"{one.us:10.1f} us  {inspection.shown(one.entry)}{mark}")
    if not ranked:
        stop(f"--rank: {target} has no table of configurations with such a call", _USAGE)
    _tell_estimate(options["targets"], console)


def _show(rows: list[dict[str, Any]], options: dict[str, Any], console: Console) -> None:
    from tritorch.bench import inspection_tables

    for arch in options["targets"]:
        mine = [row for row in rows if row["target"] == arch]
        if mine:
            console.print(inspection_tables.table(mine, arch))
    if options["details"]:
        for row in rows:
            console.print(inspection_tables.details(row))
            for note in inspection_tables.notes(row):
                console.print(note)
    for row in rows:
        for problem in row["problems"]:
            console.print(f"problem: {problem}", style="bold red")
    _tell_estimate(options["targets"], console)


def _tell_estimate(targets: Iterable[str], console: Console) -> None:
    """What the estimate is, and how far off it was where it was held against a GPU."""
    from tritorch.bench import calibration

    console.print(_ESTIMATED)
    for target in targets:
        if said := calibration.known(target):
            console.print(f"how far off it was for {target}: {said}", markup=False)


def _diff_of_files(files: tuple[str, str], console: Console) -> None:
    from tritorch.bench import inspection_tables

    reports = []
    for file in files:
        try:
            report = json.loads(Path(file).read_text(encoding="utf-8"))
            if report["kind"] != _KIND:
                raise ValueError(f"its kind is {report['kind']}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            stop(f"--diff: {file} is no report of tritorch inspect --json: {error}", _USAGE)
        reports.append(report)
    old, new = reports
    for name in ("commit", "triton", "torch"):
        then, now = (report["environment"].get(name) for report in reports)
        if then != now:
            console.print(f"{name}: {then} -> {now}")
    for part in inspection_tables.difference(old["rows"], new["rows"]):
        console.print(part)


def _diff_of_configurations(
    rows: list[dict[str, Any]], diff: tuple[str, str], console: Console
) -> None:
    from tritorch.bench import inspection_tables

    sides = [inspection_tables.selected(rows, one) for one in diff]
    for one, side in zip(diff, sides, strict=True):
        if not side:
            stop(
                f"--diff: no kernel has the configuration {one!r}: name a number or settings of "
                "the table, and --configs all for every shipped configuration",
                _USAGE,
            )
    without = inspection_tables.OF_CONFIGURATION
    for one, side in zip(diff, sides, strict=True):
        console.print(f"{one}: {inspection_tables.settings(side[0])}")
    for part in inspection_tables.difference(sides[0], sides[1], without):
        console.print(part)


def _emit(found: list[Any], stages: tuple[str, ...], folder: Path | None, console: Console) -> None:
    from tritorch.bench import inspection
    from tritorch.testing.errors import RequestError

    for number, one in enumerate(found):
        for stage in stages:
            try:
                text = inspection.assembly(one, stage)
            except RequestError as error:
                stop(f"{error}", _USAGE)
            if folder is None:
                click.echo(f"// {number}: {one.label.kernel} {one.label.target} {stage}", err=True)
                click.echo(text)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{number}-{one.label.kernel}-{one.label.target}")
            (folder / f"{name}.{stage}").write_text(text, encoding="utf-8")
    if folder is not None:
        console.print(f"{len(found) * len(stages)} files in {folder}")


def _write(rows: list[dict[str, Any]], target: str, path: Path, force: bool) -> None:
    from tritorch.bench.environment import SCHEMA, environment, write_result

    if str(path) == "-":
        whole = {"schema": SCHEMA, "kind": _KIND, "environment": environment(), "rows": rows}
        click.echo(json.dumps({**whole, "inspected": target}, indent=1))
        return
    try:
        write_result(path, _KIND, rows, overwrite=force, inspected=target)
    except OSError as error:
        stop(f"the report could not be written: {error}", _UNABLE)
