"""What a run of `tritorch train` leaves: rows for JSON, and a page of HTML that needs nothing else.

The page is made from the JSON file alone, so that an old result can be looked at again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from tritorch.training import charts
from tritorch.training.charts import Series
from tritorch.training.replay import Check
from tritorch.training.train import Result
from tritorch.training.twins import Cost

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def rows(result: Result) -> list[Json]:
    """One row an epoch; from a GPU also one row for the time of a training step.

    Times are microseconds, memory bytes; `speedup` is torch.nn's median time over tritorch's, and
    `verified` whether the two agree.
    """
    found: list[Json] = [
        {
            "op": "lenet8",
            "pass": "epoch",
            "epoch": epoch.number,
            "loss_torch": _finite(epoch.loss_torch),
            "loss_tritorch": _finite(epoch.loss_tritorch),
            "gap": _finite(epoch.gap),
            "noise": _finite(epoch.noise),
            "accuracy_torch": epoch.accuracy_torch,
            "accuracy_tritorch": epoch.accuracy_tritorch,
        }
        for epoch in result.epochs
    ]
    if result.device.type == "cuda":
        found.append(
            {
                "op": "lenet8",
                "shape": f"{result.settings.batch}x1x8x8",
                "dtype": str(result.settings.dtype).removeprefix("torch."),
                "layout": "contiguous",
                "pass": "train_step",
                "implementation": "tritorch",
                "baseline": "torch.nn",
                **_cost(result.cost_tritorch),
                **{f"baseline_{name}": value for name, value in _cost(result.cost_torch).items()},
                "speedup": result.cost_torch.median_us / result.cost_tritorch.median_us,
                "verified": not result.failures,
            }
        )
    return found


def details(result: Result) -> dict[str, Json]:
    """Everything but the rows: settings, summary, curves by step, replayed tensors."""
    settings, last = result.settings, result.epochs[-1]
    curves = {name: list(map(_finite, values)) for name, values in vars(result.curves).items()}
    return {
        "settings": {
            **vars(settings),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "device": str(result.device),
        },
        "summary": {
            "equal": not result.failures,
            "failures": result.failures,
            "path": "triton" if result.kernels else "reference",
            **vars(result.setup),
            "accuracy_torch": last.accuracy_torch,
            "accuracy_tritorch": last.accuracy_tritorch,
            "predictions_that_differ": result.differing,
            "largest_gap": _finite(result.curves.gap[-1]),
            "share_of_limit": _finite(result.curves.share_of_limit),
            "replayed_steps": len(result.replays),
            "replayed_tensors": sum(map(len, result.replays.values())),
            "cost_torch": _cost(result.cost_torch),
            "cost_tritorch": _cost(result.cost_tritorch),
            "fallbacks": result.fallbacks,
            "seconds": result.seconds,
        },
        "curves": curves,
        "replay": [
            {"step": step + 1, **_check(check)}
            for step, checks in result.replays.items()
            for check in checks
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cost(cost: Cost) -> dict[str, Json]:
    return dict(vars(cost))


def _check(check: Check) -> dict[str, Json]:
    verdict = check.verdict
    return {
        "tensor": check.tensor,
        "accepted": verdict.accepted,
        "headroom": _finite(verdict.headroom),
        "ratio_to_torch": None if verdict.ratio is None else _finite(verdict.ratio),
        "failure": verdict.failure,
    }


def page(run: Mapping[str, Any]) -> str:
    """The page of a run, from the content of its JSON file."""
    summary, curves = run["summary"], run["curves"]
    equal = summary["equal"]
    title = "The twins agree" if equal else "The twins differ"
    figures = [
        charts.lines(
            "Loss",
            "training step",
            [
                Series("torch.nn", "torch", curves["loss_torch"]),
                Series("tritorch", "tritorch", curves["loss_tritorch"]),
            ],
            log=True,
        ),
        charts.lines(
            "Test digits named right",
            "epoch",
            [
                Series("torch.nn", "torch", _column(run, "accuracy_torch")),
                Series("tritorch", "tritorch", _column(run, "accuracy_tritorch")),
            ],
            percent=True,
        ),
        charts.lines(
            "Largest gap between the losses so far",
            "training step",
            [
                Series("limit", "limit", curves["limit"]),
                Series("torch.nn with fewer bits", "noise", curves["noise"]),
                Series("tritorch", "tritorch", curves["gap"]),
            ],
            log=True,
        ),
    ]
    if run["replay"]:
        figures.append(
            charts.dots(
                "Error of the kernels' tensors",
                "tensors, in the order of the step",
                [
                    (f"step {row['step']}, {row['tensor']}", row["headroom"])
                    for row in run["replay"]
                ],
            )
        )
    badge = '<span class="good">equal</span>' if equal else '<span class="bad">different</span>'
    failures = "".join(f"<li>{escape(failure)}</li>" for failure in summary["failures"])
    return _PAGE.substitute(
        title=title,
        badge=badge,
        story=_story(run),
        failures=f'<ul class="failures">{failures}</ul>' if failures else "",
        cards="".join(_cards(run)),
        figures="".join(figures),
        tables="".join(_tables(run)),
        command=escape(run["command"]),
    )


def _column(run: Mapping[str, Any], name: str) -> list[float | None]:
    return [row[name] for row in run["rows"] if row["pass"] == "epoch"]


def _story(run: Mapping[str, Any]) -> str:
    summary, settings = run["summary"], run["settings"]
    path = {
        "triton": "by its Triton kernels",
        "reference": "on its plain-PyTorch reference path",
    }[summary["path"]]
    story = (
        f"A convolutional network of {summary['parameters']:,} parameters, with "
        f"{summary['layers_converted']} of its {summary['layers']} layers tritorch's, learnt "
        f"{summary['digits_train']:,} handwritten digits {path}, beside its torch.nn twin, from "
        f"the same weights and the same batches (seed {settings['seed']})."
    )
    if summary["replayed_steps"]:
        story += (
            f" {summary['replayed_steps']} of its steps were taken again through the Triton "
            "kernels, and every tensor in them was compared with torch.nn in float64."
        )
    elif summary["path"] == "reference":
        story += " No step was taken through the kernels."
    return story


def _cards(run: Mapping[str, Any]) -> Iterator[str]:
    summary, replayed = run["summary"], run["replay"]
    yield _card(
        f"{summary['accuracy_tritorch']:.1%}",
        "of the test digits named right",
        f"torch.nn {summary['accuracy_torch']:.1%}; "
        f"{summary['predictions_that_differ']} of {summary['digits_test']} predictions differ",
    )
    share = summary["share_of_limit"]
    gap = summary["largest_gap"]
    yield _card(
        "none" if gap == 0 else _number(gap, ".1e"),
        "largest gap between the losses",
        "the same to the last bit" if gap == 0 else f"{_number(share, '.0%')} of the limit",
    )
    if replayed:
        worst = max(
            replayed, key=lambda row: math.inf if row["headroom"] is None else row["headroom"]
        )
        accepted = sum(row["accepted"] for row in replayed)
        yield _card(
            f"{accepted} of {len(replayed)}",
            "tensors of the kernels accepted",
            f"worst error {_number(worst['headroom'], '.0%')} of its limit: {worst['tensor']}",
        )
    ours, torchs = summary["cost_tritorch"], summary["cost_torch"]
    yield _card(
        f"{ours['median_us'] / 1000:.2f} ms",
        "a training step",
        f"torch.nn {torchs['median_us'] / 1000:.2f} ms"
        + ("" if summary["path"] == "triton" else "; the speed of the kernels needs a GPU"),
    )


def _card(number: str, what: str, note: str) -> str:
    return f"<div><b>{escape(number)}</b><span>{escape(what)}</span><p>{escape(note)}</p></div>"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _tables(run: Mapping[str, Any]) -> Iterator[str]:
    summary = run["summary"]
    epochs = [
        (
            str(row["epoch"]),
            _number(row["loss_torch"], ".5f"),
            _number(row["loss_tritorch"], ".5f"),
            _number(row["gap"], ".1e"),
            f"{row['accuracy_torch']:.1%}",
            f"{row['accuracy_tritorch']:.1%}",
        )
        for row in run["rows"]
        if row["pass"] == "epoch"
    ]
    header = (
        "epoch",
        "loss torch.nn",
        "loss tritorch",
        "max gap",
        "right torch.nn",
        "right tritorch",
    )
    yield _table("Epochs", header, epochs)
    costs = (summary["cost_torch"], summary["cost_tritorch"])
    step = [
        ("median time, ms", *(f"{cost['median_us'] / 1e3:.3f}" for cost in costs)),
        ("quartiles, ms", *(f"{c['low_us'] / 1e3:.3f} to {c['high_us'] / 1e3:.3f}" for c in costs)),
        ("memory, KiB", *(f"{cost['memory'] / 1024:,.0f}" for cost in costs)),
    ]
    yield _table("A training step", ("", "torch.nn", "tritorch"), step)
    if run["replay"]:
        yield _table(
            "Tensors of the replayed steps",
            ("step", "tensor", "share of limit", "error over torch.nn's"),
            [
                (
                    str(row["step"]),
                    row["tensor"],
                    _number(row["headroom"], ".2f"),
                    "" if row["ratio_to_torch"] is None else f"{row['ratio_to_torch']:.2f}",
                )
                for row in run["replay"]
            ],
            folded=True,
        )
    for name in ("settings", "environment"):
        pairs = [(key, json.dumps(value)) for key, value in run[name].items()]
        yield _table(
            name.capitalize(), ("", ""), [(k, v.strip('"')) for k, v in pairs], folded=True
        )


def _table(
    title: str, header: Sequence[str], lines: Sequence[Sequence[str]], *, folded: bool = False
) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if any(header) else ""
    table = f"<table>{head}<tbody>{''.join(row(line, 'td') for line in lines)}</tbody></table>"
    opened = "" if folded else " open"
    return f"<details{opened}><summary>{escape(title)}</summary>{table}</details>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tritorch train: $title</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2127; --soft: #616a75;
  --line: #dfe3e8; --torch: #e8702a; --tritorch: #1f6feb; --noise: #8a94a0; --limit: #c62f2f;
  --good: #1a7f42; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --page: #101418; --card: #181e24; --text: #e4e8ec;
  --soft: #98a2ad; --line: #2c343d; --torch: #f0883e; --tritorch: #58a6ff; --noise: #7d8792;
  --limit: #f0625d; --good: #3fb968; --bad: #f0625d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { margin: 0 0 8px; font-size: 28px; display: flex; align-items: center; gap: 14px; }
h1 span { font-size: 14px; padding: 2px 12px; border-radius: 99px; color: var(--card); }
h1 .good { background: var(--good); } h1 .bad { background: var(--bad); }
header p { max-width: 78ch; margin: 0; color: var(--soft); }
.failures { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px;
  margin: 24px 0 14px; }
.cards div, figure, details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.cards div { padding: 14px 18px; }
.cards b { display: block; font-size: 26px; line-height: 1.25; }
.cards p { margin: 4px 0 0; color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { display: flex; flex-wrap: wrap; gap: 4px 16px; justify-content: space-between; }
.keys { color: var(--soft); font-size: 13px; }
.keys span { margin-left: 14px; }
.keys span::before { content: ""; display: inline-block; width: 16px; height: 3px;
  margin: 0 6px 4px 0; border-radius: 2px; background: var(--key); }
.torch { --key: var(--torch); } .tritorch { --key: var(--tritorch); }
.noise { --key: var(--noise); } .limit { --key: var(--limit); } .bad { --key: var(--bad); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); }
.line { fill: none; stroke: var(--key); stroke-width: 1.7; stroke-linejoin: round; }
.line.torch { stroke-width: 5; opacity: .45; }
.line.limit { stroke-dasharray: 5 4; }
.dot { fill: var(--key); opacity: .75; }
.tables { display: grid; gap: 14px; margin-top: 14px; }
details { padding: 10px 18px; overflow-x: auto; }
summary { font-weight: 600; cursor: pointer; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 22px 3px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
footer { margin-top: 24px; color: var(--soft); font-size: 13px; }
code { background: var(--card); border: 1px solid var(--line); border-radius: 5px;
  padding: 2px 6px; }
a { color: var(--tritorch); }
</style></head><body><main>
<header><h1>$title$badge</h1><p>$story</p>$failures</header>
<section class="cards">$cards</section>
<section class="charts">$figures</section>
<section class="tables">$tables</section>
<footer><p>Repeat: <code>$command</code></p>
<p>Every number of this page is in <a href="run.json">run.json</a> beside it.</p></footer>
</main></body></html>
""")
