"""The network that `tritorch train` trains, its twins, and what a training step of one costs."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

import tritorch

_WEIGHT_DECAY = 1e-2
# steps that are not timed: compilation, allocation, caches
_WARM_UP = 5
_TIMED = 20


@dataclass(frozen=True)
class Settings:
    """What a run depends on.  `lr` falls linearly to zero; `replay_steps` is how many to replay."""

    epochs: int = 12
    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    seed: int = 0
    dtype: torch.dtype = torch.float32
    replay_steps: int = 3


@dataclass(frozen=True)
class Cost:
    """Of one training step: quartiles of its time in microseconds, and memory in bytes.

    Memory is the parameters, buffers and momentum, and what the step adds to them: at its peak on a
    GPU; on a CPU the gradients and what is kept for the backward pass.
    """

    low_us: float
    median_us: float
    high_us: float
    memory: int


class Lenet8(Module):
    """Eight layers of torch.nn for images of 8 by 8 pixels, after LeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.relu1 = torch.nn.ReLU()
        self.pool = torch.nn.MaxPool2d(2)
        self.conv2 = torch.nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(32)
        self.relu2 = torch.nn.ReLU()
        self.linear = torch.nn.Linear(32 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(images))))
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class Twin:
    """A model, its loss and its optimizer: torch.nn's, or tritorch's."""

    def __init__(self, model: Module, settings: Settings, *, converted: bool = False) -> None:
        self.model = copy.deepcopy(model)
        if converted:
            tritorch.convert(self.model, inplace=True)
        layers, optimizers = (tritorch.nn, tritorch.optim) if converted else (torch.nn, torch.optim)
        self.loss = layers.CrossEntropyLoss()
        self.optimizer = optimizers.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=_WEIGHT_DECAY,
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The digit that each image shows, by running statistics."""
        self.model.eval()
        classes: Tensor = self.model(images).argmax(1)
        self.model.train()
        return classes


class NoiseTwin(Twin):
    """A torch.nn twin with more rounding error than any float32 training."""

    def __init__(self, model: Module, settings: Settings, lost_bits: int) -> None:
        super().__init__(model, settings)
        self._factor = 2.0**lost_bits + 1

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = super().step(images.flip(0), labels.flip(0))
        with torch.no_grad():
            for parameter in self.model.parameters():
                # Veltkamp's splitting: rounds to the upper bits
                scaled = parameter * self._factor
                parameter.copy_(scaled - (scaled - parameter))
        return loss


def costs(twins: list[Twin], images: Tensor, labels: Tensor) -> list[Cost]:
    """Of one step of each twin on these digits, the twins in turn."""
    used = _memory_on_gpu if images.is_cuda else _memory
    taken = _microseconds_on_gpu if images.is_cuda else _microseconds
    memory = [used(twin, images, labels) for twin in twins]
    times: list[list[float]] = [[] for _ in twins]
    for repeat in range(_WARM_UP + _TIMED):
        # each of them first as often as last
        for index in (range(len(twins)), reversed(range(len(twins))))[repeat % 2]:
            microseconds = taken(twins[index], images, labels)
            if repeat >= _WARM_UP:
                times[index].append(microseconds)
    found = []
    for of_twin, held in zip(times, memory, strict=True):
        low, median, high = statistics.quantiles(of_twin, n=4)
        found.append(Cost(low, median, high, held))
    return found


def _microseconds(twin: Twin, images: Tensor, labels: Tensor) -> float:
    start = time.perf_counter()
    twin.step(images, labels)
    return (time.perf_counter() - start) * 1e6


def _microseconds_on_gpu(twin: Twin, images: Tensor, labels: Tensor) -> float:
    """From the first launch of an idle GPU to the end of the last."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    twin.step(images, labels)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _memory(twin: Twin, images: Tensor, labels: Tensor) -> int:
    held = _state(twin)
    twin.optimizer.zero_grad()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        twin.step(images, labels)
    grads = [parameter.grad for parameter in twin.model.parameters()]
    return sum(held.values()) + sum(grad.nbytes for grad in grads if grad is not None)


def _memory_on_gpu(twin: Twin, images: Tensor, labels: Tensor) -> int:
    held = sum(_state(twin).values())
    twin.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    twin.step(images, labels)
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def _state(twin: Twin) -> dict[int, int]:
    """Bytes of what stays from step to step, by address."""
    tensors = [*twin.model.parameters(), *twin.model.buffers()]
    kept = [value for values in twin.optimizer.state.values() for value in values.values()]
    tensors += [value for value in kept if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
