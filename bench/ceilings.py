"""What this machine can do at most: the bandwidth of a copy, the rates of matrix products.

Measured in the same run as everything that is compared with them; no data sheet is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tritorch.bench import timing
from tritorch.registry import Cost

# elements of a copy and sides of square products, on a GPU and on a CPU
_COPY = {"cuda": 1 << 29, "cpu": 1 << 22}
_SIDES = {"cuda": (4096, 8192), "cpu": (256,)}
_RATES = ("bfloat16", "float16", "tf32", "float32")


@dataclass(frozen=True)
class Ceilings:
    """`bandwidth`: bytes a second, read and written; `rates`: operations a second by dtype, or
    "tf32".
    """

    bandwidth: float
    rates: dict[str, float]

    def floor_us(
        self, cost: Cost | None, dtype: torch.dtype, *, tf32: bool = False
    ) -> float | None:
        """The least time of that much work in microseconds; None where a rate is not known."""
        if cost is None or not (cost.flops or cost.bytes):
            return None
        name = "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
        rate = self.rates.get(name)
        if rate is None:
            return None
        return max(cost.flops / rate, cost.bytes / self.bandwidth) * 1e6


def measure(
    device: torch.device, names: Iterable[str] = _RATES, seconds: float = 0.5
) -> Iterator[dict[str, Any]]:
    """Rows of a result file, each as soon as it is measured."""
    clock, kind = timing.clock(device), device.type
    plan = timing.Plan(seconds=seconds)
    yield _copy(_COPY[kind], device, clock, plan)
    for name in names:
        for side in _SIDES[kind]:
            yield _product(name, side, device, clock, plan)


def _copy(
    count: int, device: torch.device, clock: timing.Clock, plan: timing.Plan
) -> dict[str, Any]:
    x = torch.randn(count, device=device).to(torch.bfloat16)
    y = torch.empty_like(x)
    timed = timing.measure({"copy": [lambda: y.copy_(x)]}, clock, plan)["copy"]
    return _row("copy", [count], "bfloat16", timed, bytes=2 * count * x.element_size())


def _product(
    name: str, side: int, device: torch.device, clock: timing.Clock, plan: timing.Plan
) -> dict[str, Any]:
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    flags: Any = torch.backends.cuda.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        # of zeros the clock would stay higher than any real product's
        pairs = [
            [torch.randn(side, side, device=device).to(dtype) for _ in range(2)] for _ in range(2)
        ]
        calls = [lambda a=a, b=b: a @ b for a, b in pairs]
        timed = timing.measure({name: calls}, clock, plan)[name]
    finally:
        flags.fp32_precision = before
    return _row("matmul", [side] * 3, name, timed, flops=2 * side**3)


def _row(
    op: str, shape: list[int], dtype: str, timed: timing.Timing, flops: int = 0, bytes: int = 0
) -> dict[str, Any]:
    us = timed.median.value
    return {
        "op": op,
        "name": "ceiling",
        "shape": shape,
        "dtype": dtype,
        "layout": "contiguous",
        "pass": "forward",
        "implementation": "torch",
        "baseline": "",
        "median_us": us,
        "interval_us": list(timed.median[1:]),
        "samples_us": [[round(sample, 3) for sample in one] for one in timed.rounds],
        "speedup": None,
        "verified": True,
        "tflops": flops / us / 1e6,
        "gbps": bytes / us / 1e3,
    }


def of_rows(rows: Iterable[dict[str, Any]]) -> Ceilings | None:
    """The highest of each that `measure` has found, None without a bandwidth."""
    bandwidth, rates = 0.0, dict[str, float]()
    for row in rows:
        if row.get("name") == "ceiling":
            bandwidth = max(bandwidth, row["gbps"] * 1e9)
            if row["tflops"]:
                rates[row["dtype"]] = max(rates.get(row["dtype"], 0), row["tflops"] * 1e12)
    return Ceilings(bandwidth, rates) if bandwidth else None
