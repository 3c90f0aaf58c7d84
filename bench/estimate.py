"""What a launch should take, from its code and its grid alone: an estimate, never a measurement.

A multiprocessor holds some blocks at once.  They share its instruction issue, its arithmetic units,
its path to memory and its tensor cores, and each of them has a chain of latencies that none of its
units shortens: the longer of both is the time of a wave of blocks.  All of them share the L2 cache
and memory.  The rates are the vendors', times efficiencies that are constants of this file.

It ranks configurations, and fails a build that worsens one.  It cannot see: misses of the L2 cache
that its traffic does not tell, conflicts of shared memory's banks, what is masked off within a
tile, the clock under load, stalls that the latencies of this file do not cover, and loops whose
length depends on loaded values.

`python -m tritorch.bench.estimate` compares it with what was measured, see `predictions.py`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tritorch.bench import machine_code, traffic
from tritorch.bench.machine_code import TENSOR_CORE, Instruction, Loop
from tritorch.bench.occupancy import occupancy
from tritorch.testing import dry


@dataclass(frozen=True)
class Device:
    """Rates of a GPU: gigahertz under load, bytes a second of memory, and a cycle's of one
    multiprocessor: bytes from the L2 cache, operations of its tensor cores by operands' type.
    """

    clock: float
    dram: float
    l2: float
    products: Mapping[str, float]


def _products(half: float, double: float, eighth: float) -> Mapping[str, float]:
    single = {"f16": half, "bf16": half, "tf32": half / 2, "f64": double}
    return MappingProxyType(single | {"f8": eighth, "i8": eighth})


# data sheets: dense peak over clock and multiprocessors; A100 80 GB, H100 SXM, B200, MI300X
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "sm_80": Device(1.41, 2.04e12, 48.0, _products(2048, 128, 4096)),
        "sm_90": Device(1.98, 3.35e12, 48.0, _products(4096, 256, 8192)),
        "sm_100": Device(1.85, 8.0e12, 56.0, _products(8192, 128, 16384)),
        "gfx942": Device(2.1, 5.3e12, 64.0, _products(2048, 256, 4096)),
    }
)


@dataclass(frozen=True)
class Model:
    """Shares of a vendor's rates that kernels reach, and latencies in cycles.

    Fitted to half of the rows of one H100; `python -m tritorch.bench.estimate` says how far off
    they are on all of them.
    """

    issue: float = 1.0
    integer: float = 0.64
    products: float = 0.95
    l2: float = 0.84
    dram: float = 0.86
    # a block's start and end, a load from memory, a wait of all its warps
    start: float = 500.0
    load: float = 800.0
    wait: float = 130.0
    # microseconds between launches
    launch: float = 3.9
    # how much what could overlap does: 1 adds, more takes the longest
    overlap: float = 3.1


MODEL = Model()


@dataclass(frozen=True)
class Estimate:
    """Microseconds of one launch.

    `bound`: what takes longest.  `parts`: what each would take alone, in microseconds.  `waves`:
    of blocks over the multiprocessors.  `dram`: bytes that must come from and go to memory.
    `turns` of the hot loop, `flops` of products.  `unknown`: what had to be assumed.
    """

    us: float
    bound: str
    parts: Mapping[str, float]
    waves: float
    dram: float
    turns: float
    flops: float
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What an estimate is made of: the code, what it moves, and how it is launched.

    `resident`: blocks that a multiprocessor holds.  `sizes`: bytes of the arguments' tensors.
    """

    code: Sequence[Instruction]
    moved: traffic.Traffic
    resident: int
    warps: int
    stages: int
    programs: int
    sizes: Mapping[str, int]


def facts_of(launch: dry.Launch, target: str) -> Facts:
    """What can be known of one launch that was compiled for `target`."""
    used = dry.resources(launch)
    return Facts(
        code=machine_code.read(used.code),
        moved=traffic.of_launch(launch),
        resident=occupancy(used, target).blocks,
        warps=used.num_warps,
        stages=launch.num_stages,
        programs=math.prod(launch.grid),
        sizes=launch.sizes,
    )


def of_launch(launch: dry.Launch, target: str, model: Model = MODEL) -> Estimate:
    """The estimate of one launch that was compiled for `target`."""
    return of_facts(facts_of(launch, target), target, model)


def of_facts(facts: Facts, target: str, model: Model = MODEL) -> Estimate:
    """The estimate of a launch of which the facts are known."""
    device, gpu = DEVICES[target], dry.TARGETS[target]
    # what does not launch at all is estimated as if one block fitted
    moved, programs, resident = facts.moved, facts.programs, max(1, facts.resident)
    counted = _counted(facts.code, moved, facts.warps, gpu.warp_size)
    pipes = _pipes(counted, moved, facts.warps, gpu.warp_size, device, model)
    busiest = max(pipes.values())
    chain = _chain(counted, facts.stages, model)

    at_once = gpu.multiprocessors * resident
    waves = programs / at_once
    rest = programs % at_once

    def time_of(cycles: float, least: float = 0.0) -> float:
        """Microseconds of all waves, from the cycles of a block."""
        whole = programs // at_once * max(resident * cycles, least)
        last = max(math.ceil(rest / gpu.multiprocessors) * cycles, least) if rest else 0.0
        return float(whole + last) / device.clock / 1e3

    memory = traffic.by_pointer(moved, facts.sizes, programs)
    dram = sum(memory.values())
    crossing = moved.total("load", "store", "atomic") * programs
    l2 = crossing / (device.l2 * model.l2 * gpu.multiprocessors * device.clock * 1e9) * 1e6
    parts = {name: time_of(cycles) for name, cycles in pipes.items()}
    parts["latency"] = time_of(0.0, chain)
    parts["L2"] = l2
    parts["DRAM"] = dram / (device.dram * model.dram) * 1e6
    together = [time_of(busiest, chain), l2, parts["DRAM"]]
    us = sum(one**model.overlap for one in together) ** (1 / model.overlap) + model.launch
    return Estimate(
        us=us,
        bound=max(parts, key=lambda name: parts[name]),
        parts=parts,
        waves=waves,
        dram=dram,
        turns=counted.turns,
        flops=moved.total("dot") * programs,
        unknown=moved.unknown,
    )


def of_launches(launches: Iterable[dry.Launch], target: str, model: Model = MODEL) -> float:
    """Microseconds of several launches, one after the other."""
    return sum(of_launch(launch, target, model).us for launch in launches)


@dataclass(frozen=True)
class _Counted:
    """Instructions of one warp by opcode, how often each runs, and the hot loop's turns."""

    instructions: Sequence[tuple[Instruction, float]]
    turns: float
    hot: Sequence[Instruction]


def _counted(
    code: Sequence[Instruction], moved: traffic.Traffic, warps: int, lanes: int
) -> _Counted:
    loops = machine_code.loops(code)
    weights = [1.0] * len(code)
    turns, hot = 1.0, machine_code.hot_loop(code)
    of_hot: Sequence[Instruction] = ()
    for loop, number in _matched(loops, hot, moved):
        path = [code[n] for n in loop.path]
        unrolled = _unrolled(path, moved, number, warps, lanes)
        often = moved.turns[number] / unrolled
        # what a turn may skip happens as often as the rarest thing in the loop
        rare = min((n for e, n in moved.events if e.loop == number), default=0.0) / unrolled
        on_path = set(loop.path)
        for n in loop.body:
            weights[n] = often if n in on_path else min(rare, often)
        if loop == hot:
            turns, of_hot = often, path
    return _Counted(list(zip(code, weights, strict=True)), turns, of_hot)


def _matched(
    loops: Sequence[Loop], hot: Loop | None, moved: traffic.Traffic
) -> list[tuple[Loop, int]]:
    """The loops of the machine code with those of the source, where both have as many."""
    source = moved.innermost
    if len(loops) == len(source):
        return list(zip(loops, source, strict=True))
    if hot is None or not source:
        return []

    def weight(number: int) -> tuple[float, float]:
        turns = moved.turns[number]
        return moved.within(number, "dot") * turns, moved.within(number, "load", "store") * turns

    return [(hot, max(source, key=weight))]


def _unrolled(
    path: Sequence[Instruction], moved: traffic.Traffic, number: int, warps: int, lanes: int
) -> float:
    """How many turns of the source one turn of the machine code is."""
    products = moved.within(number, "dot")
    done = sum(_flops(one, warps) for one in path)
    if products and done:
        return max(1.0, float(round(done / products)))
    bytes_of_turn = moved.within(number, "load", "store")
    of_thread = sum(machine_code.moved(path).values())
    if products or not bytes_of_turn or not of_thread:
        return 1.0
    return max(1.0, float(round(of_thread * lanes * warps / bytes_of_turn)))


def _flops(one: Instruction, warps: int) -> float:
    """Operations of one matrix instruction, of all the block's warps together."""
    if one.kind != TENSOR_CORE:
        return 0.0
    size = machine_code.sizes_of(next(iter(machine_code.shapes([one]))))
    if size is None:
        return 0.0
    # four warps issue a product of a group together
    return 2.0 * math.prod(size) * (warps / 4 if one.opcode.startswith("HGMMA") else warps)


def _pipes(
    counted: _Counted,
    moved: traffic.Traffic,
    warps: int,
    lanes: int,
    device: Device,
    model: Model,
) -> dict[str, float]:
    """Cycles that one block keeps each unit of its multiprocessor busy."""
    issued = integers = special = accesses = 0.0
    matrix = False
    for one, often in counted.instructions:
        kind = one.kind
        if one.opcode in ("NOP", "s_nop"):
            continue
        issued += often
        integers += often * (kind in (machine_code.INTEGER, "shuffle", "conversion"))
        special += often * (kind in ("special function", "float64"))
        matrix |= kind == TENSOR_CORE
        if one.width:
            # at most 128 bytes a cycle
            accesses += often * max(1.0, lanes * one.width / 128)
    tensor = 0.0
    # Hopper gives products of single warps little more than half of its tensor cores
    single = any(re.match(r"HMMA|IMMA|QMMA", i.opcode) for i, _ in counted.instructions)
    share = 0.6 if single and device.products["f16"] > 2048 else 1.0
    for event, often in moved.events if matrix else ():
        if event.what == "dot":
            kind = "f8" if event.kind.startswith("f8") else event.kind
            rate = device.products.get(kind, device.products["f16"]) * model.products * share
            tensor += event.amount * often / rate
    width = lanes / 32
    return {
        "tensor cores": tensor,
        "issue": issued * warps / 4 / model.issue * width,
        "integer": integers * warps / 4 / model.integer * width,
        "special functions": special * warps * 2 * width,
        "shared memory and L1": accesses * warps,
    }


def _chain(counted: _Counted, stages: int, model: Model) -> float:
    """Cycles of one block that had the multiprocessor for itself and no unit that is slow."""
    kinds = {one.kind for one in counted.hot}
    ahead = bool(kinds & {"async copy", "TMA load"})
    waits = sum(one.kind == "barrier" for one in counted.hot) * model.wait / 4
    if not counted.hot:
        turn = 0.0
    elif ahead:
        turn = model.load / max(1, stages - 1) + waits
    elif "global load" in kinds:
        turn = model.load + waits
    else:
        turn = waits
    # every warp issues its own instructions one after the other, not each cycle
    alone = sum(often for _, often in counted.instructions) * 2.0
    return model.start + model.load + max(counted.turns * turn, alone)


def main() -> None:
    """Prints the errors of the estimate."""
    from tritorch.bench import predictions

    parser = argparse.ArgumentParser(description="The estimate beside what was measured.")
    parser.add_argument("ops", nargs="*", help="ops to compare; all that were measured")
    parser.add_argument("--results", type=Path, default=predictions.RESULTS, help="their folder")
    parser.add_argument("--rows", action="store_true", help="every row, not the summary alone")
    options = parser.parse_args()
    sys.exit(predictions.report(options.results, options.ops, rows=options.rows))


if __name__ == "__main__":
    main()
