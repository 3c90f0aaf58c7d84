"""`tritorch bench`: times that can be believed, of our kernels and of the user's."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tritorch.cli import results
from tritorch.cli.options import finite, percent, stop, words
from tritorch.cli.results import (
    SLOWER,
    UNABLE,
    USAGE,
    check_free,
    output,
    write,
)

if TYPE_CHECKING:
    from tritorch.bench.store import Store

_STOPPED = 130
_OUTPUTS = ("json", "csv", "md", "png", "html")
_LINE = "{:<22} {:<26} {:<13} {:<14} {:>11} {:>8} {:>9} {:>9} {:>9}  {}"


class _Default(click.Group):
    """A group whose `run` is what is meant where no other command is named."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(context, args)


@click.group(cls=_Default)
def bench() -> None:
    """Measure how fast kernels are, or compare two results."""


bench.add_command(results.compare)
bench.add_command(results.show)


@bench.command("run")
@click.argument("targets", nargs=-1, metavar="[OP | MODULE:FUNCTION]...")
@click.option(
    "--pass",
    "passes",
    callback=words,
    default="",
    metavar="A,B",
    help="forward, backward, both.  [all that there are]",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="float32, float16, ...")
@click.option(
    "--vs",
    "beside",
    callback=words,
    default="peers",
    show_default=True,
    metavar="A,B",
    help="Whom to show besides torch: compile (torch.compile), peers (all that are installed of "
    "flag_gems, attorch, liger_kernel) or some of these, and functions of yours, as "
    "MODULE:FUNCTION, that take an op's arguments; '' for nobody.",
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
    callback=finite,
    default=1.0,
    show_default=True,
    help="That one pass may take at most.",
)
@click.option(
    "--precision",
    callback=percent,
    default="1%",
    show_default=True,
    help="Half of the 95 % interval of a median that is precise enough.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@output("json", "Every number and every sample; - is stdout, and the text goes to stderr.")
@output("csv", "One line for each number.")
@output("md", "A table.")
@output("png", "The pictures; needs matplotlib.")
@output("html", "A page with pictures that needs nothing else.")
@click.option("--force", is_flag=True, help="Let these files replace what is there.")
def run(targets: tuple[str, ...], **options: Any) -> None:
    """Time ops of tritorch's, or functions of yours, beside torch.

    Each call has other inputs, and on a GPU a cold cache; torch takes turns with it in the same
    process.  Results are verified before and after; what is wrong, or caught at a trick, has no
    speed-up.  A function of yours is described as for `tritorch check`: a reference in plain
    PyTorch and what the arguments look like.

    `tritorch bench compare OLD NEW` compares two files of --json.

    Exit status: 0, 1 where a result was wrong (a peer's excepted), 2 a wrong call, 3 something is
    missing or the GPU has failed, 130 interrupted; what was measured is written in any case.
    """
    files = {name: options.pop(name) for name in _OUTPUTS}
    check_free(files, options.pop("force"))
    if files["png"] is not None and importlib.util.find_spec("matplotlib") is None:
        stop("--png needs matplotlib: pip install matplotlib", UNABLE)
    import torch

    from tritorch.bench import fatal, session, timing
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
            _beside(options["beside"], device),
            small,
            options["reference"],
            options["inputs"],
            session.sizes_of(options["sizes"]),
        )
        found = session.plan(wanted)
    except RequestError as error:
        stop(str(error), USAGE)
    if not found:
        stop("nothing to measure: none of these has such a pass", USAGE)
    console = Console(stderr=str(files["json"]) == "-", highlight=False, soft_wrap=True)
    console.print(_head(device, small, len(found)), markup=False)
    plan = timing.Plan(options["seconds"], options["precision"])
    stage = session.bench_on(torch.device(device), plan, options["seed"], extras=True)
    path = files["json"] if files["json"] is not None and str(files["json"]) != "-" else None
    store = Store(path)
    store.go_on(environment(), fresh=True)
    store.more = {"command": _command(targets, options, device, small)}
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
        status = UNABLE
    except RuntimeError as error:
        if not fatal.is_fatal(error):
            raise
        text = f"not measured: the rest: {type(error).__name__}: {error}"
        console.print(text, style="bold red", markup=False)
        store.more["problems"] = [text]
        status = UNABLE
    write(store, files, console)
    sys.exit(status)


def _passes(names: tuple[str, ...]) -> tuple[str, ...]:
    from tritorch.bench.cases import PASSES

    for name in names:
        if name not in PASSES:
            raise click.UsageError(f"--pass: expects {', '.join(PASSES)}, received {name}")
    return names


def _beside(names: tuple[str, ...], device: str) -> tuple[str, ...]:
    from tritorch.bench import peers
    from tritorch.testing import loading
    from tritorch.testing.errors import RequestError

    found: list[str] = []
    for name in names:
        if name == "peers":
            # none of them runs without a GPU
            found += peers.installed() if device == "cuda" else ()
        elif ":" in name:
            if not callable(loading.find(name).value):
                raise RequestError(f"--vs: {name} is no function")
            found.append(name)
        elif name == "compile":
            found.append(name)
        elif name not in peers.NAMES:
            known = ", ".join(("compile", "peers", *peers.NAMES))
            raise click.UsageError(f"--vs: expects {known}, received {name}")
        elif name not in peers.installed():
            stop(f"--vs {name}: {name} is not installed here", UNABLE)
        elif device == "cpu":
            stop(f"--vs {name}: it runs on a GPU alone", UNABLE)
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


def _device(name: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        stop("--device cuda: torch finds no GPU", UNABLE)
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


def _command(targets: tuple[str, ...], options: Mapping[str, Any], device: str, small: bool) -> str:
    """What measures the same again, on another machine too."""
    words = ["tritorch bench", *targets]
    for name in ("dtype", "seconds", "precision", "seed"):
        words.append(f"--{name} {options[name]}")
    for name in ("reference", "inputs", "sizes"):
        if options[name]:
            words.append(f"--{name} '{options[name]}'")
    if options["beside"] != ("peers",):
        words.append(f"--vs '{','.join(options['beside'])}'")
    if options["passes"]:
        words.append(f"--pass {','.join(options['passes'])}")
    words += [f"--device {device}", "--small" if small else "--real"]
    return " ".join(words)


def _keeper(store: Store, console: Console) -> Callable[[dict[str, Any]], None]:
    """Keeps rows, and shows them."""
    from tritorch.bench.reports import graph, number

    head = ("op", "call", "pass", "by", "time, us", "x torch", "roofline", "graph, us", "host, us")
    console.print(_LINE.format(*head, "").rstrip(), style="bold", markup=False)

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
            graph(row) or "-",
            "-" if row.get("host_us") is None else number(row["host_us"]),
            _said(row),
        )
        colour = "bold red" if wrong else None
        console.print(_LINE.format(*cells).rstrip(), style=colour, markup=False)

    return keep


def _said(row: Mapping[str, Any]) -> str:
    if not row["verified"]:
        return f"FAILED {row.get('failure', '')}"
    said = ["waited for the host"] if row.get("host_bound") else []
    if row.get("throttled"):
        said.append(f"GPU throttled: {', '.join(row['throttled'])}")
    return "; ".join(said)


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
    from tritorch.bench import peers

    failed = [row for row in store.rows if not row["verified"]]
    if failed:
        text = f"{len(failed)} of {len(store.rows)} rows failed verification"
        console.print(text, style="bold red")
    # what is wrong with other people's kernels is shown, and is not ours to mend
    ours = [row for row in failed if row["implementation"] not in peers.NAMES]
    return SLOWER if ours or problems else 0
