"""A result as a table of Markdown, as comma-separated values, and as one page of HTML.

All three are made from the content of the result file, so that an old one can be looked at again.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from tritorch.bench import plots
from tritorch.bench.session import geometric_means

Result = Mapping[str, Any]

# metric, unit, and the field with the ends of its interval
_METRICS = (
    ("median_us", "us", "interval_us"),
    ("graph_us", "us", None),
    ("host_us", "us", None),
    ("speedup", "", "speedup_interval"),
    ("tflops", "TFLOP/s", None),
    ("gbps", "GB/s", None),
    ("roofline", "", None),
    ("headroom", "", None),
    ("peak_bytes", "bytes", None),
    ("first_seconds", "s", None),
    ("compile_seconds", "s", None),
    # of the kernels of a call the most, and of spills all
    ("registers", "", None),
    ("spills", "", None),
    ("shared_bytes", "bytes", None),
)
_WHAT = ("op", "name", "shape", "arguments", "dtype", "layout", "pass", "implementation")
_WHERE = ("gpu", "torch", "triton", "commit", "date")

DETAILS = (
    "op", "call", "pass", "implementation", "TFLOP/s", "GB/s", "CUDA graph, us", "host, us",
    "peak memory", "first call, s", "kernels",
)  # fmt: skip
HEADER = ("op", "call", "pass", "implementation", "time, us", "±", "x torch", "roofline", "checked")


def csv_text(result: Result) -> str:
    """One line for each number: what it is of, the metric, its value and its interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    where = result["environment"]
    fixed = [where.get(name) for name in _WHERE]
    writer.writerow(
        (*_WHAT, "baseline", "verified", "metric", "value", "low", "high", "unit", *_WHERE)
    )
    for row in result["rows"]:
        head = [_plain(row.get(name)) for name in (*_WHAT, "baseline", "verified")]
        row = {**row, **_most(row.get("kernels") or ())}
        for metric, unit, ends in _METRICS:
            if row.get(metric) is not None:
                low, high = (row.get(ends) if ends else None) or (None, None)
                writer.writerow([*head, metric, row[metric], low, high, unit, *fixed])
    return text.getvalue()


def _most(kernels: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    if not kernels:
        return {}
    return {
        "registers": max(one["registers"] for one in kernels),
        "spills": sum(one["spills"] for one in kernels),
        "shared_bytes": max(one["shared_bytes"] for one in kernels),
    }


def _plain(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list) else value


def line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as the cells of a table."""
    low, high = row.get("interval_us") or (None, None)
    us = row.get("median_us")
    spread = "" if not us or low is None else f"{50 * (high - low) / us:.1f} %"
    return (
        *_named(row),
        "" if us is None else number(us),
        spread,
        "" if row.get("speedup") is None else f"{row['speedup']:.2f}",
        "" if row.get("roofline") is None else f"{row['roofline']:.0%}",
        _checked(row),
    )


def details(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row has besides its time, as cells; all but the first four empty where it has none."""
    peak = row.get("peak_bytes")
    return (
        *_named(row),
        *(number(row[name]) if row.get(name) else "" for name in ("tflops", "gbps")),
        graph(row),
        "" if row.get("host_us") is None else number(row["host_us"]),
        "" if peak is None else f"{peak / 2**20:,.1f} MiB",
        "" if row.get("first_seconds") is None else f"{row['first_seconds']:.2f}",
        "; ".join(map(_kernel, row.get("kernels") or ())),
    )


def graph(row: Mapping[str, Any]) -> str:
    """The time in a CUDA graph, marked where the cache was warm: all other times are of a cold one.

    Empty where there is none.
    """
    if row.get("graph_us") is None:
        return ""
    return number(row["graph_us"]) + (" warm" if row.get("graph_cold") is False else "")


def _kernel(one: Mapping[str, Any]) -> str:
    parts = [f"{one['registers']} registers"]
    if one["spills"]:
        parts.append(f"{one['spills']} spilled")
    if one["shared_bytes"]:
        parts.append(f"{one['shared_bytes'] / 1024:.0f} KiB shared")
    parts.append(f"{one['num_warps']} warps")
    return f"{str(one['kernel']).removesuffix('_kernel')}: {', '.join(parts)}"


def _named(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    call = row.get("arguments") or str(row["shape"])
    call = f"{row['name']}: {call}" if row.get("name") else call
    return str(row["op"]), call, str(row["pass"]), str(row["implementation"])


def _detailed(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [cells for cells in map(details, rows) if any(cells[4:])]


def failure_of(row: Mapping[str, Any]) -> str:
    """Why a row was not verified; old results do not say it."""
    return row.get("failure") or "not verified"


def _checked(row: Mapping[str, Any]) -> str:
    if not row.get("verified"):
        return f"FAILED: {failure_of(row)}"
    headroom = row.get("headroom")
    said = [] if headroom is None else [f"error {headroom:.0%} of its limit"]
    if row.get("host_bound"):
        said.append("waited for the host")
    if row.get("throttled"):
        said.append(f"GPU throttled: {', '.join(row['throttled'])}")
    return "; ".join(said)


def number(value: float) -> str:
    """Four digits, of large numbers all."""
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def markdown(result: Result) -> str:
    """A table, and where it comes from."""
    rows = _measured(result)
    tables = [_markdown(HEADER, [line(row) for row in rows])]
    if detailed := _detailed(rows):
        tables.append(_markdown(DETAILS, detailed))
    return "\n".join([*tables, f"{_where(result)}\n"])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ("--",) * len(header), *rows]
    return "".join("| " + " | ".join(map(_cell, one)) + " |\n" for one in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _measured(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row.get("section") != "ceilings"]


def _where(result: Result) -> str:
    where = result["environment"]
    device = where.get("gpu") or f"CPU, {where.get('platform')}"
    versions = ", ".join(f"{name} {where.get(name)}" for name in ("torch", "triton", "python"))
    return f"{device}; {versions}; commit {str(where.get('commit'))[:12]}; {where.get('date')}"


def page(result: Result) -> str:
    """A page of HTML that needs nothing else: numbers, pictures, every row, the environment."""
    rows = _measured(result)
    with_plots = importlib.util.find_spec("matplotlib") is not None
    drawn = [
        f"<figure><figcaption>{escape(title)}</figcaption>{plots.svg(figure)}</figure>"
        for title, figure in (
            plots.figures(result["rows"], result.get("calibration", ())) if with_plots else ()
        )
    ]
    if not with_plots:
        drawn = ["<p>Pictures need matplotlib: pip install matplotlib</p>"]
    return _PAGE.substitute(
        title=escape(str(result["environment"].get("gpu") or "No GPU: wall time of the CPU")),
        story=escape(_where(result)),
        cards="".join(_cards(rows)),
        failures=_failures(rows, result),
        figures="".join(drawn),
        rows=_table(HEADER, [line(row) for row in rows], [_kind(row) for row in rows]),
        details=_table(DETAILS, _detailed(rows)),
        environment=_table(("", ""), list(_pairs(result["environment"]))),
        ceilings=_table(
            ("ceiling", "dtype", "shape", "TFLOP/s", "GB/s"),
            [_ceiling(row) for row in result["rows"] if row.get("section") == "ceilings"],
        ),
        command=escape(str(result.get("command", "tritorch bench"))),
    )


def _cards(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield _card(str(len(rows)), "rows", f"{sum(bool(r['verified']) for r in rows)} verified")
    for (implementation, which), (mean, count) in geometric_means(rows).items():
        yield _card(f"{mean:.2f}x", f"{implementation}, {which}", f"geometric mean of {count} rows")


def _card(head: str, what: str, note: str) -> str:
    return f"<div><b>{escape(head)}</b><span>{escape(what)}</span><p>{escape(note)}</p></div>"


def _failures(rows: Sequence[Mapping[str, Any]], result: Result) -> str:
    wrong = [row for row in rows if not row["verified"]]
    found = [f"{' '.join(_named(row))}: {failure_of(row)}" for row in wrong]
    found += result.get("problems", [])
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<ul class="bad">{items}</ul>' if items else ""


def _kind(row: Mapping[str, Any]) -> str:
    if not row["verified"]:
        return "bad"
    speedup = row.get("speedup")
    return "" if speedup is None or 0.97 < speedup < 1.03 else "fast" if speedup > 1 else "slow"


def _ceiling(row: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{row[name]:,.1f}" if row[name] else "" for name in ("tflops", "gbps"))
    return str(row["op"]), str(row["dtype"]), str(row["shape"]), *numbers


def _pairs(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        yield name, value if isinstance(value, str) else json.dumps(value)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for index, cells in enumerate(lines):
        kind = f' class="{kinds[index]}"' if kinds and kinds[index] else ""
        body.append(f"<tr{kind}>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>")
    shown = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f"<table>{shown}<tbody>{''.join(body)}</tbody></table>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tritorch bench</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2127; --soft: #616a75;
  --line: #dfe3e8; --good: #1a7f42; --slow: #b35900; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --page: #101418; --card: #181e24; --text: #e4e8ec;
  --soft: #98a2ad; --line: #2c343d; --good: #3fb968; --slow: #f0883e; --bad: #f0625d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { margin: 0 0 6px; font-size: 28px; }
header p { margin: 0; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin: 24px 0 14px; }
.cards div, figure, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.cards div { padding: 14px 18px; }
.cards b { display: block; font-size: 26px; line-height: 1.25; }
.cards p { margin: 4px 0 0; color: var(--soft); font-size: 13px; }
figure { margin: 0 0 14px; padding: 14px 18px; }
figcaption { font-weight: 600; margin-bottom: 8px; }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
details { padding: 10px 18px; margin-bottom: 14px; overflow-x: auto; }
summary { font-weight: 600; cursor: pointer; }
table { border-collapse: collapse; margin: 8px 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 3px 18px 3px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td:first-child { min-width: 105px; max-width: 130px; overflow-wrap: anywhere; }
.more table { font-size: 12px; } .more th, .more td { padding-right: 10px; white-space: normal; }
.more td:last-child { min-width: 190px; }
td:nth-child(n+5):nth-child(-n+8), th { white-space: nowrap; }
.fast td:nth-child(7) { color: var(--good); } .slow td:nth-child(7) { color: var(--slow); }
.bad, .bad td:last-child { color: var(--bad); }
code { background: var(--card); border: 1px solid var(--line); border-radius: 5px;
  padding: 2px 6px; }
footer { color: var(--soft); font-size: 13px; }
</style></head><body><main>
<header><h1>$title</h1><p>$story</p></header>
<section class="cards">$cards</section>
$failures
<section>$figures</section>
<details open><summary>Rows</summary>$rows</details>
<details class="more"><summary>Rates, graphs, host, memory, kernels</summary>$details</details>
<details><summary>Ceilings of this machine, measured in the same run</summary>$ceilings</details>
<details><summary>Environment</summary>$environment</details>
<footer><p>Repeat: <code>$command</code></p>
<p>Medians with 95 % intervals; calls in turns with torch's, on a GPU each on a cold cache. Values
were verified before and after timing: without that there is no speed-up.</p></footer>
</main></body></html>
""")
