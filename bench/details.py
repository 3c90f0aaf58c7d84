"""What a row has besides its time: a graph's time, the host's, memory, what its kernels take.

Each is measured on calls of its own, after the times: none of it can disturb them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tritorch.bench import fatal, launches, timing
from tritorch.bench.cases import TORCH
from tritorch.bench.passes import Prepared

Row = dict[str, Any]

# of a graph, whose samples are alike
_GRAPH = timing.Plan(seconds=0.05, precision=0.01, least=6, most=60)


@dataclass(frozen=True)
class Subject:
    """One implementation of a pass; `seconds`: that the host's time may take."""

    prepared: Prepared
    name: str
    clock: timing.Clock
    seconds: float = 0.1

    def call(self) -> timing.Call:
        """One call on the first slot, made now if it was not."""
        calls = self.prepared.calls[self.name]
        return calls[0] if calls else self.prepared.call(self.name, 0)


def _host(subject: Subject) -> Row:
    found = timing.host_time(subject.call(), subject.clock, seconds=subject.seconds)
    return {"host_us": found.value, "host_interval_us": list(found[1:])}


def _graph(subject: Subject) -> Row:
    prepared = subject.prepared

    def make() -> list[timing.Call]:
        return [prepared.call(subject.name, number) for number in range(len(prepared.slots))]

    # nothing empties the cache within a graph: of small tensors the ring does not fill it
    cold = len(prepared.slots) * prepared.case.size >= 2 * subject.clock.cache()
    return {"graph_us": timing.graph_time(make, _GRAPH).value, "graph_cold": cold}


def _memory(subject: Subject) -> Row:
    call = subject.call()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - held}


def _kernels(subject: Subject) -> Row:
    # torch's are not Triton's
    return {} if subject.name == TORCH else {"kernels": launches.resources(subject.call())}


# what each name measures; all but the host's time is of a GPU
MEASURES: Mapping[str, Callable[[Subject], Row]] = {
    "host": _host,
    "graph": _graph,
    "memory": _memory,
    "kernels": _kernels,
}
_ANYWHERE = frozenset({"host"})


def of(
    subject: Subject, wanted: Iterable[str], device: torch.device
) -> tuple[Row, dict[str, float]]:
    """The wanted fields of a row, and the seconds that each measure took.

    What cannot be measured is told by a field of its own, `graph_failure` say.
    """
    found, seconds = Row(), dict[str, float]()
    with torch.set_grad_enabled(bool(subject.prepared.wanted)):
        for name in sorted(wanted):
            if device.type == "cuda" or name in _ANYWHERE:
                start = time.monotonic()
                try:
                    found |= MEASURES[name](subject)
                except Exception as error:
                    # a call that waits for the GPU cannot be captured, for one
                    fatal.reraise(error)
                    why = f"{type(error).__name__}: {error}".partition("\n")[0]
                    found[f"{name}_failure"] = why[:200]
                subject.clock.finish()
                seconds[name] = round(time.monotonic() - start, 4)
    return found, seconds
