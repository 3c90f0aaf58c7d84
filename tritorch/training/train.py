"""Trains a converted network beside its torch.nn twin and decides whether the two agree.

Both start from the same weights and see the same batches of real handwritten digits.  Where there
is no GPU the tritorch twin trains on the reference path, and some of its steps are taken a second
time through the kernels, in Triton's corrected interpreter (`tritorch.training.replay`).

**When two trainings agree.**  Rounding alone drives them apart: once one activation falls on the
other side of a ReLU, the gap between the losses grows a thousandfold within a few steps.  So the
gap is measured against that of more torch.nn twins, which see each batch in reverse order and keep
their parameters to 18 and 17 significant bits instead of 24.  Let gap(t) be the largest difference
between the losses of tritorch and torch.nn up to step t, noise(t) the largest one between those
twins and torch.nn, and u the unit roundoff.  The trainings agree if, at every step t,

    gap(t) <= 3 noise(t) + 8 u max(loss up to t),

if the final accuracies on the test digits differ by at most one digit, and if every tensor of every
replayed step is accepted.  Twins that differ in the order of summation alone would not do as a
yardstick: such an activation comes early in one training and late in another, so a correct one
would often be refused.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tritorch
from tritorch import backend
from tritorch.data import Digits, split
from tritorch.testing.tolerances import unit_roundoff
from tritorch.training.replay import Check, replay
from tritorch.training.twins import Cost, Lenet8, NoiseTwin, Settings, Twin, costs

# significant bits that the noise twins' parameters lose
_LOST_BITS = (6, 7)
_MARGIN = 3.0
_FLOOR = 8.0
# what a run as long as the default one must reach on the test digits
REQUIRED_ACCURACY = 0.98
REQUIRED_FROM_EPOCHS = 12


@dataclass(frozen=True)
class Setup:
    """What is trained on what: numbers of parameters, of layers, and of digits."""

    parameters: int
    layers: int
    layers_converted: int
    digits_train: int
    digits_test: int


@dataclass(frozen=True)
class Epoch:
    """One pass over the training digits.

    Mean loss of each twin; the largest `gap` between their losses, and between torch.nn's and the
    noise twins' (`noise`), within the epoch; share of the test digits named right after it.
    """

    number: int
    loss_torch: float
    loss_tritorch: float
    gap: float
    noise: float
    accuracy_torch: float
    accuracy_tritorch: float


@dataclass(frozen=True)
class Curves:
    """Per step: loss of each twin, and gap, noise and limit of the module's text."""

    loss_torch: list[float]
    loss_tritorch: list[float]
    gap: list[float]
    noise: list[float]
    limit: list[float]

    @property
    def share_of_limit(self) -> float:
        """The largest gap in units of its limit; infinite if either is no number."""
        shares = [
            gap / limit if math.isfinite(gap) and math.isfinite(limit) else math.inf
            for gap, limit in zip(self.gap, self.limit, strict=True)
        ]
        return max(shares)


@dataclass(frozen=True)
class Result:
    """What a run found; `failures` says in words why the twins do not agree, empty if they do."""

    settings: Settings
    device: torch.device
    kernels: bool
    setup: Setup
    epochs: list[Epoch]
    curves: Curves
    differing: int
    replays: dict[int, list[Check]]
    cost_torch: Cost
    cost_tritorch: Cost
    fallbacks: dict[str, dict[str, int]]
    seconds: float
    failures: list[str]


def run(
    settings: Settings,
    device: torch.device,
    *,
    kernels: bool | None = None,
    train: Digits | None = None,
    test: Digits | None = None,
    on_setup: Callable[[Setup], None] = lambda setup: None,
    on_step: Callable[[int, int, str], None] = lambda step, steps, doing: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Trains the twins and compares them.

    `kernels`: whether the kernels train the tritorch twin, where a call that they do not take is an
    error, or the reference path does; by default the kernels do on a GPU.  `train` and `test`
    default to all digits, split by the seed.  `on_setup` is called before the first step; `on_step`
    before each step with its number, how many there are and what is being done; `on_epoch` after
    each epoch.

    Raises:
        FallbackError: the kernels do not take a call.
    """
    start = time.perf_counter()
    kernels = device.type == "cuda" if kernels is None else kernels
    digits = split(settings.seed)
    train = _place(train or digits[0], settings.dtype, device)
    test = _place(test or digits[1], settings.dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Lenet8().to(device, settings.dtype)
    torchs, ours = Twin(model, settings), Twin(model, settings, converted=True)
    twins = [torchs, ours, *(NoiseTwin(model, settings, bits) for bits in _LOST_BITS)]
    report = tritorch.conversion_report(ours.model)
    setup = Setup(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=len(report.converted) + len(report.kept),
        layers_converted=len(report.converted),
        digits_train=len(train),
        digits_test=len(test),
    )
    on_setup(setup)
    backend.reset()

    with backend.use("triton" if kernels else "reference"), backend.strict():
        losses, epochs, replays = _train(twins, settings, train, test, on_step, on_epoch)
        differing = int((torchs.predict(test.images) != ours.predict(test.images)).sum())
        # copies: what a step keeps must not count all digits
        batch = [part[: settings.batch].clone() for part in (train.images, train.labels)]
        cost_torch, cost_tritorch = costs([torchs, ours], *batch)
    curves = curves_of(losses, settings.dtype)
    return Result(
        settings=settings,
        device=device,
        kernels=kernels,
        setup=setup,
        epochs=epochs,
        curves=curves,
        differing=differing,
        replays=replays,
        cost_torch=cost_torch,
        cost_tritorch=cost_tritorch,
        fallbacks=backend.explain(),
        seconds=time.perf_counter() - start,
        failures=_failures(settings, curves, epochs[-1], len(test), replays),
    )


def _place(digits: Digits, dtype: torch.dtype, device: torch.device) -> Digits:
    return Digits(digits.images.to(device, dtype), digits.labels.to(device))


def _train(
    twins: list[Twin],
    settings: Settings,
    train: Digits,
    test: Digits,
    on_step: Callable[[int, int, str], None],
    on_epoch: Callable[[Epoch], None],
) -> tuple[Tensor, list[Epoch], dict[int, list[Check]]]:
    """The losses, (twins, steps) in float64 on the CPU, the epochs, and the replays by step."""
    ours = twins[1]
    generator = torch.Generator().manual_seed(settings.seed)
    per_epoch = math.ceil(len(train) / settings.batch)
    steps = settings.epochs * per_epoch
    replayed = _spread(settings.replay_steps, steps)
    losses = torch.empty(len(twins), 0, dtype=torch.float64)
    epochs: list[Epoch] = []
    replays: dict[int, list[Check]] = {}
    for number in range(1, settings.epochs + 1):
        order = torch.randperm(len(train), generator=generator).to(train.labels.device)
        found: list[Tensor] = []
        for position, chosen in enumerate(order.split(settings.batch)):
            step = (number - 1) * per_epoch + position
            images, labels = train.images[chosen], train.labels[chosen]
            for twin in twins:
                twin.optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / steps)
            if step in replayed:
                on_step(step, steps, f"replaying step {step + 1} through the kernels")
                replays[step] = replay(ours.model, ours.loss, ours.optimizer, images, labels)
            on_step(step, steps, f"epoch {number} of {settings.epochs}")
            found.append(torch.stack([twin.step(images, labels) for twin in twins]))
        # one wait for the device an epoch
        new = torch.stack(found, 1).double().cpu()
        losses = torch.cat([losses, new], 1)
        gaps = _gaps(new).amax(1)
        right = [(twin.predict(test.images) == test.labels).double().mean() for twin in twins[:2]]
        epochs.append(
            Epoch(
                number,
                loss_torch=float(new[0].mean()),
                loss_tritorch=float(new[1].mean()),
                gap=float(gaps[0]),
                noise=float(gaps[1:].max()),
                accuracy_torch=float(right[0]),
                accuracy_tritorch=float(right[1]),
            )
        )
        on_epoch(epochs[-1])
    return losses, epochs, replays


def _spread(count: int, steps: int) -> set[int]:
    """`count` steps from the first, which alone has no momentum, to the last."""
    return {round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)}


def _gaps(losses: Tensor) -> Tensor:
    # a difference of two infinities says nothing
    return (losses[1:] - losses[0]).abs().nan_to_num(math.inf)


def curves_of(losses: Tensor, dtype: torch.dtype) -> Curves:
    """From the losses of torch.nn, tritorch and the noise twins: (twins, steps), float64."""
    gaps = _gaps(losses).cummax(1).values
    noise = gaps[1:].amax(0)
    limit = _MARGIN * noise + _FLOOR * unit_roundoff(dtype) * losses[0].cummax(0).values
    return Curves(*(values.tolist() for values in (losses[0], losses[1], gaps[0], noise, limit)))


def _failures(
    settings: Settings,
    curves: Curves,
    last: Epoch,
    digits: int,
    replays: dict[int, list[Check]],
) -> list[str]:
    failures = []
    for name, loss in (("torch.nn", curves.loss_torch), ("tritorch", curves.loss_tritorch)):
        if not all(map(math.isfinite, loss)):
            failures.append(f"the loss of {name} is not finite")
    for step, (gap, limit) in enumerate(zip(curves.gap, curves.limit, strict=True), 1):
        # not `gap > limit`: neither may be a number
        if not gap <= limit:
            failures.append(
                f"step {step}: the losses are {gap:.2g} apart, the limit is {limit:.2g}"
            )
            break
    apart = round(abs(last.accuracy_torch - last.accuracy_tritorch) * digits)
    if apart > 1:
        failures.append(f"the twins' accuracies are {apart} of {digits} test digits apart")
    if settings.epochs >= REQUIRED_FROM_EPOCHS and last.accuracy_tritorch < REQUIRED_ACCURACY:
        failures.append(
            f"tritorch names {last.accuracy_tritorch:.1%} of the test digits, "
            f"less than {REQUIRED_ACCURACY:.0%}"
        )
    failures += [
        f"step {step + 1}, {check.tensor}: {check.verdict.failure}"
        for step, checks in replays.items()
        for check in checks
        if not check.verdict.accepted
    ]
    return failures
