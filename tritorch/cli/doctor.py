"""`tritorch doctor`: what this machine can do, and what to do next."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from tritorch.doctor import Diagnosis

_SICK = 1
_SIGNS = {"ok": "[ok]", "warn": "[warn]", "fail": "[fail]", "none": "[--]"}
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "none": "dim"}


@click.command()
@click.option("--strict", is_flag=True, help="Exit 1 if anything warns or fails.")
@click.option("--json", "as_json", is_flag=True, help="The answers as JSON on stdout.")
def doctor(strict: bool, as_json: bool) -> None:
    """Say what this machine can do, and what to do next.

    Looks at Python, torch, Triton and numpy and at pairs of them that do not go together, runs a
    kernel in the interpreter and on the GPU, compiles one for GPUs that are not there, and looks at
    caches and optional packages.

    Exit status: 0 whatever it finds; with --strict 1 if anything warns or fails.
    """
    from tritorch.doctor import diagnose

    console = Console(stderr=as_json, highlight=False, emoji=False, soft_wrap=True)
    if console.is_terminal:
        with console.status("looking") as status:
            found = diagnose(lambda what: status.update(Text(what)))
    else:
        found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        _show(found, console)
    if strict and not found.healthy:
        sys.exit(_SICK)


def _show(found: Diagnosis, console: Console) -> None:
    for answer in found.answers:
        line = Text(f"{_SIGNS[answer.state]:<7}", style=_STYLES[answer.state])
        line.append(f"{answer.name:<18}{answer.text}", style="default")
        console.print(line)
        if answer.advice:
            console.print(Text(f"{'':25}{answer.advice}", style="dim"))
    console.print(Text(f"works here: {', '.join(found.works) or 'nothing'}", style="bold"))
    for step in found.next:
        console.print(Text(f"next: {step}"))
