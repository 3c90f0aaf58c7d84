"""Whole train steps of ResNet-50: torch's, torch.compile's, and ours.

bfloat16 under autocast, channels_last, SGD with momentum, random images that stay on the device.
A step is timed as it is, the host's part included: nobody trains without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tritorch
from tritorch import ops
from tritorch.bench import baselines, intervals, timing
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import OURS, TORCH
from tritorch.bench.resnet50 import ResNet50

# by how much first losses of equal networks may differ, as a fraction: a bfloat16's last digits
_ROUNDING = 2.0**-6
_WARM_UP = 3

Step = Callable[[], Tensor]


class Trainer:
    """Builds steps on one batch of random images; `blocks` and `size` make a small network."""

    def __init__(
        self,
        device: torch.device,
        batch: int,
        *,
        blocks: tuple[int, ...] = (3, 4, 6, 3),
        size: int = 224,
    ) -> None:
        self.device, self.blocks = device, blocks
        generator = torch.Generator(device).manual_seed(0)
        images = torch.randn(batch, 3, size, size, device=device, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(1000, (batch,), device=device, generator=generator)

    def step(self, implementation: str) -> Step:
        """A step of a new network, of the same weights each time."""
        torch.manual_seed(0)
        # torch has no type hint for the memory format of modules
        model: Any = ResNet50(self.blocks).to(self.device)
        model = model.to(memory_format=torch.channels_last)
        loss_of: Callable[..., Tensor] = F.cross_entropy
        optim: Any = torch.optim
        if implementation == OURS:
            model, loss_of, optim = tritorch.convert(model), ops.cross_entropy, tritorch.optim
        elif implementation == COMPILED:
            model = baselines.compiled(model)
        optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)

        def step() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_of(model(self.images), self.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def rows(
        self, names: tuple[str, ...], plan: timing.Plan, clock: timing.Clock
    ) -> list[dict[str, Any]]:
        """One row for each implementation, torch's among them; a step that raises has no time."""
        steps, losses, failures = self._steps(names)
        timed = timing.measure(steps, clock, plan)
        return [self._row(name, timed, losses, failures) for name in names]

    def _steps(
        self, names: tuple[str, ...]
    ) -> tuple[dict[str, list[Step]], dict[str, float], dict[str, str]]:
        steps: dict[str, list[Step]] = {}
        losses: dict[str, float] = {}
        failures: dict[str, str] = {}
        for name in names:
            try:
                step = self.step(name)
                losses[name] = float(step())
                for _ in range(_WARM_UP):
                    step()
                steps[name] = [step]
            except Exception as error:
                if name == TORCH or "CUDA error" in str(error):
                    raise
                failures[name] = f"raises {type(error).__name__}: {error}"[:500]
        return steps, losses, failures

    def _row(
        self,
        name: str,
        timed: Mapping[str, timing.Timing],
        losses: Mapping[str, float],
        failures: Mapping[str, str],
    ) -> dict[str, Any]:
        # of equal weights; later losses drift apart as any two roundings do
        loss, expected = losses.get(name, math.nan), losses[TORCH]
        close = abs(loss - expected) <= _ROUNDING * abs(expected)
        failure = failures.get(name, "" if close else f"first loss {loss}, torch's {expected}")
        row: dict[str, Any] = {
            "op": "resnet50",
            "name": "train_step",
            "shape": list(self.images.shape),
            "dtype": "bfloat16",
            "layout": "channels_last",
            "pass": "train_step",
            "implementation": name,
            "baseline": "" if name == TORCH else TORCH,
            "median_us": None,
            "speedup": None,
            "verified": not failure,
            "failure": failure,
            "first_loss": None if math.isnan(loss) else loss,
        }
        if name in timed:
            us = timed[name].median.value
            row |= {
                "median_us": us,
                "interval_us": list(timed[name].median[1:]),
                "quartiles_us": list(intervals.quartiles(timed[name].samples)),
                "samples_us": [[round(s, 1) for s in one] for one in timed[name].rounds],
                "images_per_second": self.images.shape[0] / us * 1e6,
            }
            if name != TORCH:
                row["baseline_us"] = timed[TORCH].median.value
                row["speedup"] = None if failure else row["baseline_us"] / us
        return row
