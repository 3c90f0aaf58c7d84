"""The pictures of a result: roofline, speed-ups, and how times grow with sizes; by matplotlib.

Colours and backgrounds suit light and dark pages; nothing is fetched from anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tritorch.bench.ceilings import Ceilings, of_rows

Row = dict[str, Any]

_INK, _GRID = "#68727d", "#8a94a044"
_COLOURS = ("#1f6feb", "#e8702a", "#2da44e", "#8957e5", "#bf3989", "#9a6700")
_MARKERS = "osD^vPX"
# bars and panels that a picture can hold
_BARS, _PANELS = 40, 12


def figures(rows: Sequence[Row], calibration: Sequence[Row] = ()) -> Iterator[tuple[str, Any]]:
    """Title and matplotlib figure of each picture that these rows have something to show in.

    `calibration`: estimates beside what was measured, as `calibration` keeps them.
    """
    timed = [row for row in rows if row.get("median_us") and row.get("section") != "ceilings"]
    ceilings = of_rows(rows)
    fast = [row for row in timed if row.get("speedup")]
    if fast:
        yield "Speed-up over torch", _speedups(fast)
    worked = [row for row in timed if row.get("tflops") and row.get("gbps")]
    if worked and ceilings is not None and ceilings.rates:
        yield "Roofline", _roofline(worked, ceilings)
    lines = _lines(timed)
    if lines:
        yield (
            "Time against the least that the ceilings allow, which is the dashed line",
            _scaling(lines),
        )

    if calibration:
        yield (
            "Static estimates (not measurements) against what was measured",
            _estimates(calibration),
        )


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each implementation, the same in every picture."""
    names = dict.fromkeys(str(row["implementation"]) for row in rows)
    # torch's is the second, whatever comes first
    ordered = [name for name in names if name != "torch"]
    ordered.insert(1, "torch")
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(ordered)}


def svg(figure: Any) -> str:
    """The figure as an <svg> element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight")
    found = text.getvalue()
    return found[found.index("<svg") :]


def png(rows: Sequence[Row], path: Any, calibration: Sequence[Row] = ()) -> None:
    """All pictures, one below the other, in one file."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    images = []
    for title, figure in figures(rows, calibration):
        figure.suptitle(title, color="#1c2127", fontsize=13, x=0.02, ha="left")
        figure.set_facecolor("white")
        figure.set_dpi(150)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(np.asarray(canvas.buffer_rgba()))
    if not images:
        raise ValueError("there is nothing to draw: no row has a time and a baseline")
    width = max(image.shape[1] for image in images)
    padded = [
        np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255)
        for image in images
    ]
    import matplotlib.image

    matplotlib.image.imsave(path, np.concatenate(padded), format="png")


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_facecolor("none")
        one.tick_params(colors=_INK, labelsize=8, which="both")
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            one.spines[side].set_color(_GRID)
        one.xaxis.label.set_color(_INK)
        one.yaxis.label.set_color(_INK)
        one.set_axisbelow(True)
    return figure, axes


def _speedups(rows: Sequence[Row]) -> Any:
    """Bars from 1: to the right faster than torch, to the left slower."""
    import math

    shown = list(rows)
    if len(shown) > _BARS:
        # of so many the best and the worst tell most
        ordered = sorted(shown, key=lambda row: row["speedup"])
        shown = ordered[: _BARS // 2] + ordered[-_BARS // 2 :]
    shown.sort(key=lambda row: row["speedup"])
    colour = colours(rows)
    figure, axes = _axes(9.2, 0.8 + 0.2 * len(shown))
    axis = axes[0, 0]
    values = [math.log2(row["speedup"]) for row in shown]
    axis.barh(
        range(len(shown)),
        values,
        height=0.66,
        color=[colour[str(row["implementation"])] for row in shown],
        alpha=0.9,
    )
    for number, (row, value) in enumerate(zip(shown, values, strict=True)):
        low, high = (math.log2(end) for end in row.get("speedup_interval") or [row["speedup"]] * 2)
        axis.plot([low, high], [number, number], color=_INK, linewidth=1, alpha=0.8)
        axis.text(
            max(value, high) + 0.03 if value >= 0 else min(value, low) - 0.03,
            number,
            f" {row['speedup']:.2f}x ",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=7,
            color=_INK,
        )
    axis.axvline(0, color=_INK, linewidth=1)
    axis.set_yticks(range(len(shown)), [_label(row) for row in shown])
    axis.grid(axis="x", color=_GRID)
    left, right = min(-0.3, *values) - 0.7, max(0.6, *values) + 0.7
    axis.set_xlim(left, right)
    ticks = [t for t in range(-8, 9) if left <= t <= right]
    axis.set_xticks(ticks, [f"{2.0**t:g}x" for t in ticks])
    _keys(axis, colour, {str(row["implementation"]) for row in shown})
    return figure


def _label(row: Row) -> str:
    name = f"{row['op']} {row['name']}".strip()
    return f"{name[:40]}, {row['pass']}"


def _keys(axis: Any, colour: Mapping[str, str], names: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=value, marker="o", linestyle="", markersize=5, label=name)
        for name, value in colour.items()
        if name in names
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8, labelcolor=_INK, loc="best")


def _roofline(rows: Sequence[Row], ceilings: Ceilings) -> Any:
    """Operations a second against operations per byte, under the ceilings of the same run."""
    import numpy as np

    colour = colours(rows)
    figure, axes = _axes(7.6, 4.2)
    axis = axes[0, 0]
    xs = [row["tflops"] * 1e3 / row["gbps"] for row in rows]
    low, high = min(*xs, 0.1) / 2, max(*xs, 1000.0) * 2
    grid = np.geomspace(low, high, 200)
    top = max(ceilings.rates.values())
    used = {row["dtype"] for row in rows}
    for name, rate in ceilings.rates.items():
        if name not in used and rate != top:
            continue
        roof = np.minimum(rate, grid * ceilings.bandwidth) / 1e12
        axis.plot(grid, roof, color=_INK, linewidth=1.2, alpha=0.9)
        axis.text(high, rate / 1e12 * 1.08, name, ha="right", fontsize=8, color=_INK)
    axis.text(
        low * 1.2,
        low * 1.6 * ceilings.bandwidth / 1e12,
        f"{ceilings.bandwidth / 1e9:,.0f} GB/s",
        fontsize=8,
        color=_INK,
        rotation=30,
        rotation_mode="anchor",
    )
    for name, value in reversed(colour.items()):
        some = [(x, row["tflops"]) for x, row in zip(xs, rows, strict=True)
                if row["implementation"] == name]  # fmt: skip
        if some:
            axis.scatter(*zip(*some, strict=True), s=18, color=value, alpha=0.75, linewidths=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_xlabel("operations per byte of the least traffic", fontsize=8)
    axis.set_ylabel("TFLOP/s", fontsize=8)
    axis.grid(color=_GRID)
    _keys(axis, colour, {str(row["implementation"]) for row in rows})
    return figure


def _lines(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[tuple[float, float]]]]:
    """Points by op and pass, then by implementation, where there are three sizes or more."""
    groups: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.get("roofline") and not str(row["pass"]).startswith("host"):
            # the least time of its work by the ceilings of the run: bytes say little of products
            size = float(f"{row['roofline'] * row['median_us']:.4g}")
            group = groups.setdefault((str(row["op"]), str(row["pass"])), {})
            group.setdefault(str(row["implementation"]), []).append((size, row["median_us"]))
    wide = {
        name: lines
        for name, lines in groups.items()
        if max(len({size for size, _ in points}) for points in lines.values()) >= 3
    }
    return dict(list(wide.items())[:_PANELS])


def _scaling(groups: Mapping[tuple[str, str], Mapping[str, list[tuple[float, float]]]]) -> Any:
    """A panel for each op and pass: the time against the least time that the ceilings allow."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    named = [{"implementation": name} for lines in groups.values() for name in lines]
    colour = colours(named)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = _axes(max(4.6, 3.1 * columns), 2.5 * lines, lines, columns)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, ((op, which), sides) in zip(axes.flat, groups.items(), strict=False):
        for name, points in reversed(list(sides.items())):
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, color=colour[name], linewidth=1.2, alpha=0.45)
            axis.scatter(xs, ys, color=colour[name], s=11, linewidths=0)
        ends = [min(min(x) for x in sides.values())[0], max(max(x) for x in sides.values())[0]]
        axis.plot(ends, ends, color=_INK, linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
            side.set_major_formatter(EngFormatter(sep=""))
            side.set_minor_locator(NullLocator())
        axis.set_title(f"{op}, {which}", fontsize=8, color=_INK)
        axis.grid(color=_GRID)
        axis.set_xlabel("least microseconds", fontsize=7)
        axis.set_ylabel("microseconds", fontsize=7)
    _keys(axes.flat[0], colour, {str(one["implementation"]) for one in named})
    return figure


def _estimates(calibration: Sequence[Row]) -> Any:
    """A point for each row, by kind of op; the band is a fifth too long or too short."""
    kinds = sorted({str(row["op"]) for row in calibration})
    figure, axes = _axes(7.6, 4.2)
    axis = axes[0, 0]
    for number, kind in enumerate(kinds):
        some = [row for row in calibration if row["op"] == kind]
        axis.scatter(
            [row["measured_us"] for row in some],
            [row["estimated_us"] for row in some],
            s=16,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number // len(_COLOURS) % len(_MARKERS)],
            alpha=0.75,
            linewidths=0,
            label=kind,
        )
    times = [row["measured_us"] for row in calibration]
    ends = [min(times) / 1.3, max(times) * 1.3]
    axis.plot(ends, ends, color=_INK, linewidth=1, linestyle="--")
    axis.fill_between(ends, [end / 1.2 for end in ends], [end * 1.2 for end in ends],
                      color=_GRID, linewidth=0)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("measured, microseconds", fontsize=8)
    axis.set_ylabel("estimated, microseconds", fontsize=8)
    axis.grid(color=_GRID)
    axis.legend(frameon=False, fontsize=6, labelcolor=_INK, loc="center left",
                bbox_to_anchor=(1.0, 0.5), ncols=1 + len(kinds) // 24)  # fmt: skip
    return figure
