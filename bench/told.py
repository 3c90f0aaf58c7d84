"""What a run on a GPU prints of its rows: a line for each, and sums at its end."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

from tritorch.bench import plots, reports
from tritorch.bench.store import Store


def line(row: dict[str, Any]) -> str:
    """What is known of a row as soon as it is measured."""

    def number(name: str) -> str:
        value = row.get(name)
        return "-" if value is None else f"{value:.4g}"

    what = f"{row['op']} {row['name']} {row['shape']} {row['pass']} {row['implementation']}"
    times = f"{number('median_us')} us, torch {number('baseline_us')}, {number('speedup')}x"
    wrong = "" if row["verified"] else f" NOT VERIFIED: {row.get('failure')}"
    torchs = f" FALLBACK: {row['fallbacks']}" if row.get("fallbacks") else ""
    slow = f" THROTTLED: {', '.join(row['throttled'])}" if row.get("throttled") else ""
    return f"{what}: {times}, roofline {number('roofline')}{wrong}{slow}{torchs}"


def summary(store: Store) -> None:
    """Prints how many rows there are of each section, and how fast they are together."""
    measured = Counter(row.get("section", "") for row in store.rows)
    wrong = Counter(row.get("section", "") for row in store.rows if not row["verified"])
    skipped = Counter(one["section"] for one in store.skipped)
    for section in [*measured, *(set(skipped) - set(measured))]:
        print(
            f"{section or '-'}: {measured[section]} rows, {wrong[section]} not verified, "
            f"{skipped[section]} skipped"
        )
    for text in (*totals(store.rows), *costs(store.rows)):
        print(text)
    print(f"rows: {store.path}")


def totals(found: list[dict[str, Any]]) -> list[str]:
    """For each op and pass: torch's time over ours, all shapes as often as they occur."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        if row.get("speedup"):
            which = ("section", "op", "pass", "implementation")
            groups.setdefault(tuple(str(row.get(name)) for name in which), []).append(row)
    lines = []
    for names, group in groups.items():
        if names[0] == "layers":
            # one shape each, which has had its line
            continue
        ours, torchs = (
            sum(row.get("count", 1) * row[key] for row in group)
            for key in ("median_us", "baseline_us")
        )
        weakest = min(group, key=lambda row: row["speedup"])
        lines.append(
            f"{' '.join(names)}: {len(group)} shapes, {torchs / ours:.3f}x of torch, weakest "
            f"{weakest['speedup']:.3f}x {weakest['name']} {weakest['shape']}"
        )
    return lines


def costs(found: list[dict[str, Any]]) -> list[str]:
    """What each measure of the section `details` took."""
    taken: dict[str, list[float]] = {}
    for row in found:
        for name, seconds in row.get("details_seconds", {}).items():
            taken.setdefault(name, []).append(seconds)
    lines = []
    for name, some in taken.items():
        total = sum(some)
        each = 1e3 * total / len(some)
        lines.append(f"details {name}: {len(some)} rows, {total:.1f} s, {each:.0f} ms each")
    return lines


def pictures(store: Store) -> None:
    """Writes a page and a picture beside the result, as far as this machine can draw."""
    if store.path is None or not store.rows:
        return
    result = store.content()
    page = store.path.with_suffix(".html")
    page.write_text(reports.page(result), encoding="utf-8")
    print(f"page: {page}")
    if importlib.util.find_spec("matplotlib") is None:
        print("skipped: pictures: matplotlib is not installed")
    elif any(True for _ in plots.figures(store.rows)):
        picture = store.path.with_suffix(".png")
        plots.png(store.rows, picture, result.get("calibration", ()))
        print(f"picture: {picture}")
