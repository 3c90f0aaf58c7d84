"""The sections of `tritorch.bench.gpu`: what each measures, the most valuable first.

They run in a process of their own, which says of every row what it is about to measure and what it
found, so that an error of the GPU costs one row.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tritorch.bench import baselines, ceilings, clocks, fatal, rows, timing
from tritorch.bench.baselines import COMPILED
from tritorch.bench.cases import BOTH, FORWARD, OURS, TORCH, Case, Slot, workloads
from tritorch.bench.passes import Prepared
from tritorch.bench.resnet50 import Shapes
from tritorch.bench.train_steps import FUSED, Trainer

# in the order in which they run; the numbers share out a budget of seconds
WEIGHTS = {
    "ceilings": 4,
    "conv": 40,
    "matmul": 20,
    "train": 20,
    "pointwise": 20,
    "host": 8,
    "layers": 24,
    "details": 12,
    "compiled": 30,
    "baselines": 20,
}
# what any section may take
LIMIT = 8 * 60.0
_BATCHES = (256, 32)
# of whom the section of that name measures what
_DETAILS = {OURS: ("graph", "memory", "kernels"), TORCH: ("memory",)}


@dataclass(frozen=True)
class Setting:
    """How the sections run: `shrink` and `small` are for machines without a GPU."""

    batch: int = 256
    shrink: int = 1
    small: bool = False
    seconds: float = 0.3
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


@functools.cache
def planned(section: str, setting: Setting) -> tuple[Case, ...]:
    """The cases of a section, whose kernels are compiled before it begins; few of "train"."""
    shapes = Shapes(setting.batch, setting.dtype, setting.shrink)
    made: dict[str, Callable[[], Iterator[Case]]] = {
        "conv": shapes.convolutions,
        "matmul": shapes.products,
        "pointwise": lambda: _forward_and_backward(shapes),
        "host": shapes.host,
        "layers": lambda: _layers(setting),
        "train": lambda: _trained(setting),
    }
    found = list(made[section]()) if section in made else []
    if section == "conv":
        found.sort(key=lambda case: -case.count * _work(case))
    return tuple(found)


def _work(case: Case) -> float:
    cost = case.cost[FORWARD]
    return max(cost.flops / 200, cost.bytes)


def _forward_and_backward(shapes: Shapes) -> Iterator[Case]:
    for cases in (shapes.batch_norms(), shapes.pools(), shapes.elementwise()):
        yield from map(_without_both, cases)


def _without_both(case: Case) -> Case:
    return replace(case, passes={n: w for n, w in case.passes.items() if n != BOTH})


def _layers(setting: Setting) -> Iterator[Case]:
    """Every op on the first of its workloads."""
    seen: set[str] = set()
    for case in workloads(dtype=setting.dtype, small=setting.small):
        if case.op not in seen:
            seen.add(case.op)
            yield _without_both(case)


def _trained(setting: Setting) -> Iterator[Case]:
    for batch in _BATCHES if setting.shrink == 1 else (setting.batch,):
        yield from Shapes(batch, setting.dtype, setting.shrink).network()
    if setting.shrink == 1:
        yield next(workloads(["sgd_step"], torch.float32))


class Runner:
    """Runs sections; calls `tell(event, **fields)` with the events "doing", "row" and "skip"."""

    def __init__(
        self,
        setting: Setting,
        tell: Callable[..., None],
        done: set[tuple[str, ...]],
        wait: Callable[[str, float], None] = lambda section, until: None,
    ) -> None:
        self.setting, self.tell, self.done, self.wait = setting, tell, done, wait
        device = torch.device(setting.device)
        # short calls differ by more than a hundredth, and many of them take no time
        plan = timing.Plan(setting.seconds, least=30, most=800)
        self.bench = rows.Bench(device, plan, watch=clocks.watch(device))
        self.found: list[rows.Row] = []
        # cases that are not tried again, and whether what there is no time for is given up
        self.failed: set[str] = set()
        self.gives_up = True

    def run(self, section: str, until: float) -> None:
        """One section, until a moment of `time.time`, without what is done or has failed."""
        special: dict[str, Callable[[float], None]] = {
            "ceilings": lambda until: self._ceilings(),
            "train": lambda until: self._train(section, (OURS, FUSED, TORCH), until),
            "compiled": lambda until: self._train(section, (COMPILED, TORCH), until),
            "baselines": self._baselines,
            "details": self._details,
        }
        if section not in ("ceilings", "compiled", "baselines", "details"):
            self.tell("doing", section=section, what="waiting for its kernels", key=())
            now = time.time()
            self.wait(section, now + (until - now) / 2)
        if section in special:
            special[section](until)
        else:
            self._cases(section, planned(section, self.setting), until)

    def know(self, earlier: Sequence[rows.Row]) -> None:
        """Takes the ceilings of an earlier part of this run."""
        self.found = [row for row in earlier if row.get("name") == "ceiling"]
        self.done |= {("details", *rows.key(row)) for row in earlier if "peak_bytes" in row}
        self.bench.ceilings = ceilings.of_rows(self.found)

    def clocks(self) -> dict[str, Any] | None:
        """What the GPU's clocks do now; None if unknown."""
        self.bench.watch.seen()
        latest = self.bench.watch.latest
        return None if latest is None else latest.row()

    def _row(self, section: str, row: rows.Row) -> None:
        self.done.add(rows.key(row))
        self.tell("row", row={"section": section, **row})

    def _has_time(self, section: str, what: str, until: float) -> bool:
        if time.time() <= until:
            return True
        if self.gives_up:
            self.tell("skip", section=section, what=what, why="no time left")
        return False

    def _fail(self, section: str, what: str, error: Exception) -> None:
        fatal.reraise(error)
        self.failed.add(what)
        self.tell("skip", section=section, what=what, why=f"{type(error).__name__}: {error}"[:500])

    def _ceilings(self) -> None:
        if self.found:
            return
        self.tell("doing", section="ceilings", what="copy and products", key=())
        names = ("bfloat16", "tf32", "float32", "float16")
        for row in ceilings.measure(self.bench.device, names, self.setting.seconds):
            self.found.append(row)
            self._row("ceilings", row)
        self.bench.ceilings = ceilings.of_rows(self.found)

    def _cases(self, section: str, cases: Sequence[Case], until: float) -> None:
        for case in cases:
            wanted = [which for which in case.passes if _key(section, case, which) not in self.done]
            what = f"{case.op} {case.name} {case.shape}"
            if not wanted or what in self.failed or not self._has_time(section, what, until):
                continue
            self.tell("doing", section=section, what=what, key=())
            try:
                self._passes(section, case, wanted)
            except Exception as error:
                self._fail(section, what, error)
            self._free()

    def _free(self) -> None:
        """Gives memory back that the next case may need in other pieces."""
        if self.bench.device.type == "cuda":
            _, total = torch.cuda.mem_get_info()
            if torch.cuda.memory_reserved() > total // 2:
                torch.cuda.empty_cache()

    def _passes(self, section: str, case: Case, wanted: Sequence[str]) -> None:
        slots = self.bench.slots(case)
        for which in wanted:
            key = _key(section, case, which)
            self.tell("doing", section=section, what=f"{case.op} {case.name} {which}", key=key)
            if section == "host":
                for row in self._host(case, which):
                    self._row(section, row)
                continue
            for row in self.bench.rows(case, which, slots):
                self._row(section, row)

    def _host(self, case: Case, which: str) -> Iterator[rows.Row]:
        """The host's time in place of the device's."""
        plan = timing.Plan(0.1, least=5)
        bench = rows.Bench(
            self.bench.device, plan, extras=frozenset({"host"}), watch=self.bench.watch
        )
        found = bench.rows(case, which, bench.slots(case))
        # a call that is too long for it has none
        torchs = next(row.get("host_us") for row in found if row["implementation"] == TORCH)
        for row in found:
            kept = ("samples_us", "interval_us", "quartiles_us", "baseline_interval_us", "gbps")
            row = {k: v for k, v in row.items() if k not in (*kept, "speedup_interval", "tflops")}
            row["device_us"] = row["median_us"]
            row |= {"pass": _pass("host", which), "median_us": row.get("host_us")}
            row["interval_us"] = row.pop("host_interval_us", None)
            if row["implementation"] != TORCH:
                known = row["verified"] and row["median_us"] and torchs
                row["baseline_us"] = torchs
                row["speedup"] = torchs / row["median_us"] if known else None
            yield row

    def _train(self, section: str, names: tuple[str, ...], until: float) -> None:
        small: Any = {} if self.setting.shrink == 1 else {"blocks": (1, 1), "size": 32}
        for batch in _BATCHES if self.setting.shrink == 1 else (self.setting.batch,):
            trainer = Trainer(self.bench.device, batch, **small)
            shape = list(trainer.images.shape)
            what = f"{names[0]}, batch {batch}"
            is_done = any(
                (key[0], key[2], key[-1]) == ("resnet50", str(shape), names[0]) for key in self.done
            )
            if is_done or what in self.failed or not self._has_time(section, what, until):
                continue
            self.tell("doing", section=section, what=what, key=(), patience=240.0)
            plan = timing.Plan(10 * self.setting.seconds, least=10, ahead=False)
            try:
                self.bench.watch.seen()
                for found in trainer.rows(names, plan, self.bench.clock):
                    slowed = clocks.summary(self.bench.watch.seen())
                    seen = slowed if self.bench.device.type == "cuda" else {}
                    for row in found:
                        self._row(section, {**row, **seen})
            except Exception as error:
                self._fail(section, what, error)
            self._free()

    def _details(self, until: float) -> None:
        """A graph's time, memory and kernels of what other sections have measured."""
        if self.bench.device.type != "cuda":
            if self.gives_up:
                self.tell("skip", section="details", what="all", why="it is about a GPU")
            return
        for section in ("conv", "matmul", "pointwise", "layers"):
            for case in planned(section, self.setting):
                keys = {which: _key(section, case, which) for which in case.passes}
                wanted = [n for n, key in keys.items() if key in self.done]
                wanted = [n for n in wanted if ("details", *keys[n]) not in self.done]
                what = f"{case.op} {case.name} {case.shape}"
                if not wanted or not self._has_time("details", what, until):
                    continue
                slots = self.bench.slots(case)
                for which in wanted:
                    key = ("details", *keys[which])
                    self.tell("doing", section="details", what=f"{what} {which}", key=key)
                    self.done.add(key)
                    try:
                        self._detail(case, which, slots)
                    except Exception as error:
                        self._fail("details", f"{what} {which}", error)
                del slots
                self._free()

    def _detail(self, case: Case, which: str, slots: list[Slot]) -> None:
        prepared = Prepared(case, which, slots)
        for name, measures in _DETAILS.items():
            fields, seconds = self.bench.details(prepared, name, measures)
            key = rows.key(rows.head(case, which, name))
            self.tell("details", key=key, row={**fields, "details_seconds": seconds})

    def _baselines(self, until: float) -> None:
        """torch alone, on what no other section has measured, and torch.compile beside it."""
        for case in (*planned("conv", self.setting), *planned("matmul", self.setting)):
            alone = {TORCH: case.implementations[TORCH]}
            self._cases("baselines", [replace(case, implementations=alone)], until)
        for case in planned("pointwise", self.setting):
            compiled = {COMPILED: baselines.compiled(case.reference, again=True)}
            both = replace(case, implementations=compiled | {TORCH: case.implementations[TORCH]})
            self._cases("baselines", [both], until)


def _pass(section: str, which: str) -> str:
    """How rows call a pass: what they say of its host time is another number."""
    if section != "host":
        return which
    return "host" if which == FORWARD else f"host_{which}"


def _key(section: str, case: Case, which: str) -> tuple[str, ...]:
    head = rows.head(case, which, next(iter(case.implementations)))
    return rows.key({**head, "pass": _pass(section, which)})
