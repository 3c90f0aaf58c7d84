"""The command line.  Exit status: 0 equal, 1 different, 2 a wrong call, 3 something is missing."""

from __future__ import annotations

import click

from tritorch import __version__
from tritorch.cli import bench, check, doctor, inspect, train, tune


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tritorch")
def main() -> None:
    """Hand-written Triton kernels behind torch's interface."""


for command in (check.check, inspect.inspect, doctor.doctor, bench.bench, tune.tune, train.train):
    main.add_command(command)
