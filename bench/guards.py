"""What a benchmark must not believe: results that were not computed, inputs that changed, timers
that lie.

Each guard says in a sentence what it caught; `rows` refuses the row.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritorch.bench.cases import Slot
from tritorch.bench.passes import Prepared
from tritorch.testing import tolerances

# products of so many operations are checked in float32, which is exact enough for 16-bit results
_DOUBLE = 10**10
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)

# a share of the time that the least traffic or the operations take; caches may beat the former
_IMPOSSIBLE = 0.5

# a share of a call's time that may be left on other streams, and the microseconds of a question
_ELSEWHERE, _NOISE = 0.2, 50.0

_CLOCKS: tuple[tuple[Any, str, Any], ...] = tuple(
    (owner, name, getattr(owner, name))
    for owner, name in (
        (time, "perf_counter"),
        (time, "perf_counter_ns"),
        (time, "monotonic"),
        (torch.cuda, "synchronize"),
        (torch.cuda, "Event"),
        (torch.cuda.Event, "record"),
        (torch.cuda.Event, "elapsed_time"),
        (torch.cuda.Event, "synchronize"),
    )
)


def patched() -> str:
    """Names the clock that something has replaced since this module was imported, "" for none."""
    for owner, name, original in _CLOCKS:
        if getattr(owner, name) is not original:
            return f"patched timer: {getattr(owner, '__name__', owner)}.{name} was replaced"
    return ""


def elsewhere(unfinished: float, us: float) -> str:
    """Says that a call of so many microseconds leaves so many of work on another stream behind,
    where no event has seen it.
    """
    if unfinished <= max(_NOISE, _ELSEWHERE * us):
        return ""
    return f"work on another stream: the GPU is busy for {unfinished:.0f} us after the last event"


def lazy(results: Mapping[str, Any]) -> str:
    """Names a result that is no plain tensor, and so need not have been computed yet."""
    for name, result in results.items():
        if type(result) not in (Tensor, torch.nn.Parameter):
            return f"lazy output: {name} is a {type(result).__name__}, not a tensor"
    return ""


def fingerprints(slots: Iterable[Slot]) -> list[tuple[str, Tensor]]:
    """Sums of the bits of every tensor that a call must leave alone, not waited for."""
    return [
        (f"{name} of slot {number}", _bits(tensor).sum(dtype=torch.int64))
        for number, slot in enumerate(slots)
        for name, tensor in slot.tensors()
    ]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.bool else tensor.view(_INTEGERS[tensor.element_size()])


def mutated(before: list[tuple[str, Tensor]], slots: Iterable[Slot]) -> str:
    """Names an input whose bits have changed."""
    for (name, then), (_, now) in zip(before, fingerprints(slots), strict=True):
        if int(then) != int(now):
            return f"mutated input: {name} has changed"
    return ""


class Judge:
    """Compares results of one pass with what the reference gives, slot by slot."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._truths: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    def forget(self) -> None:
        """Slots have other numbers from now on."""
        self._truths.clear()

    def verdict(self, results: Mapping[str, Tensor], slot: int) -> tolerances.Verdict:
        """The worst verdict of all results of a slot."""
        worst = tolerances.Verdict(True, 0.0, None, "")
        truths = self._truth(slot)
        for name, (truth, yardstick) in truths.items():
            if name not in results:
                return tolerances.Verdict(False, float("inf"), None, f"{name} is missing")
            found = self._compare(name, results[name], truth, yardstick)
            if found.headroom >= worst.headroom:
                worst = found
            if not found.accepted:
                # the dataclass is frozen, and its text does not say of which result it is
                return tolerances.Verdict(
                    False, found.headroom, found.ratio, f"{name}: {found.failure}"
                )
        return worst

    def _compare(
        self, name: str, result: Tensor, truth: Tensor, yardstick: Tensor
    ) -> tolerances.Verdict:
        if self._exactly(name) or not yardstick.is_floating_point():
            return tolerances.compare(result, yardstick, exact=True)
        return tolerances.compare(result, truth.double(), baseline=yardstick)

    def _exactly(self, name: str) -> bool:
        # torch may add up the gradients of one element in any order
        return self.prepared.case.exact and name.startswith("output")

    def _truth(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        if slot not in self._truths:
            prepared, reference = self.prepared, self.prepared.case.reference
            # the search for the fastest algorithm is not worth it for one call
            searched = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = False
            try:
                yardsticks = prepared.outcome(reference, slot)
                truths = prepared.outcome(reference, slot, self._precision())
            finally:
                torch.backends.cudnn.benchmark = searched
            self._truths = {slot: {name: (truths[name], yardsticks[name]) for name in truths}}
        return self._truths[slot]

    def _precision(self) -> torch.dtype:
        case = self.prepared.case
        flops = max((cost.flops for cost in case.cost.values()), default=0)
        large = flops > _DOUBLE and case.dtype in _TENSOR_CORE_DTYPES
        return torch.float32 if large else torch.float64


def impossible(median_us: float, floor_us: float | None) -> str:
    """Says so where a time is far below what the machine's own ceilings allow."""
    if floor_us is not None and median_us < _IMPOSSIBLE * floor_us:
        return f"impossible: {median_us:.3g} us, where the ceilings allow {floor_us:.3g}"
    return ""
