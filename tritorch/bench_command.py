"""`tritorch bench`: times that can be believed, of our kernels and of the user's."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tritorch.check_command import check_folder

if TYPE_CHECKING:
    from tritorch.bench import compare as comparing
    from tritorch.bench.store import Store

_SLOWER, _USAGE, _UNABLE, _STOPPED = 1, 2, 3, 130
_OUTPUTS = ("json", "csv", "md", "png", "html")
_LINE = "{:<22} {:<26} {:<13} {:<14} {:>11} {:>8} {:>9}  {}"


class _Default(click.Group):
    """A group whose `run` is what is meant where no other command is named."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(context, args)


@click.group(cls=_Default)
def bench() -> None:
    """Measure how fast kernels are, or compare two results."""


def _words(context: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


def _percent(context: click.Context, option: click.Parameter, value: str) -> float:
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise click.BadParameter(f"{value!r} is not a share such as 3% or 0.03", context, option)
    return number


def _output(name: str, what: str) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}",
        type=click.Path(dir_okay=False, allow_dash=name == "json", path_type=Path),
        metavar="FILE",
        help=what,
    )


@bench.command("run")
@click.argument("targets", nargs=-1, metavar="[OP | MODULE:FUNCTION]...")
@click.option(
    "--pass",
    "passes",
    callback=_words,
    default="",
    metavar="A,B",
    help="forward, backward, both.  [all that there are]",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="float32, float16, ...")
@click.option(
    "--vs",
    "beside",
    callback=_words,
    default="peers",
    show_default=True,
    metavar="A,B",
    help="Whom to show besides torch: compile (torch.compile), peers (all that are installed of "
    "flag_gems, attorch, liger_kernel) or some of these; '' for nobody.",
)
@click.option("--reference", default="", metavar="NAME", help="As `tritorch check` takes it.")
@click.option("--inputs", default="", metavar="TEXT", help="As `tritorch check` takes them.")
@click.option(
    "--sizes", default="", metavar="TEXT", help="Numbers for its letters: 'M=8,K=64; M=64,K=64'."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: cuda where there is a GPU.",
)
@click.option(
    "--small/--real",
    default=None,
    help="The small shapes of the tests, or real ones.  [small without a GPU]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.001),
    default=1.0,
    show_default=True,
    help="That one pass may take at most.",
)
@click.option(
    "--precision",
    callback=_percent,
    default="1%",
    show_default=True,
    help="Half of the 95 % interval of a median that is precise enough.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@_output("json", "Every number and every sample; - is stdout, and the text goes to stderr.")
@_output("csv", "One line for each number.")
@_output("md", "A table.")
@_output("png", "The pictures; needs matplotlib.")
@_output("html", "A page with pictures that needs nothing else.")
@click.option("--force", is_flag=True, help="Let these files replace what is there.")
def run(targets: tuple[str, ...], **options: Any) -> None:
    """Time ops of tritorch's, or functions of yours, beside torch.

    Each call has other inputs and a cold cache, and torch takes turns with it in the same process.
    Results are verified before and after; what is wrong, or caught at a trick, has no speed-up.  A
    function of yours is described as for `tritorch check`: a reference in plain PyTorch and what
    the arguments look like.

    `tritorch bench compare OLD NEW` compares two files of --json.

    Exit status: 0, 1 where a result was wrong, 2 a wrong call, 3 something is missing, 130
    interrupted; what was measured is written in any case.
    """
    files = {name: options.pop(name) for name in _OUTPUTS}
    _check_free(files, options.pop("force"))
    if files["png"] is not None and importlib.util.find_spec("matplotlib") is None:
        _stop("--png needs matplotlib: pip install matplotlib", _UNABLE)
    import torch

    from tritorch.bench import session, timing
    from tritorch.bench.environment import environment
    from tritorch.bench.store import Store
    from tritorch.testing.errors import RequestError
    from tritorch.testing.requests import dtype_of

    device = _device(options["device"])
    small = device == "cpu" if options["small"] is None else options["small"]
    try:
        wanted = session.Wanted(
            targets,
            dtype_of(options["dtype"]),
            _passes(options["passes"]),
            _beside(options["beside"]),
            small,
            options["reference"],
            options["inputs"],
            session.sizes_of(options["sizes"]),
        )
        found = session.plan(wanted)
    except RequestError as error:
        _stop(str(error), _USAGE)
    if not found:
        _stop("nothing to measure: none of these has such a pass", _USAGE)
    console = Console(stderr=str(files["json"]) == "-", highlight=False, soft_wrap=True)
    console.print(_head(device, small, len(found)), markup=False)
    plan = timing.Plan(options["seconds"], options["precision"])
    stage = session.bench_on(torch.device(device), plan, options["seed"], extras=True)
    path = files["json"] if files["json"] is not None and str(files["json"]) != "-" else None
    store = Store(path)
    store.go_on(environment(), fresh=True)
    store.more = {"command": _command(targets, options)}
    status = 0
    try:
        with _progress(console) as on_case:
            problems = session.measure(found, wanted, stage, _keeper(store, console), on_case)
        store.more["problems"] = problems
        status = _tell(store, problems, console)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept", style="bold red")
        status = _STOPPED
    except OSError as error:
        console.print(f"the result could not be written: {error}", style="bold red", markup=False)
        status = _UNABLE
    _write(store, files, console)
    sys.exit(status)


def _passes(names: tuple[str, ...]) -> tuple[str, ...]:
    from tritorch.bench.cases import PASSES

    for name in names:
        if name not in PASSES:
            raise click.UsageError(f"--pass: expects {', '.join(PASSES)}, received {name}")
    return names


def _beside(names: tuple[str, ...]) -> tuple[str, ...]:
    from tritorch.bench import peers

    found: list[str] = []
    for name in names:
        if name == "peers":
            found += peers.installed()
        elif name == "compile":
            found.append(name)
        elif name not in peers.NAMES:
            known = ", ".join(("compile", "peers", *peers.NAMES))
            raise click.UsageError(f"--vs: expects {known}, received {name}")
        elif name not in peers.installed():
            _stop(f"--vs {name}: {name} is not installed here", _UNABLE)
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


def _device(name: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        _stop("--device cuda: torch finds no GPU", _UNABLE)
    return "cuda" if there and name != "cpu" else "cpu"


def _head(device: str, small: bool, count: int) -> str:
    import torch

    what = "small shapes" if small else "real shapes"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}: {count} calls, {what}"
    return (
        f"no GPU: wall time of the reference path on the CPU, {count} calls, {what}; this says "
        "nothing about the kernels"
    )


def _command(targets: tuple[str, ...], options: Mapping[str, Any]) -> str:
    words = ["tritorch bench", *targets]
    for name in ("dtype", "seconds", "precision", "seed"):
        words.append(f"--{name} {options[name]}")
    for name in ("reference", "inputs", "sizes"):
        if options[name]:
            words.append(f"--{name} '{options[name]}'")
    if options["passes"]:
        words.append(f"--pass {','.join(options['passes'])}")
    return " ".join(words)


def _keeper(store: Store, console: Console) -> Callable[[dict[str, Any]], None]:
    """Keeps rows, and shows them."""
    from tritorch.bench.reports import number

    head = ("op", "call", "pass", "by", "time, us", "x torch", "roofline", "")
    console.print(_LINE.format(*head).rstrip(), style="bold", markup=False)

    def keep(row: dict[str, Any]) -> None:
        store.add(row)
        us, speedup, roofline = (row.get(n) for n in ("median_us", "speedup", "roofline"))
        wrong = not row["verified"]
        cells = (
            row["op"],
            (row["name"] or str(row["shape"]))[:26],
            row["pass"],
            row["implementation"],
            "-" if us is None else number(us),
            "-" if speedup is None else f"{speedup:.2f}",
            "-" if roofline is None else f"{roofline:.0%}",
            f"FAILED {row.get('failure', '')}" if wrong else "",
        )
        colour = "bold red" if wrong else None
        console.print(_LINE.format(*cells).rstrip(), style=colour, markup=False)

    return keep


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, number, count: bar.update(
            task, completed=number, total=count, description=what
        )


def _tell(store: Store, problems: list[str], console: Console) -> int:
    """Geometric means, and what went wrong; the exit status."""
    from tritorch.bench.session import geometric_means

    console.print()
    for (name, which), (mean, count) in geometric_means(store.rows).items():
        text = f"{name}, {which}: {mean:.3f} times torch's speed, geometric mean of {count} rows"
        console.print(text, markup=False)
    for problem in problems:
        console.print(f"not measured: {problem}", style="bold red", markup=False)
    wrong = sum(not row["verified"] for row in store.rows)
    if wrong:
        console.print(f"{wrong} of {len(store.rows)} rows failed verification", style="bold red")
    return _SLOWER if wrong or problems else 0


def _write(store: Store, files: Mapping[str, Path | None], console: Console) -> None:
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
            plots.png(result["rows"], files["png"])
            console.print(f"png: {files['png']}", markup=False)
    except ValueError as error:
        _stop(str(error), _UNABLE)
    except OSError as error:
        _stop(f"the result could not be written: {error}", _UNABLE)


def _check_free(files: Mapping[str, Path | None], force: bool) -> None:
    """Before minutes of work whose result could not be written."""
    for name, path in files.items():
        if path is None or str(path) == "-":
            continue
        check_folder(path.parent)
        if path.exists() and not force:
            raise click.UsageError(f"--{name} {path} exists: name a new file, or add --force")


def _stop(message: str, status: int) -> Any:
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)


@bench.command()
@click.argument("result", type=click.Path(path_type=Path))
@_output("csv", "One line for each number.")
@_output("md", "A table.")
@_output("png", "The pictures; needs matplotlib.")
@_output("html", "A page with pictures that needs nothing else.")
@click.option("--force", is_flag=True, help="Let these files replace what is there.")
def show(result: Path, force: bool, **files: Path | None) -> None:
    """Make tables and pictures of a result: a file of --json or of `make gpu`."""
    from tritorch.bench import compare as comparing
    from tritorch.bench.store import Store

    _check_free(files, force)
    try:
        found = comparing.read(result)
    except comparing.NoResult as error:
        _stop(str(error), _USAGE)
    if not any(files.values()):
        raise click.UsageError("say what to make: --html FILE, --md FILE, --csv FILE, --png FILE")
    _write(Store.of(found), {"json": None, **files}, Console(highlight=False, soft_wrap=True))


@bench.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--threshold",
    callback=_percent,
    default="3%",
    show_default=True,
    help="A difference that counts.",
)
@click.option("--fail-on-slower", is_flag=True, help="Exit with 1 if a row is slower or wrong.")
def compare(old: Path, new: Path, threshold: float, fail_on_slower: bool) -> None:
    """Say of every row of two results whether it is FASTER, SLOWER, the SAME, or UNSURE.

    OLD and NEW are files of `tritorch bench --json` or of `make gpu`.  FASTER and SLOWER: the
    medians differ surely, by more than the threshold; SAME: surely by less; WRONG: not verified in
    one of them.  Of all rows together a false alarm has a chance of 5 %.
    """
    from tritorch.bench import compare as comparing

    try:
        before, after = (comparing.read(path) for path in (old, new))
    except comparing.NoResult as error:
        _stop(str(error), _USAGE)
    report = comparing.compare(before, after, threshold)
    _show(report, Console(highlight=False, soft_wrap=True))
    if fail_on_slower and report.count("SLOWER") + report.count("WRONG"):
        sys.exit(_SLOWER)


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
            change = f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"
        times = f"{number(one.old_us or 0)} -> {number(one.new_us or 0)} us"
        say(
            f"{one.verdict:<7} {call:<60} {row['implementation']:<13} {times:<24} {change}",
            styles.get(one.verdict),
        )
    for where, names in (("old", report.only_old), ("new", report.only_new)):
        for name in names:
            say(f"only in the {where} result: {name}", "yellow")
    counts = ", ".join(
        f"{report.count(verdict)} {verdict}"
        for verdict in ("FASTER", "SLOWER", "SAME", "UNSURE", "WRONG")
    )
    if report.geomean is None:
        say(f"{counts}; there is nothing to compare")
    else:
        value, low, high = (100 * (ratio - 1) for ratio in report.geomean)
        say(f"{counts}; geometric mean {value:+.1f} % [{low:+.1f}, {high:+.1f}]", "bold")
