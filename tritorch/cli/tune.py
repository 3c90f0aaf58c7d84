"""`tritorch tune`: measures configurations on this GPU, for launches to take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tritorch.cli.options import finite

if TYPE_CHECKING:
    import torch

    from tritorch.bench.timing import Plan
    from tritorch.bench.tune import Answer
    from tritorch.bench.tuned_table import TunedTable

_UNABLE, _USAGE, _STOPPED = 3, 2, 130


@click.command()
@click.argument("ops", nargs=-1)
@click.option(
    "--model",
    metavar="MODULE:FACTORY",
    help="Tune what this runs: the factory returns (model, *inputs), or a callable.",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Of the tensors of OPS.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    default=1.0,
    show_default=True,
    help="At most for each question.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The table.  [that of this GPU]")
def tune(
    ops: tuple[str, ...], model: str | None, dtype: str, seconds: float, out: Path | None
) -> None:
    """Find the fastest configurations for OPS, or for what a model runs, on this GPU.

    Every configuration that a kernel's table offers, or that was the best of other sizes, is timed
    beside the kernel's own choice and checked against it, in all calls that ask the same.  The
    fastest is kept in a table that later launches read.  An interrupted run keeps what it has, and
    the next one goes on there; a table of another GPU is left as it is.

    Exit status: 0, 2 for a wrong request, 3 without a GPU or where the table cannot be written, 130
    interrupted.
    """
    from tritorch import tuned
    from tritorch.bench import timing
    from tritorch.bench.tuned_table import TunedTable

    if not ops and model is None:
        raise click.UsageError("name ops, or a program by --model")
    console = Console(stderr=True, highlight=False, emoji=False)
    device = _device()
    if device is None:
        console.print("tune: there is no GPU to measure on")
        sys.exit(_UNABLE)
    if reason := tuned.several_kinds():
        console.print(f"tune: {reason}", style="yellow", markup=False)
    file = out if out is not None else tuned.path()
    plan = timing.Plan(seconds=seconds, precision=0.005)
    answers: list[Answer] = []
    status = 0
    try:
        table = TunedTable(file)
        _tuned(_programs(ops, model, dtype, device), table, device, plan, answers, console)
    except ValueError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(_USAGE)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept, and the next run goes on there")
        status = _STOPPED
    except OSError as error:
        console.print(f"the table could not be written: {error}", style="red", markup=False)
        status = _UNABLE
    Console(highlight=False, emoji=False).print(_table(answers))
    console.print(f"table: {file}")
    sys.exit(status)


def _device() -> torch.device | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _programs(
    ops: tuple[str, ...], model: str | None, dtype: str, device: torch.device
) -> Iterator[Callable[[], object]]:
    import torch

    from tritorch.bench import tune

    chosen = getattr(torch, dtype, None)
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f"tune: {dtype} is no dtype")
    if ops:
        yield from tune.programs(ops, chosen, device)
    if model is not None:
        yield tune.program(model)


def _tuned(
    programs: Iterator[Callable[[], object]],
    table: TunedTable,
    device: torch.device,
    plan: Plan,
    answers: list[Answer],
    console: Console,
) -> None:
    """Adds answers to the list as they are found, and shows how far it is."""
    from tritorch.bench import tune

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("running what is to be tuned", total=None)
        asked = tune.asked_by(programs)
        seen: list[str] = []

        def told(function: str, sizes: tuple[int, ...]) -> None:
            said = f"{function} {' '.join(map(str, sizes))}"
            progress.update(bar, description=said[:60], completed=len(seen), total=len(asked))
            seen.append(said)

        for answer in tune.tune(asked, table, device, plan, told):
            answers.append(answer)
        progress.update(bar, completed=len(asked), total=len(asked))


def _table(answers: list[Answer]) -> Table:
    table = Table("function", "sizes", "own us", "best us", "configuration", box=None)
    for one in answers:
        sizes = " ".join(map(str, one.sizes))
        config = "its own" if one.best == one.own else str(one.config)
        table.add_row(one.function, sizes, f"{one.own:.1f}", f"{one.best:.1f}", config)
    return table
