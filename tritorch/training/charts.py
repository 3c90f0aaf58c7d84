"""Line and dot charts as inline SVG; colours come from the classes of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# in units of the drawing, which the page scales
_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 548, 10, 226
# of a logarithmic axis without any positive value
_NOTHING = (1e-9, 1e-6)


@dataclass(frozen=True)
class Series:
    """Values from x = 1 on; None and infinities are gaps.  `kind` is the class of the colour."""

    name: str
    kind: str
    values: Sequence[float | None]


def lines(
    title: str, x_name: str, series: Sequence[Series], *, log: bool = False, percent: bool = False
) -> str:
    """A figure with one line for each series; on a `log` axis zero lies at the bottom."""
    values = [
        value for one in series for value in one.values if value is not None and _is_number(value)
    ]
    low, high, ticks = _log_axis(values) if log else _linear_axis(values)
    count = max(len(one.values) for one in series)
    zero = log and any(value <= 0 for value in values)
    drawn = _axes(ticks, low, high, log, percent, zero) + _steps(count, x_name)
    for one in series:
        drawn += f'<path class="line {one.kind}" d="{_path(one.values, count, low, high, log)}"/>'
    keys = "".join(f'<span class="{one.kind}">{escape(one.name)}</span>' for one in series)
    return _figure(title, keys, drawn)


def dots(title: str, x_name: str, points: Sequence[tuple[str, float | None]]) -> str:
    """A figure with a dot for each share of a limit, which is a line at 1; None is beyond it."""
    values = [value for _, value in points if value is not None and _is_number(value)]
    high = max(1.25, *values) * 1.02 if values else 1.25
    drawn = _axes(_linear_axis([0.0, high])[2], 0.0, high, False, False)
    y = _y(1.0, 0.0, high, False)
    drawn += f'<path class="line limit" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
    for number, (name, value) in enumerate(points):
        x = _x(number, len(points))
        shown = high if not _is_number(value) else float(value or 0.0)
        text = "beyond the limit" if not _is_number(value) else f"{shown:.2f} of the limit"
        kind = "bad" if shown > 1 else "tritorch"
        drawn += (
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{_y(shown, 0.0, high, False):.1f}" r="3">'
            f"<title>{escape(name)}: {text}</title></circle>"
        )
    drawn += _label((_LEFT + _RIGHT) / 2, _HEIGHT - 6, escape(x_name), "middle")
    keys = '<span class="limit">limit</span><span class="tritorch">one tensor</span>'
    return _figure(title, keys, drawn)


def _figure(title: str, keys: str, drawn: str) -> str:
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{drawn}</svg></figure>"
    )


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _linear_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [step * i for i in range(first, last + 1)]


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    positive = [value for value in values if value > 0] or list(_NOTHING)
    first = math.floor(math.log10(min(positive)))
    last = max(math.ceil(math.log10(max(positive))), first + 1)
    # the lowest decade is for zero
    if any(value <= 0 for value in values):
        first -= 1
    step = max(1, round((last - first) / 5))
    return 10.0**first, 10.0**last, [10.0**i for i in range(last, first - 1, -step)]


def _x(index: int, count: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * index / max(count - 1, 1)


def _y(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = (math.log10(max(v, low)) for v in (value, low, high))
    return _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low)


def _path(values: Sequence[float | None], count: int, low: float, high: float, log: bool) -> str:
    path, pen = "", "M"
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        path += f"{pen}{_x(index, count):.1f} {_y(value, low, high, log):.1f}"
        pen = "L"
    return path


def _axes(
    ticks: Sequence[float], low: float, high: float, log: bool, percent: bool, zero: bool = False
) -> str:
    """Grid and labels; `zero`: the lowest value of a logarithmic axis stands for zero."""
    drawn = ""
    if zero:
        ticks = [*(tick for tick in ticks if tick > 2 * low), low]
    for tick in ticks:
        y = _y(tick, low, high, log)
        text = f"{tick:.0%}" if percent else f"{tick:.0e}" if log else f"{tick:g}"
        if zero and tick == low:
            text = "0"
        drawn += f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
        drawn += _label(_LEFT - 6, y + 4, text, "end")
    return drawn


def _steps(count: int, x_name: str) -> str:
    _, _, ticks = _linear_axis([1.0, float(count)])
    drawn = _label((_LEFT + _RIGHT) / 2, _HEIGHT - 6, escape(x_name), "middle")
    for tick in {1, *map(int, ticks)}:
        if 1 <= tick <= count:
            drawn += _label(_x(tick - 1, count), _BOTTOM + 15, str(tick), "middle")
    return drawn


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
