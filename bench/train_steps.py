"""Whole train steps of ResNet-50: torch's, torch.compile's, ours, and ours with its layers fused.

bfloat16 under autocast, channels_last, SGD with momentum, random images that stay on the device.
A step is timed as it is, the host's part included: nobody trains without it.  On a GPU it is timed
once more as a CUDA graph, which leaves the device's part alone.

A row is verified by the first step: its loss and how it moves every parameter are torch's, within
what bfloat16 leaves of gradients; and a graph by a loss that goes on changing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tritorch
from tritorch import ops
from tritorch.bench import baselines, fatal, intervals, timing
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import OURS, TORCH
from tritorch.bench.resnet50 import Bottleneck, ResNet50

# ours, with activations and additions in the kernels of the norms before them
FUSED = "tritorch, fused"
# the pass of a step as it is, and of one that is a CUDA graph
EAGER, GRAPH = "train_step", "train_step_graph"

# by how much first losses of equal networks may differ, as a fraction: a bfloat16's last digits
_ROUNDING = 2.0**-6
# of the last norm of each block, which many begin with 0: of branches as strong as what goes past
# them fifty layers make a chaos, in which two ways to round give gradients that share little
_BRANCH = 0.1
# how much of a first update is to be in torch's direction, and by what factor it may be longer or
# shorter: of all parameters together, and of each
_ALL, _EACH = (0.95, 1.1), (0.75, 1.5)
_WARM_UP = 3


@dataclass
class Step:
    """A step, and what it trains, by name."""

    run: Callable[[], Tensor]
    parameters: dict[str, Tensor]

    def __call__(self) -> Tensor:
        return self.run()

    def update(self) -> tuple[float, dict[str, Tensor]]:
        """The loss of one step, and by how much it moved the parameters."""
        before = {name: one.detach().clone() for name, one in self.parameters.items()}
        loss = float(self())
        return loss, {name: self.parameters[name].detach() - was for name, was in before.items()}


@dataclass
class _Sides:
    """What is timed, by name, and what is known of it besides."""

    steps: dict[str, Step] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    updates: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def fails(self, name: str, error: Exception) -> None:
        fatal.reraise(error)
        if name == TORCH:
            raise error
        self.failures[name] = f"raises {type(error).__name__}: {error}"[:500]


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
        model: Any = ResNet50(self.blocks)
        for module in model.modules():
            if isinstance(module, Bottleneck):
                torch.nn.init.constant_(module.bn3.weight, _BRANCH)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        names = [name for name, _ in model.named_parameters()]
        loss_of: Callable[..., Tensor] = F.cross_entropy
        optim: Any = torch.optim
        if implementation in (OURS, FUSED):
            model, loss_of, optim = tritorch.convert(model), ops.cross_entropy, tritorch.optim
        if implementation == FUSED:
            model = tritorch.fuse(model)
        elif implementation == COMPILED:
            model = baselines.compiled(model)
        # under the names of the network that it was
        parameters = dict(zip(names, model.parameters(), strict=True))
        optimizer = optim.SGD(parameters.values(), 0.1, momentum=0.9)

        def run() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = loss_of(model(self.images), self.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Step(run, parameters)

    def rows(
        self, names: tuple[str, ...], plan: timing.Plan, clock: timing.Clock
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows of one measurement after the other: of each implementation, torch's among them,
        and on a GPU of each as a graph.  A step that raises has no time.
        """
        sides = self._sides(names)
        timed = timing.measure({name: [step] for name, step in sides.steps.items()}, clock, plan)
        yield [self._row(EAGER, name, timed, sides) for name in names]
        if self.device.type == "cuda" and COMPILED not in names:
            graphs = self._graphs(sides)
            timed = timing.measure({name: [replay] for name, replay in graphs.items()}, clock, plan)
            yield [self._row(GRAPH, name, timed, sides) for name in names]

    def _sides(self, names: tuple[str, ...]) -> _Sides:
        sides = _Sides()
        for name in names:
            try:
                step = self.step(name)
                sides.losses[name], sides.updates[name] = step.update()
                for _ in range(_WARM_UP):
                    step()
                sides.peaks[name] = self._peak(step)
                sides.steps[name] = step
            except Exception as error:
                sides.fails(name, error)
        for name, update in sides.updates.items():
            if why := _differs(update, sides.updates[TORCH]):
                sides.failures.setdefault(name, why)
        sides.updates.clear()
        return sides

    def _peak(self, step: Step) -> int:
        """Bytes that a step needs besides what it finds: activations, gradients."""
        if self.device.type != "cuda":
            step()
            return 0
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held

    def _graphs(self, sides: _Sides) -> dict[str, timing.Call]:
        """Replays of the steps; they share one memory, for two of these networks do not fit."""
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        replays: dict[str, timing.Call] = {}
        for name, step in sides.steps.items():
            try:
                replays[name] = _captured(step, pool)
            except Exception as error:
                sides.fails(name, error)
        return replays

    def _row(
        self, which: str, name: str, timed: Mapping[str, timing.Timing], sides: _Sides
    ) -> dict[str, Any]:
        # of equal weights; later losses drift apart as any two roundings do
        loss, expected = sides.losses.get(name, math.nan), sides.losses[TORCH]
        close = abs(loss - expected) <= _ROUNDING * abs(expected)
        failure = sides.failures.get(name, "")
        if name in sides.losses and not close:
            failure = f"first loss {loss}, torch's {expected}"
        row: dict[str, Any] = {
            # of a row that is ours readers ask whose network it was
            "op": "resnet50_fused" if name == FUSED else "resnet50",
            "name": EAGER,
            "shape": list(self.images.shape),
            "dtype": "bfloat16",
            "layout": "channels_last",
            "pass": which,
            "implementation": OURS if name == FUSED else name,
            "baseline": "" if name == TORCH else TORCH,
            "median_us": None,
            "speedup": None,
            "verified": not failure,
            "failure": failure,
        }
        if which == EAGER:
            row["first_loss"] = None if math.isnan(loss) else loss
            row["peak_bytes"] = sides.peaks.get(name)
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


def _differs(update: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is wrong with a first update, "" for nothing."""
    if update.keys() != expected.keys():
        return "a first update of other parameters than torch's"
    both = [torch.cat([one.flatten() for one in of.values()]) for of in (update, expected)]
    checks = [("all parameters", both[0], both[1], *_ALL)]
    checks += [(name, update[name], one, *_EACH) for name, one in expected.items()]
    for name, one, other, least, factor in checks:
        length, torchs = float(one.norm()), float(other.norm())
        along = float((one * other).sum()) / max(length * torchs, 1e-30)
        if not (along >= least and torchs <= factor * length <= factor**2 * torchs):
            return (
                f"first update of {name} of length {length:.3g}, torch's {torchs:.3g}, "
                f"and a cosine of {along:.3g}"
            )
    return ""


def _captured(step: Step, pool: Any) -> timing.Call:
    """The step as a CUDA graph, which trains the same network on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # what is made for a tensor when it is first seen on a stream cannot be captured
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    timing.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        loss = step()
    before = _replayed(graph, loss)
    after = _replayed(graph, loss)
    # a step that was captured without its optimizer, or without the forward pass, stands still
    if not math.isfinite(after) or before == after:
        raise RuntimeError(f"the graph of a step has loss {before}, and then {after}")
    return graph.replay


def _replayed(graph: torch.cuda.CUDAGraph, loss: Tensor) -> float:
    graph.replay()
    timing.synchronize()
    return float(loss)
