"""`tritorch train`: a network and its torch.nn twin, trained side by side and compared."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tritorch.cli.options import check_folder, finite

if TYPE_CHECKING:
    from tritorch.cli.screen import Screen
    from tritorch.training.train import Result
    from tritorch.training.twins import Settings

_EPOCHS, _REPLAY_STEPS = 12, 3
_QUICK_EPOCHS, _QUICK_REPLAY_STEPS = 2, 1
_DIFFERENT, _UNABLE = 1, 3
_NEXT = "tritorch train --out tritorch-report, which writes a page to look at"
# of a result file
_KIND = "train"


class Unable(click.ClickException):
    """What was asked for needs something that this machine lacks."""

    exit_code = _UNABLE


@click.command()
@click.option("--epochs", type=click.IntRange(1), help=f"Passes over the digits.  [{_EPOCHS}]")
@click.option(
    "--batch", type=click.IntRange(2), default=64, show_default=True, help="Digits a step."
)
@click.option(
    "--lr",
    type=click.FloatRange(0),
    callback=finite,
    default=0.05,
    show_default=True,
    help="Learning rate of the first step; falls linearly to zero.",
)
@click.option(
    "--momentum", type=click.FloatRange(0), callback=finite, default=0.9, show_default=True
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the split, the weights and the order of the digits.",
)
@click.option("--dtype", type=click.Choice(["float32"]), default="float32", show_default=True)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: cuda where there is a GPU.",
)
@click.option(
    "--replay-steps",
    type=click.IntRange(0),
    metavar="N",
    help="Steps to take again through the kernels and compare with float64, evenly spread.  "
    f"[{_REPLAY_STEPS}; on a GPU, where every step runs the kernels, 0]",
)
@click.option("--no-replay", is_flag=True, help="The same as --replay-steps 0.")
@click.option(
    "--quick", is_flag=True, help=f"{_QUICK_EPOCHS} epochs, {_QUICK_REPLAY_STEPS} replayed step."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write index.html, a page to look at, and run.json there; replaces an earlier report.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Write the numbers there; - is stdout, and the text goes to stderr.",
)
@click.option("--force", is_flag=True, help="Let --out and --json replace what is there.")
def train(**options: Any) -> None:
    """Train a network and its torch.nn twin on real digits; compare them.

    A small convolutional network is converted to tritorch's layers and trained on 1,437 bundled
    handwritten digits beside its torch.nn twin, from the same weights.  On a GPU the Triton kernels
    train it.  Elsewhere the reference path does, and a few steps are taken again through the
    kernels in the interpreter.

    The two are equal if their losses never differ by more than three times what a torch.nn twin's
    do that keeps its parameters to 18 and 17 bits instead of 24, plus 8 roundoffs; if they name the
    same number of test digits but for one; and if every tensor of a replayed step is within the
    rounding errors that its dtype and data excuse.  From 12 epochs on, 98 % of the test digits must
    be named right.

    Exit status: 0 equal, 1 different, 2 a wrong call, 3 something missing (a GPU, Triton).
    """
    out, json_file, force = options["out"], options["json_file"], options["force"]
    _check_free(out, json_file, force)
    device = _device(options["device"])
    wanted = _replay_steps(options, device)
    kernels = device == "cuda" or importlib.util.find_spec("triton") is not None
    # before anything imports Triton, which looks at it once
    os.environ["TRITON_INTERPRET"] = "1" if wanted and kernels and device == "cpu" else "0"

    import torch

    from tritorch import backend
    from tritorch.cli.screen import Screen
    from tritorch.training import train as training
    from tritorch.training.twins import Settings

    if wanted and kernels and device == "cpu" and not backend.INTERPRETING:
        raise Unable("tritorch was imported before: set TRITON_INTERPRET=1 before Python starts")
    if device == "cpu":
        # tensors this small are computed before a second thread wakes, which a busy machine delays
        torch.set_num_threads(1)
    # the products of both twins in full: one may use TF32 where the other does not
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = "ieee"
    backends.cudnn.conv.fp32_precision = "ieee"
    settings = Settings(
        epochs=options["epochs"] or (_QUICK_EPOCHS if options["quick"] else _EPOCHS),
        replay_steps=wanted if kernels else 0,
        dtype=getattr(torch, options["dtype"]),
        **{name: options[name] for name in ("batch", "lr", "momentum", "seed")},
    )
    place = torch.device(device)
    command = _command(settings, device, wanted)
    screen = Screen(to_stderr=str(json_file) == "-")
    try:
        with screen.progress() as on_step:
            result = training.run(
                settings,
                place,
                on_setup=lambda setup: screen.setup(settings, place, setup),
                on_step=on_step,
                on_epoch=screen.epoch,
            )
    except backend.FallbackError as error:
        screen.problem(str(error), command)
        sys.exit(_DIFFERENT)
    except Exception:
        screen.note("reproduce", command)
        raise
    screen.summary(result)
    try:
        _write(result, command, out, json_file, force, screen)
    except OSError as error:
        raise Unable(f"the result could not be written: {error}") from error
    if result.failures:
        screen.problem(
            "refused: the twins are different, or did not learn", command, result.failures
        )
        sys.exit(_DIFFERENT)
    screen.equal(result)
    if wanted and not kernels:
        screen.problem("the kernels were not checked: Triton is not installed", command)
        screen.note("next", "pip install triton, or add --no-replay")
        sys.exit(_UNABLE)
    screen.note("next", "in a program of yours, model = tritorch.convert(model)" if out else _NEXT)


def _device(name: str) -> str:
    import torch

    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise Unable("--device cuda: torch finds no GPU")
    return "cuda" if found and name != "cpu" else "cpu"


def _replay_steps(options: dict[str, Any], device: str) -> int:
    given: int | None = options["replay_steps"]
    if options["no_replay"]:
        if given:
            raise click.UsageError("--no-replay and --replay-steps contradict each other")
        return 0
    if given is not None:
        return given
    if device == "cuda":
        return 0
    return _QUICK_REPLAY_STEPS if options["quick"] else _REPLAY_STEPS


def _command(settings: Settings, device: str, replay_steps: int) -> str:
    named = {
        "seed": settings.seed,
        "epochs": settings.epochs,
        "batch": settings.batch,
        "lr": settings.lr,
        "momentum": settings.momentum,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": device,
        "replay-steps": replay_steps,
    }
    return " ".join(["tritorch train", *(f"--{name} {value}" for name, value in named.items())])


def _check_free(out: Path | None, json_file: Path | None, force: bool) -> None:
    """Before minutes of work whose result could not be written."""
    for path in (out, json_file):
        if path is not None and str(path) != "-":
            check_folder(path if path is out else path.parent)
    if force:
        return
    if json_file is not None and str(json_file) != "-" and json_file.exists():
        raise click.UsageError(f"--json {json_file} exists: name a new file, or add --force")
    if out is not None and out.is_dir() and any(out.iterdir()) and not _is_report(out):
        raise click.UsageError(
            f"--out {out} holds something else than a report: name a new folder, or add --force"
        )


def _is_report(folder: Path) -> bool:
    try:
        kind = json.loads((folder / "run.json").read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return kind == _KIND and {path.name for path in folder.iterdir()} <= {"index.html", "run.json"}


def _write(
    result: Result,
    command: str,
    out: Path | None,
    json_file: Path | None,
    force: bool,
    screen: Screen,
) -> None:
    from tritorch.bench.environment import write_result
    from tritorch.training import report

    def write(path: Path, overwrite: bool) -> str:
        rows, details = report.rows(result), report.details(result)
        write_result(path, _KIND, rows, overwrite=overwrite, command=command, **details)
        return path.read_text(encoding="utf-8")

    if out is not None:
        text = write(out / "run.json", True)
        (out / "index.html").write_text(report.page(json.loads(text)), encoding="utf-8")
        screen.note("report", out / "index.html")
    if json_file is not None and str(json_file) == "-":
        with tempfile.TemporaryDirectory() as folder:
            click.echo(write(Path(folder) / "run.json", False), nl=False)
    elif json_file is not None:
        write(json_file, force)
        screen.note("numbers", json_file)
