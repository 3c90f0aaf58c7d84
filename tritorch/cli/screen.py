"""What `tritorch train` says: colours and a progress bar on a terminal, else plain text."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tritorch import __version__
from tritorch.training.train import Epoch, Result, Setup
from tritorch.training.twins import Settings

_EPOCH = "{:>6} {:>15} {:>15} {:>12} {:>12} {:>14} {:>14}"
_SUMMARY = "{:>14} {:>13} {:>13}   {}"
# problems that are listed
_SHOWN = 10


class Screen:
    """Prints to stdout, or to stderr where stdout is for the numbers.  Heeds NO_COLOR."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)

    def setup(self, settings: Settings, device: torch.device, setup: Setup) -> None:
        """What is about to run, and the head of the table of epochs."""
        if device.type == "cuda":
            how = f"{torch.cuda.get_device_name(device)}: the Triton kernels train"
        else:
            checked = "checked in the interpreter" if settings.replay_steps else "not checked"
            how = f"no GPU in use: the reference path trains, kernels {checked}"
        self._say(f"tritorch {__version__}, torch {torch.__version__}, {_triton()}; {how}")
        self._say(
            f"data   handwritten digits, 8 by 8 pixels, {setup.digits_train} to train on and "
            f"{setup.digits_test} to test, seed {settings.seed}"
        )
        self._say(
            f"model  lenet8, {setup.parameters:,} parameters, {setup.layers_converted} of "
            f"{setup.layers} layers converted to tritorch's"
        )
        self._say()
        names = ("loss torch.nn", "loss tritorch", "max |dloss|", "noise")
        self._say(_EPOCH.format("epoch", *names, "acc torch.nn", "acc tritorch"), style="bold")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[int, int, str], None]]:
        """A bar, on a terminal; gives what moves it: step, number of steps, and a text."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        terminal = self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=not terminal) as bar:
            task = bar.add_task("", total=None)
            yield lambda step, steps, doing: bar.update(
                task, completed=step, total=steps, description=doing, refresh=True
            )

    def epoch(self, epoch: Epoch) -> None:
        """A line of the table of epochs."""
        self._say(
            _EPOCH.format(
                epoch.number,
                f"{epoch.loss_torch:.5f}",
                f"{epoch.loss_tritorch:.5f}",
                f"{epoch.gap:.1e}",
                f"{epoch.noise:.1e}",
                f"{epoch.accuracy_torch:.1%}",
                f"{epoch.accuracy_tritorch:.1%}",
            )
        )

    def summary(self, result: Result) -> None:
        """The table that compares the twins."""
        last, ours, torchs = result.epochs[-1], result.cost_tritorch, result.cost_torch
        on_gpu = result.device.type == "cuda"
        rows = [
            (
                "test accuracy",
                f"{last.accuracy_torch:.1%}",
                f"{last.accuracy_tritorch:.1%}",
                f"{result.differing} of {result.setup.digits_test} predictions differ",
            ),
            (
                "step time",
                f"{torchs.median_us / 1e3:.2f} ms",
                f"{ours.median_us / 1e3:.2f} ms",
                f"speed-up {torchs.median_us / ours.median_us:.2f}"
                if on_gpu
                else "the reference path; the kernels' speed needs a GPU",
            ),
            (
                "memory",
                f"{torchs.memory / 2**20:.2f} MiB",
                f"{ours.memory / 2**20:.2f} MiB",
                "parameters, momentum and the peak of a step"
                if on_gpu
                else "parameters, momentum, gradients and what is kept for them",
            ),
            (
                "loss gap",
                "-",
                f"{result.curves.gap[-1]:.1e}",
                f"at most {result.curves.share_of_limit:.2f} of its limit",
            ),
            _replayed(result),
        ]
        if on_gpu:
            fallbacks = sum(sum(reasons.values()) for reasons in result.fallbacks.values())
            rows.append(("fallbacks", "-", str(fallbacks), "calls that the kernels did not take"))
        self._say()
        self._say(_SUMMARY.format("", "torch.nn", "tritorch", "").rstrip(), style="bold")
        for row in rows:
            self._say(_SUMMARY.format(*row))
        self._say()

    def equal(self, result: Result) -> None:
        self._say(f"equal: the twins agree ({result.seconds:.0f} s)", style="bold green")

    def problem(self, what: str, command: str, details: Sequence[str] = ()) -> None:
        """What is wrong, and the command that shows it again."""
        self._say(what, style="bold red")
        for detail in details[:_SHOWN]:
            self._say(f"  {detail}")
        if len(details) > _SHOWN:
            self._say(f"  and {len(details) - _SHOWN} more, all of them in the file of --json")
        self._say(f"reproduce: {command}")

    def note(self, name: str, text: object) -> None:
        self._say(f"{name}: {text}")

    def _say(self, text: str = "", style: str | None = None) -> None:
        # no markup: a name in brackets is a name
        self._console.print(text, style=style, markup=False)


def _triton() -> str:
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "no triton"


def _replayed(result: Result) -> tuple[str, str, str, str]:
    replays = result.replays
    if not replays:
        every = "every step ran them" if result.kernels else "not done"
        return ("kernel replay", "-", "-", every)
    good = sum(all(check.verdict.accepted for check in checks) for checks in replays.values())
    checks = [check for found in replays.values() for check in found]
    worst = max(checks, key=lambda check: check.verdict.headroom)
    return (
        "kernel replay",
        "-",
        f"{good}/{len(replays)}",
        f"steps through the kernels, {len(checks)} tensors; worst error "
        f"{worst.verdict.headroom:.2f} of its limit ({worst.tensor})",
    )
