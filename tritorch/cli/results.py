"""`tritorch bench show` and `compare`, and the files that results are written to."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from tritorch.cli.options import check_folder, percent, stop

if TYPE_CHECKING:
    from tritorch.bench import compare as comparing
    from tritorch.bench.intervals import Interval
    from tritorch.bench.store import Store

SLOWER, USAGE, UNABLE = 1, 2, 3


def output(name: str, what: str) -> Callable[[Any], Any]:
    """An option that names a file."""
    return click.option(
        f"--{name}",
        type=click.Path(dir_okay=False, allow_dash=name == "json", path_type=Path),
        metavar="FILE",
        help=what,
    )


def write(store: Store, files: Mapping[str, Path | None], console: Console) -> None:
    """Writes a result to the files that are named; the JSON file has been there all the time."""
    from tritorch.bench import plots, reports

    result = store.content()
    makers: dict[str, Callable[[Any], str]] = {
        "csv": reports.csv_text,
        "md": reports.markdown,
        "html": reports.page,
    }
    try:
        if str(files["json"]) == "-":
            click.echo(json.dumps(result, indent=1))
        elif files["json"] is not None:
            store.write()
            console.print(f"numbers: {files['json']}", markup=False)
        for name, make in makers.items():
            path = files[name]
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(make(result), encoding="utf-8")
                console.print(f"{name}: {path}", markup=False)
        if files["png"] is not None:
            files["png"].parent.mkdir(parents=True, exist_ok=True)
            plots.png(result["rows"], files["png"], result.get("calibration", ()))
            console.print(f"png: {files['png']}", markup=False)
    except ValueError as error:
        stop(str(error), UNABLE)
    except OSError as error:
        stop(f"the result could not be written: {error}", UNABLE)


def check_free(files: Mapping[str, Path | None], force: bool, result: Path | None = None) -> None:
    """Before minutes of work whose result could not be written.

    `result`: what is read, and not to be replaced by what is made of it.
    """
    taken = {} if result is None else {result.resolve(): "the result itself"}
    for name, path in files.items():
        if path is None or str(path) == "-":
            continue
        if (other := taken.setdefault(path.resolve(), f"--{name}")) != f"--{name}":
            raise click.UsageError(f"--{name} {path} is {other}: name another file")
        check_folder(path.parent)
        if path.exists() and not force:
            raise click.UsageError(f"--{name} {path} exists: name a new file, or add --force")


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@output("csv", "One line for each number.")
@output("md", "A table.")
@output("png", "The pictures; needs matplotlib.")
@output("html", "A page with pictures that needs nothing else.")
@click.option("--force", is_flag=True, help="Let these files replace what is there.")
def show(result: Path, force: bool, **files: Path | None) -> None:
    """Make tables and pictures of a result: a file of --json or of `make gpu`."""
    from tritorch.bench import compare as comparing
    from tritorch.bench.store import Store

    check_free(files, force, result)
    try:
        found = comparing.read(result)
    except comparing.NoResult as error:
        stop(str(error), USAGE)
    if not any(files.values()):
        raise click.UsageError("say what to make: --html FILE, --md FILE, --csv FILE, --png FILE")
    write(Store.of(found), {"json": None, **files}, Console(highlight=False, soft_wrap=True))


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--threshold",
    callback=percent,
    default="3%",
    show_default=True,
    help="A difference that counts.",
)
@click.option(
    "--fail-on-slower", is_flag=True, help="Exit with 1 if one of ours is SLOWER or WRONG."
)
def compare(old: Path, new: Path, threshold: float, fail_on_slower: bool) -> None:
    """Say of every row of two results whether it is FASTER, SLOWER, the SAME, or UNSURE.

    OLD and NEW are files of `tritorch bench --json` or of `make gpu`.  FASTER and SLOWER: the
    medians differ surely, by more than the threshold; SAME: surely by less; WRONG: not verified in
    one of them; UNSURE also: taken while the GPU was throttled, had another clock, or waited for
    the host, or without samples to tell by.  Of all rows together a false alarm has a chance of
    5 %.  Results of two GPUs are compared, and --fail-on-slower is refused.

    The counts, the geometric mean and the exit status are of our kernels, or yours.  torch's calls
    and the ceilings are the control: what has moved there is the machine.
    """
    from tritorch.bench import compare as comparing

    try:
        before, after = (comparing.read(path) for path in (old, new))
    except comparing.NoResult as error:
        stop(str(error), USAGE)
    then, now = (one["environment"].get("gpu") for one in (before, after))
    if fail_on_slower and then != now:
        stop(f"--fail-on-slower: {old} is of {then or 'a CPU'}, {new} of {now or 'a CPU'}", USAGE)
    report = comparing.compare(before, after, threshold)
    _show(report, Console(highlight=False, soft_wrap=True))
    if fail_on_slower and any(one.verdict in ("SLOWER", "WRONG") for one in report.ours):
        sys.exit(SLOWER)


def _show(report: comparing.Report, console: Console) -> None:
    from tritorch.bench.reports import number

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False)

    for name, (then, now) in report.environment.items():
        say(f"{name}: {then} -> {now}", "yellow")
    styles = {"SLOWER": "bold red", "FASTER": "bold green", "WRONG": "bold red", "UNSURE": "yellow"}
    for one in report.rows:
        row = one.row
        call = f"{row['op']} {row.get('name', '')} {row['shape']} {row['pass']}"
        change = one.why
        if one.ratio is not None:
            value, low, high = (100 * (ratio - 1) for ratio in one.ratio)
            change = f"{value:+.1f} % [{low:+.1f}, {high:+.1f}] {one.why}".rstrip()
        old_us, new_us = ("-" if us is None else number(us) for us in (one.old_us, one.new_us))
        times = f"{old_us} -> {new_us} us"
        say(
            f"{one.verdict:<7} {call:<60} {row['implementation']:<13} {times:<24} {change}",
            styles.get(one.verdict),
        )
    for where, names in (("old", report.only_old), ("new", report.only_new)):
        for name in names:
            say(f"only in the {where} result: {name}", "yellow")
    verdicts = ("FASTER", "SLOWER", "SAME", "UNSURE", "WRONG")
    seen = Counter[str](one.verdict for one in report.ours)
    counts = ", ".join(f"{seen[verdict]} {verdict}" for verdict in verdicts)
    mean = "there is nothing to compare" if report.geomean is None else _mean(report.geomean)
    if report.control is not None:
        say(f"torch, which is the control: {_mean(report.control)}")
    say(f"{counts}; {mean}", "bold")


def _mean(ratio: Interval) -> str:
    value, low, high = (100 * (end - 1) for end in ratio)
    return f"geometric mean {value:+.1f} % [{low:+.1f}, {high:+.1f}]"
