"""Whether one result is faster than another, row by row, and how sure that is.

The ratio of two medians has the interval that resampling gives: rounds first, then samples within
rounds, because samples of one round are not independent.  Over all rows the chance of a false
alarm is held down by Holm's correction.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tritorch.bench import intervals, peers
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import TORCH
from tritorch.bench.environment import SCHEMA
from tritorch.bench.intervals import Interval
from tritorch.bench.rows import key

_Row = Mapping[str, Any]
Verdict = Literal["FASTER", "SLOWER", "SAME", "UNSURE", "WRONG"]

THRESHOLD = 0.03
# fields without which a row cannot be identified
_FIELDS = ("op", "shape", "pass", "implementation", "median_us", "verified")
# of all rows together
_ALPHA = 0.05
_RESAMPLES = 600
# what a median is uncertain by at least, because clocks tick and rounds repeat
_LEAST = 1e-3
_Z = 1.959964
# by how much clocks of equal speed differ at most
_CLOCKS = 0.05
# what stands beside a kernel to be compared with; the ceilings are torch's
_OTHERS = frozenset({TORCH, COMPILED, *peers.NAMES})
# rounds of which Student's t is a normal distribution
_MANY = 100


class NoResult(ValueError):
    """A file that is no result of a benchmark, or of another schema."""


@dataclass(frozen=True)
class Comparison:
    """One row in both results.

    `ratio`: the new time over the old one, above 1 is slower.  `chance`: of a difference as large
    where there is none, corrected for the number of rows.  WRONG: not verified in one of them.
    """

    row: Mapping[str, Any]
    old_us: float | None
    new_us: float | None
    ratio: Interval | None
    chance: float
    verdict: Verdict
    why: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the row is tritorch's or the user's, and not torch's, a ceiling's or a peer's."""
        return self.row["implementation"] not in _OTHERS


@dataclass(frozen=True)
class Report:
    """All rows, `geomean` over those of ours that can be compared, and what else differs.

    `control`: the same over torch's rows, for which only the machine can have changed.
    """

    rows: tuple[Comparison, ...]
    geomean: Interval | None
    control: Interval | None = None
    environment: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_old: tuple[str, ...] = ()
    only_new: tuple[str, ...] = ()

    def count(self, verdict: Verdict) -> int:
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def ours(self) -> tuple[Comparison, ...]:
        return tuple(one for one in self.rows if one.is_ours)


def read(path: Path) -> dict[str, Any]:
    """A result file; raises NoResult, which says what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NoResult(f"{path}: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise NoResult(f"{path} is no result of a benchmark: it has no rows")
    if result.get("schema") != SCHEMA:
        raise NoResult(f"{path} has schema {result.get('schema')}, this tritorch reads {SCHEMA}")
    for row in result["rows"]:
        lacks = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
        if lacks:
            kind = result.get("kind")
            raise NoResult(f"{path} is of kind {kind}, whose rows have no {', '.join(lacks)}")
    if not isinstance(result.get("environment"), dict):
        raise NoResult(f"{path} is no result of a benchmark: it has no environment")
    return result


def compare(old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = THRESHOLD) -> Report:
    """Compares two results, the contents of their files.

    FASTER and SLOWER: surely different, by more than `threshold`.  SAME: surely within it.
    UNSURE: neither; or the GPU was throttled, waited for the host, or had another clock; or there
    are no samples to tell by.
    """
    before, after = _by_call(old["rows"], new["rows"])
    shared = [name for name in before if name in after]
    ratios = [_ratio(before[name], after[name]) for name in shared]
    chances = iter(_holm([ratio.chance for ratio in ratios if ratio is not None]))
    found = []
    for name, ratio in zip(shared, ratios, strict=True):
        chance = 1.0 if ratio is None else next(chances)
        interval = None if ratio is None else ratio.interval
        found.append(_judged(before[name], after[name], interval, chance, threshold))
    return Report(
        rows=tuple(sorted(found, key=_order)),
        geomean=_mean(one for one in found if one.is_ours),
        control=_mean(one for one in found if one.row["implementation"] == TORCH),
        environment=_differences(old.get("environment", {}), new.get("environment", {})),
        only_old=tuple(_name(before[name]) for name in before if name not in after),
        only_new=tuple(_name(after[name]) for name in after if name not in before),
    )


def _by_call(*results: Sequence[Mapping[str, Any]]) -> list[dict[tuple[str, ...], _Row]]:
    """Of each result what was measured, and what could not be because it is wrong."""
    found = [
        [row for row in rows if row.get("median_us") is not None or not row.get("verified")]
        for rows in results
    ]
    # old results do not say the arguments: what is like their rows is told by its shape alone
    untold = {key(row) for rows in found for row in rows if row.get("arguments") is None}
    # with two it is unknown which one it was
    for rows in found:
        untold -= {name for name, count in Counter(map(_short, rows)).items() if count > 1}

    def call(row: _Row) -> tuple[str, ...]:
        return short if (short := _short(row)) in untold else key(row)

    return [{call(row): row for row in rows} for rows in found]


def _short(row: _Row) -> tuple[str, ...]:
    return key({**row, "arguments": None})


def _mean(found: Iterable[Comparison]) -> Interval | None:
    ratios = [one.ratio.value for one in found if one.ratio is not None]
    return intervals.geometric_mean(ratios) if ratios else None


def _order(row: Comparison) -> float:
    if row.ratio is not None:
        return -row.ratio.value
    return -math.inf if row.verdict == "WRONG" else 0.0


def _name(row: Mapping[str, Any]) -> str:
    call = "arguments" if row.get("arguments") else "shape"
    names = ("op", "name", call, "pass", "implementation")
    return " ".join(str(row[name]) for name in names if row.get(name) not in (None, ""))


class _Ratio(NamedTuple):
    """A ratio, and the chance of one so far from 1 where there is no difference."""

    interval: Interval
    chance: float


def _ratio(old: Mapping[str, Any], new: Mapping[str, Any]) -> _Ratio | None:
    """New over old; None where one of them was not verified, or has no spread."""
    if not (old.get("verified") and new.get("verified")):
        return None
    draw = np.random.default_rng(0)
    found = [spread for row in (old, new) if (spread := _spread(row, draw)) is not None]
    if len(found) < 2:
        return None
    spreads, rounds = zip(*found, strict=True)
    value = math.log(new["median_us"] / old["median_us"])
    error = max(math.hypot(*spreads), _LEAST)
    freedom = sum(rounds) - len(rounds)
    reach = error * _quantile(freedom)
    ends = (math.exp(end) for end in (value, value - reach, value + reach))
    return _Ratio(Interval(*ends), _beyond(abs(value) / error, freedom))


def _spread(row: Mapping[str, Any], draw: np.random.Generator) -> tuple[float, int] | None:
    """The standard error of the logarithm of a median, and the number of rounds it comes from.

    None of a row that is a number and nothing else.
    """
    rounds = [np.asarray(one, dtype=float) for one in row.get("samples_us") or [] if one]
    if len(rounds) < 2:
        # an old result without samples: as sure as its interval says
        if not row.get("interval_us"):
            return None
        low, high = row["interval_us"]
        return (math.log(high) - math.log(low)) / (2 * _Z), _MANY
    count = min(len(one) for one in rounds)
    table = np.stack([one[:count] for one in rounds])
    which = draw.integers(len(rounds), size=(_RESAMPLES, len(rounds)))
    within = draw.integers(count, size=(_RESAMPLES, len(rounds), count))
    sampled = table[which[:, :, None], within].reshape(_RESAMPLES, -1)
    spread = float(np.log(np.median(sampled, axis=1)).std())
    # of few rounds resampling sees too little
    return spread * math.sqrt(len(rounds) / (len(rounds) - 1)), len(rounds)


def _beyond(t: float, freedom: int) -> float:
    """The chance that Student's t is farther from zero than this, on either side.

    Source: Abramowitz and Stegun, Handbook of mathematical functions, 26.7.3 and 26.7.4.
    """
    if freedom >= _MANY:
        return math.erfc(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if freedom % 2:
        term = cosine
        for n in range(1, freedom, 2):
            total += term
            term *= cosine**2 * (n + 1) / (n + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        for n in range(0, freedom, 2):
            total += term
            term *= cosine**2 * (n + 1) / (n + 2)
        inside = sine * total
    return max(0.0, 1 - inside)


@functools.cache
def _quantile(freedom: int) -> float:
    """Where Student's t has 2.5 % on either side."""
    low, high = _Z, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _beyond(middle, freedom) > _ALPHA else (low, middle)
    return high


def _holm(chances: Sequence[float]) -> list[float]:
    """Each multiplied by the number of chances that are not smaller, and never decreasing."""
    corrected, worst = [1.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[index]))
        corrected[index] = worst
    return corrected


def _judged(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    ratio: Interval | None,
    chance: float,
    threshold: float,
) -> Comparison:
    sides = {"old": old, "new": new}
    verdict: Verdict = "UNSURE"
    why = ""
    if wrong := [name for name, row in sides.items() if not row.get("verified")]:
        verdict = "WRONG"
        why = "; ".join(f"{n}: {sides[n].get('failure') or 'not verified'}" for n in wrong)
    elif ratio is None:
        why = "nobody knows how sure these times are: there are no samples"
    elif slowed := [name for name, row in sides.items() if row.get("throttled")]:
        why = f"the GPU was throttled: {', '.join(slowed)}"
    elif bound := [name for name, row in sides.items() if row.get("host_bound")]:
        why = f"the GPU waited for the host: {', '.join(bound)}"
    elif other := _other_clocks(old, new):
        why = other
    else:
        beyond = abs(math.log(ratio.value)) > math.log1p(threshold)
        if chance < _ALPHA and beyond:
            verdict = "SLOWER" if ratio.value > 1 else "FASTER"
        elif _within(ratio, threshold):
            verdict = "SAME"
    times = old.get("median_us"), new.get("median_us")
    return Comparison(new, *times, ratio, chance, verdict, why)


def _other_clocks(old: _Row, new: _Row) -> str:
    """What the GPU's clocks were, where they explain a difference; "" where not, or not known."""
    if not (old.get("clock_mhz") and new.get("clock_mhz")):
        return ""
    # the highest: a power cap lowers the others, of what draws more power first
    then, now = max(old["clock_mhz"]), max(new["clock_mhz"])
    if max(then, now) <= (1 + _CLOCKS) * min(then, now):
        return ""
    return f"the GPU's clock was at {then:.0f} MHz, then at {now:.0f}"


def _within(ratio: Interval, threshold: float) -> bool:
    return ratio.low > 1 / (1 + threshold) and ratio.high < 1 + threshold


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two environments, the date excepted."""
    then, now = dict(_flat(old)), dict(_flat(new))
    names = [name for name in {**then, **now} if name != "date"]
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def _flat(environment: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{name}.")
        else:
            found.append((f"{above}{name}", value))
    return found
