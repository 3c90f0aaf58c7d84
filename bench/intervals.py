"""Medians with confidence intervals, and whether one sample is larger than another."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# of a normal distribution, two-sided 95 %
_Z = 1.959964


class Interval(NamedTuple):
    """An estimate between the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def precision(self) -> float:
        """Half the interval's width over the estimate."""
        return (self.high - self.low) / 2 / self.value if self.value else math.inf


def median(samples: Sequence[float]) -> Interval:
    """The median and the order statistics that enclose it: no distribution is assumed.

    The interval of fewer than six samples is all they span, which is less than 95 % sure.
    """
    ordered = sorted(samples)
    count = len(ordered)
    reach = _Z * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def geometric_mean(ratios: Sequence[float], seed: int = 0) -> Interval:
    """Over rows, with the interval that resampling the rows gives."""
    logs = [math.log(ratio) for ratio in ratios]
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(1000))
    ends = means[25], means[974]
    return Interval(*(math.exp(mean) for mean in (statistics.fmean(logs), *ends)))
