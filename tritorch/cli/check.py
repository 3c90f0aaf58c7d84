"""`tritorch check`: what is wrong with a kernel, its line, its lane and the reason."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from tritorch.cli.options import check_folder, finite, stop, words

if TYPE_CHECKING:
    from tritorch.testing.report import Report

_FOUND, _USAGE, _UNABLE = 1, 2, 3


@click.command()
@click.argument("target")
@click.option(
    "--reference",
    metavar="NAME",
    help="The same in plain PyTorch: module:function or file.py:function.  "
    "[a function called reference beside TARGET]",
)
@click.option(
    "--inputs",
    metavar="TEXT",
    help="What the arguments look like, 'x[M, K] w[K, N] index[M]:int64<K eps=1e-5', or the "
    "name of a function that makes samples.  [INPUTS beside TARGET, else a guess]",
)
@click.option(
    "--level",
    type=click.Choice(["quick", "full", "soak"]),
    default="quick",
    show_default=True,
    help="Seconds, minutes, a night.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of every number."
)
@click.option("--case", default="", metavar="ID", help="Run this one case alone.")
@click.option("--dtypes", callback=words, metavar="A,B", help="float32, float16, bfloat16, ...")
@click.option("--gradients", callback=words, metavar="A,B", help="Arguments with a gradient.")
@click.option("--mutates", callback=words, metavar="A,B", help="Arguments that it may write.")
@click.option(
    "--non-finite",
    callback=words,
    metavar="A,B",
    help="Arguments in which NaN and infinities are tried; '' for none.  [all]",
)
@click.option(
    "--contract",
    type=click.Choice(["ieee", "tf32"]),
    default="ieee",
    show_default=True,
    help="tf32: float32 products may be TF32's.",
)
@click.option(
    "--arch",
    "targets",
    callback=words,
    default="sm_80,sm_90",
    show_default=True,
    metavar="A,B",
    help="GPUs to compile for: sm_80, sm_90, sm_100, gfx942; '' for none.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cpu: interpreted, every access watched.  cuda: on the GPU.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    callback=finite,
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="What one case may take before it counts as hung.",
)
@click.option(
    "--repro",
    "reproductions",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write a script for each finding there, with the smallest input that shows it.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Write the report there; - is stdout, and the text goes to stderr.",
)
@click.option("--force", is_flag=True, help="Let --json replace what is there.")
def check(target: str, json_file: Path | None, force: bool, **options: Any) -> None:
    """Find what is wrong with a Triton kernel; no GPU needed.

    TARGET is a Python function that takes tensors and launches kernels: package.module:function or
    path/to/file.py:function.  Nothing of it has to change.  Or it is an op of tritorch's own.

    The function is called with many inputs (sizes around its tiles, strides, dtypes, NaN, empty
    tensors) and compared, gradients too, with the reference in float64, while Triton's interpreter
    watches every access: out of bounds, never written, racing, masked off, beyond 32 bits.  Then
    every autotune configuration is compiled for GPUs and held to their limits.

    Exit status: 0 nothing found, 1 findings, 2 a wrong call, 3 something is missing (Triton, a GPU)
    or the check itself failed, wholly or in some cases.
    """
    if json_file is not None and str(json_file) != "-":
        check_folder(json_file.parent)
        if json_file.exists() and not force:
            raise click.UsageError(f"--json {json_file} exists: name a new file, or add --force")
    if options["reproductions"] is not None:
        check_folder(options["reproductions"])
    for name in ("reference", "inputs"):
        if options[name] is not None and not options[name].strip():
            raise click.UsageError(f"--{name} is empty: leave it out to have it found")
    if importlib.util.find_spec("triton") is None:
        stop("tritorch check needs Triton: pip install triton", _UNABLE)
    from tritorch.testing import dry
    from tritorch.testing.checking import check as run
    from tritorch.testing.errors import RequestError
    from tritorch.testing.supervise import ChildError

    unknown = sorted(set(options["targets"]) - dry.TARGETS.keys())
    if unknown:
        raise click.UsageError(f"--arch: expects {', '.join(dry.TARGETS)}, received {unknown[0]}")
    if options["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            stop("--device cuda: torch finds no GPU", _UNABLE)
    from tritorch.testing.requests import dtype_of

    console = Console(stderr=str(json_file) == "-", highlight=False, soft_wrap=True, emoji=False)
    try:
        if options["dtypes"] is not None:
            options["dtypes"] = [dtype_of(name) for name in options["dtypes"]]
        with _progress(console) as on_event:
            samples = options.pop("inputs")
            report = run(target, samples=samples, on_event=on_event, **options)
    except RequestError as error:
        stop(f"{error}", _USAGE)
    except ChildError as error:
        stop(f"the check itself failed: {error}", _UNABLE)
    except Exception:
        stop(f"the check itself failed: {traceback.format_exc()}", _UNABLE)
    _show(report, console)
    if json_file is not None:
        _write(report, json_file, force)
    if report.mistakes:
        sys.exit(_UNABLE)
    sys.exit(0 if report.ok else _FOUND)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is being tried, on a terminal; gives what hears of it."""
    with console.status("starting") if console.is_terminal else contextlib.nullcontext() as status:

        def on_event(event: dict[str, Any]) -> None:
            if status is not None and event["event"] == "doing":
                status.update(Text(f"{event['property']}: {event['case']}"))

        yield on_event


def _show(report: Report, console: Console) -> None:
    """The report as text; no markup, since a name in brackets is a name."""
    for line in report.lines():
        style = None
        if "  FAIL  " in line or re.match(r"\d+\. ", line):
            style = "bold red"
        elif line.startswith("nothing found"):
            style = "bold green"
        console.print(line, style=style, markup=False)


def _write(report: Report, path: Path, force: bool) -> None:
    from tritorch.bench.environment import environment, write_result

    content = report.to_json()
    sections = content.pop("sections")
    if str(path) == "-":
        whole = {"kind": "check", "environment": environment(), "rows": sections, **content}
        click.echo(json.dumps(whole, indent=1))
    else:
        write_result(path, "check", sections, overwrite=force, **content)
