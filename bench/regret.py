"""How much slower the kernels' own choice is than the best that a sweep measured: before and now.

Before is what the kernel chose when the sweep ran, now is what its estimate chooses today, without
a table.  A choice that the sweep did not time is counted, and left out of the mean.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tritorch import launch
from tritorch.bench.cases import FORWARD
from tritorch.bench.measured import RESULTS, markdown
from tritorch.bench.resnet50 import CONVOLUTIONS, GRAD_INPUT, GRAD_WEIGHT

SWEEP = RESULTS / "nvidia-h100-80gb-hbm3" / "2026-11-26" / "163943Z-sweep.json"
_LIBRARIES = ("cudnn", "cublas")
PASSES = (FORWARD, GRAD_INPUT, GRAD_WEIGHT)

_matmul = launch.kernels("matmul_tma_configs")
_conv = launch.kernels("conv_tma_configs")
_conv_weight = launch.kernels("conv_weight_tma")


class Regret(NamedTuple):
    """Of one question: times over the best one, less one; `now` is None if it was not timed."""

    op: str
    which: str
    before: float
    now: float | None


def table() -> str:
    groups: dict[tuple[str, str], list[Regret]] = {}
    for one in regrets(json.loads(SWEEP.read_text())["rows"]):
        groups.setdefault((one.op, one.which), []).append(one)
    rows = [(*key, *_summed(some)) for key, some in sorted(groups.items())]
    rows.append(("all", "", *_summed([one for some in groups.values() for one in some])))
    header = ("kernels", "pass", "questions", "mean before", "worst", "mean now", "worst")
    return markdown((*header, "not timed"), rows)


def _summed(some: list[Regret]) -> tuple[str, ...]:
    before = [one.before for one in some]
    now = [one.now for one in some if one.now is not None]
    cells = [str(len(some))]
    for values in (before, now):
        cells += [f"{sum(values) / len(values):.1%}", f"{max(values):.0%}"] if values else ["", ""]
    return (*cells, str(len(before) - len(now)))


def regrets(rows: list[dict[str, Any]]) -> list[Regret]:
    """Of every question of a sweep."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["name"], row["pass"], row["batch"]), []).append(row)
    found = []
    for (op, _, which, _), some in cases.items():
        times = {row["configuration"]: row["median_us"] for row in some}
        best = min(us for label, us in times.items() if label not in _LIBRARIES)
        now = times.get(_chosen(op, some))
        kind = which if which in PASSES else "squares"
        after = None if now is None else now / best - 1
        found.append(Regret(op, kind, times["default"] / best - 1, after))
    return found


def _chosen(op: str, some: list[dict[str, Any]]) -> str:
    """What the sweep calls that which is chosen today."""
    if op == "matmul":
        return _of_product(_matmul.matmul_tma_config(*_sizes(some[0]), 2))
    candidates = [
        row for row in some if "function" in row and " split*" not in row["configuration"]
    ]
    candidates += [row for row in some if row["configuration"].endswith(" split*1")]
    function, sizes = candidates[0]["function"], candidates[0]["sizes"]
    family = _conv if function == "conv2d_tma_config" else _conv_weight
    config = getattr(family, function)(*sizes)
    if config is None:
        return "portable"
    kwargs = dict(config.kwargs)
    if family is _conv:
        blocks = _conv.tile_of_pixels(*sizes[:3], kwargs["BLOCK_NPQ"])
        kwargs.update(zip(("BLOCK_N", "BLOCK_P", "BLOCK_Q"), blocks, strict=True))
    warps, stages = config.num_warps, config.num_stages
    for row in candidates:
        if (row["kwargs"], row["num_warps"], row["num_stages"]) == (kwargs, warps, stages):
            return str(row["configuration"])
    return ""


def _sizes(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows, columns, sum, batch and whether it shares its second operand, of a product's row."""
    strided = {
        name.replace("downsample", "ds"): size // stride
        for name, _, _, _, kernel, stride, size in CONVOLUTIONS
        if kernel == 1 and stride > 1
    }
    m, n, k = row["m"], row["n"], row["k"]
    if row["name"] not in strided:
        return m, n, k, 1, True
    if row["pass"] == GRAD_WEIGHT:
        return m, n, k, 1, False
    columns = strided[row["name"]]
    return m // columns, n, k, columns, True


def _of_product(config: Any) -> str:
    form, *blocks = (config.kwargs[name] for name in ("FORM", "BLOCK_M", "BLOCK_N", "BLOCK_K"))
    m, n, _ = blocks
    label = f"{form} {'x'.join(map(str, blocks))} w{config.num_warps} s{config.num_stages}"
    is_usual = config.kwargs["PIECES"] == (2 if n > 128 or m * n > 128 * 128 else 1)
    # the sweep's word for two pieces where one is usual
    return label if is_usual else f"{label} halves"
