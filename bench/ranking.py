"""The shipped configurations of one call, the fastest by the estimate first.

For GPUs without measurements, and for a search on one that should try likely ones first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tritorch import launch as launching
from tritorch.bench import estimate, inspection
from tritorch.bench.recording import record
from tritorch.registry import Maker, OpSpec, Sample


@dataclass(frozen=True)
class Ranked:
    """One entry of the table of the function `name`, the time of the call's launches with it.

    `us`: microseconds, estimated.  `chosen`: it is what is chosen for this call.
    """

    name: str
    entry: Any
    us: float
    chosen: bool


def rank(spec: OpSpec, sample: Sample, dtype: torch.dtype, target: str) -> dict[str, list[Ranked]]:
    """By the name of each choosing function that the call asks, its entries, fastest first.

    An entry that does not fit the target, for want of shared memory say, is left out.
    """
    with launching.choices() as chosen:
        record(spec.op, sample.arguments, target, gradients=spec.gradients)
    found: dict[str, list[Ranked]] = {}
    for name, entry, _ in inspection.shipped(spec, target, dtype, [sample]):
        with launching.override(name, entry):
            launches = record(spec.op, sample.arguments, target, gradients=spec.gradients).launches
        if any(estimate.facts_of(one, target).resident < 1 for one in launches):
            continue
        us = estimate.of_launches(launches, target)
        is_chosen = any(name == other and entry is one for other, one in chosen)
        found.setdefault(name, []).append(Ranked(name, entry, us, is_chosen))
    return {name: sorted(entries, key=lambda one: one.us) for name, entries in found.items()}


def of_op(
    spec: OpSpec, target: str, dtype: torch.dtype, calls: str = ""
) -> Iterator[tuple[str, list[Ranked]]]:
    """The same of every workload whose name has `calls` in it, with what it is of in words."""
    for sample in spec.workloads(Maker(dtype)):
        if calls in sample.name:
            for name, entries in rank(spec, sample, dtype, target).items():
                yield f"{spec.name} {sample.name}: {name}", entries
