"""What commands share: values of options, folders to write in, and how a program ends."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import NoReturn

import click


def finite(context: click.Context, option: click.Parameter, value: float) -> float:
    """No NaN and no infinity, which ranges let through."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number", context, option)
    return value


def percent(context: click.Context, option: click.Parameter, value: str) -> float:
    """A share: 3% or 0.03."""
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise click.BadParameter(f"{value!r} is not a share such as 3% or 0.03", context, option)
    return number


def check_folder(folder: Path) -> None:
    """The nearest folder of `folder`'s path that exists must be one to write in."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise click.UsageError(f"{folder}: {existing} is not a folder to write in")


def words(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Comma-separated words; None where the option was not given."""
    if value is None:
        return None
    return tuple(word.strip() for word in value.split(",") if word.strip())


def stop(message: str, status: int) -> NoReturn:
    """Ends the program."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)
