"""Tables of ResNet-50's convolutions: today's times beside torch's, and what became of predictions.

Where no GPU has timed a convolution its estimate stands beside what bounds it, and is called one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tritorch.bench import estimate
from tritorch.bench.cases import FORWARD, OURS, Case
from tritorch.bench.measured import RESULTS, Row, markdown, newest, timed
from tritorch.bench.recording import record
from tritorch.bench.resnet50 import CONVOLUTIONS, GRAD_INPUT, GRAD_WEIGHT, Shapes
from tritorch.bench.train_steps import EAGER, GRAPH

PASSES = (FORWARD, GRAD_INPUT, GRAD_WEIGHT)
BATCH = 256
TARGET = "sm_90"
_STEPS = {EAGER: "eager", GRAPH: "CUDA graph"}

_LOG = Path(__file__).resolve().parent.parent / "docs" / "predictions.md"
# of the kernels that were predicted: each as it chose by itself, then with the table that followed
_FIRST = RESULTS / "nvidia-h100-80gb-hbm3" / "2026-11-26"
_SWEEP, _TUNED = _FIRST / "163943Z-sweep.json", _FIRST / "163943Z-gpu.json"
_COUNTS = {name: count for name, count, *_ in CONVOLUTIONS}


@dataclass(frozen=True)
class Time:
    """Microseconds of a pass, and of torch; or an estimate, and of the roofline."""

    ours: float
    other: float
    measured: bool
    verified: bool = True

    @property
    def cells(self) -> tuple[str, str, str]:
        ratio = f"{self.other / self.ours:.2f}" if self.verified else "not verified"
        return f"{self.ours:.0f}", f"{self.other:.0f}", ratio


def convolutions(folder: Path = RESULTS) -> str:
    """One row per shape and GPU: three passes, and whether a GPU timed them."""
    header = ["layer", "channels, pixels", "filter", "count"]
    for which in PASSES:
        header += [f"{which}, us", "torch", "speed-up"]
    rows = []
    for gpu, times in _by_gpu(folder):
        for name, count, c, k, kernel, stride, size in CONVOLUTIONS:
            cells = [name, f"{c}, {size}x{size}", f"{k}, {kernel}x{kernel}", str(count)]
            if stride > 1:
                cells[2] += f", stride {stride}"
            found = {which: times[name, which] for which in PASSES if (name, which) in times}
            for which in PASSES:
                cells += found[which].cells if which in found else ("", "", "")
            estimated = [which for which, time in found.items() if not time.measured]
            basis = f"measured, {gpu}"
            if estimated:
                basis = f"estimated for {TARGET}, not torch's but the roofline"
                basis += "" if len(estimated) == len(found) else f": {', '.join(estimated)}"
            rows.append((*cells, basis))
    return markdown((*header, "basis"), rows)


def sums(folder: Path = RESULTS) -> str:
    """How many times as fast as torch, over all convolutions as often as the network has them."""
    kinds: tuple[tuple[str, Callable[[int], bool]], ...] = (
        ("7x7, the first", lambda kernel: kernel == 7),
        ("3x3", lambda kernel: kernel == 3),
        ("1x1", lambda kernel: kernel == 1),
        ("all", lambda kernel: True),
    )
    rows = []
    for gpu, times in _by_gpu(folder):
        for kind, fits in kinds:
            names = [name for name, _, _, _, kernel, *_ in CONVOLUTIONS if fits(kernel)]
            cells = []
            for which in PASSES:
                some = {name: times[name, which] for name in names if (name, which) in times}
                cells.append(_ratio(some))
            layers = str(sum(_COUNTS[name] for name in names))
            basis = "measured" if all(time.measured for time in times.values()) else "estimated"
            rows.append((gpu, kind, layers, *cells, basis))
    return markdown(("GPU", "convolutions", "layers", *PASSES, "basis"), rows)


def _ratio(times: dict[str, Time]) -> str:
    if not times or not all(time.verified for time in times.values()):
        return ""
    ours = sum(_COUNTS[name] * time.ours for name, time in times.items())
    other = sum(_COUNTS[name] * time.other for name, time in times.items())
    return f"{other / ours:.2f}"


def _by_gpu(folder: Path) -> Iterator[tuple[str, dict[tuple[str, str], Time]]]:
    """Each GPU and its times by layer and pass; estimates for what is lacking."""
    wanted = {(case.name, which): case for case in _cases() for which in case.passes}
    found: dict[str, dict[tuple[str, str], Time]] = {}
    for gpu, row in newest(folder, _is_convolution):
        time = Time(row["median_us"], row["baseline_us"], True, bool(row["verified"]))
        found.setdefault(gpu, {})[str(row["name"]), str(row["pass"])] = time
    for gpu, times in sorted(found.items()) or [("no GPU yet", {})]:
        yield (
            gpu,
            {key: times.get(key) or _estimated(case, key[1]) for key, case in wanted.items()},
        )


@functools.cache
def _cases() -> tuple[Case, ...]:
    return tuple(Shapes(BATCH).convolutions())


def _is_convolution(row: Row) -> bool:
    named = row["op"] == "conv2d" and row.get("name") in _COUNTS
    return named and row["dtype"] == "bfloat16" and row["shape"][0] == BATCH


def _estimated(case: Case, which: str) -> Time:
    function, gradients = case.implementations[OURS], case.passes[which]
    recorded = record(function, case.arguments, TARGET, gradients=gradients)
    launches = recorded.backward if gradients else recorded.forward
    device, cost = estimate.DEVICES[TARGET], case.cost[which]
    # operations a cycle of each of the 132 multiprocessors
    products = device.products["bf16"] * device.clock * 1e9 * 132
    bound = max(cost.flops / products, cost.bytes / device.dram) * 1e6
    return Time(estimate.of_launches(launches, TARGET), bound, False)


def outcome_of(heading: str) -> Callable[[], str]:
    """The table that says what became of the predictions of a section of the log."""
    return lambda: outcome(_LOG.read_text(), heading)


def outcome(log: str, heading: str) -> str:
    """One row per prediction: the time that was predicted, that of the kernel's own choice, that
    with the table which was measured afterwards, and torch's beside the latter.
    """
    own = {
        (_full(row["name"]), row["pass"]): row["median_us"]
        for row in json.loads(_SWEEP.read_text())["rows"]
        if row["configuration"] == "default" and row["batch"] == BATCH
    }
    tuned = {
        (row["name"], row["pass"]): row
        for row in json.loads(_TUNED.read_text())["rows"]
        if _is_convolution(row) and row["implementation"] == OURS
    }
    rows, totals = [], {which: [0.0] * 4 for which in PASSES}
    for name, which, predicted in _predictions(log, heading):
        row = tuned[name, which]
        times = predicted, own[name, which], row["median_us"], row["baseline_us"]
        rows.append((name, which, *_compared(*times)))
        for i, time in enumerate(times):
            totals[which][i] += _COUNTS[name] * time
    if len(rows) > len(PASSES):
        rows += [
            (f"all {_layers(log, heading)} layers", which, *_compared(*times))
            for which, times in totals.items()
        ]
    header = ("layer", "pass", "predicted", "own choice", "off by", "measured table", "torch")
    return markdown((*header, "speed-up"), rows)


def _compared(predicted: float, own: float, tuned: float, torch: float) -> tuple[str, ...]:
    off = f"{own / predicted - 1:+.0%}"
    return (
        f"{predicted:.0f}",
        f"{own:.0f}",
        off,
        f"{tuned:.0f}",
        f"{torch:.0f}",
        f"{torch / tuned:.2f}",
    )


def _layers(log: str, heading: str) -> int:
    return sum(_COUNTS[name] for name in {name for name, *_ in _predictions(log, heading)})


def _full(name: str) -> str:
    """A layer's name in the sweep is shorter."""
    return re.sub(r"\.ds$", ".downsample", re.sub(r"\.c(\d)$", r".conv\1", str(name)))


def _predictions(log: str, heading: str) -> list[tuple[str, str, float]]:
    """Layer, pass and microseconds of the first table in the section."""
    sections = re.split(r"^#+ ", log, flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(heading)]
    lines = [line for line in section.partition("<!-- table")[0].splitlines() if line[:1] == "|"]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = []
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        found.append((row.get("layer", "stem"), row["pass"], float(row["predicted"])))
    return found


def newest_steps(folder: Path = RESULTS) -> str:
    """One row per GPU, batch size and kind of layers: the newest whole step of ResNet-50, eager and
    as a CUDA graph.
    """
    found: dict[tuple[str, int, str], dict[str, tuple[str, str, str]]] = {}
    for environment, row in timed(folder):
        if row["pass"] in _STEPS:
            key = str(environment["gpu"]), -int(row["shape"][0]), _layers_of(row)
            found.setdefault(key, {})[row["pass"]] = _milliseconds(row)
    header = ["GPU", "batch", "layers"]
    for how in _STEPS.values():
        header += [f"{how}, ms", "torch", "speed-up"]
    rows = []
    for (gpu, batch, layers), steps in sorted(found.items()):
        cells = [cell for which in _STEPS for cell in steps.get(which, ("", "", ""))]
        rows.append((gpu, str(-batch), layers, *cells))
    return markdown(tuple(header), rows)


def train_steps() -> str:
    """One row per batch size and result of a whole step of ResNet-50, the oldest first."""
    rows = []
    for environment, row in timed(RESULTS):
        if row["pass"] in _STEPS:
            commit, batch = str(environment.get("commit"))[:7], str(row["shape"][0])
            how = _STEPS[row["pass"]]
            cells = str(environment["gpu"]), batch, commit, _layers_of(row), how
            rows.append((*cells, *_milliseconds(row)))
    rows.sort(key=lambda cells: (cells[0], -int(cells[1])))
    header = "GPU", "batch", "commit", "layers", "step", "tritorch, ms", "torch, ms", "speed-up"
    return markdown(header, rows)


def _layers_of(row: Row) -> str:
    return "fused" if row["op"].endswith("fused") else "as written"


def _milliseconds(row: Row) -> tuple[str, str, str]:
    ours, torchs = (row[key] / 1e3 for key in ("median_us", "baseline_us"))
    ratio = f"{torchs / ours:.2f}" if row["verified"] else "not verified"
    return f"{ours:.1f}", f"{torchs:.1f}", ratio
