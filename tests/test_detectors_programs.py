"""The detectors of what programs do to each other, of their order, and of their tiles."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton
import triton.language as tl

from tests.detected import assert_at, copy_kernel, evens_kernel, line_of, only
from tritorch.testing import detector as detector_module
from tritorch.testing import detectors
from tritorch.testing.detectors import ProgramOrderError, detecting

pytestmark = pytest.mark.interpret

# races between programs


@triton.jit
def reverse_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n - 1 - offs)
    tl.store(y_ptr + offs, x)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_program_reads_what_another_writes(order):
    x = torch.arange(32.0)
    with detecting(order=order) as detector:
        reverse_kernel[(2,)](x, x, 32, 16)
    read, write = sorted(detector.findings, key=lambda finding: finding.line)
    assert (read.kind, write.kind) == ("race", "race")
    first, last = ((0, 0, 0), (1, 0, 0)) if order == "forward" else ((1, 0, 0), (0, 0, 0))
    lanes = ((0,), (1,), (2,), (3,))
    assert_at(read, reverse_kernel, "x = tl.load", "x_ptr", last, lanes, 16)
    assert_at(write, reverse_kernel, "tl.store", "y_ptr", last, lanes, 16)
    store = line_of(reverse_kernel, "tl.store")
    assert read.message == (
        f"program {last} reads elements of `x_ptr` that program {first} wrote at line {store}, "
        "and nothing orders the two"
    )
    load = line_of(reverse_kernel, "x = tl.load")
    assert f"writes elements of `y_ptr` that program {first} read at line {load}" in write.message
    with detecting(order=order) as detector:
        reverse_kernel[(2,)](x, torch.empty_like(x), 32, 16)
    assert detector.findings == []


@triton.jit
def stencil_kernel(x_ptr, n, HALO: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + HALO, mask=offs + HALO < n, other=0)
    x += tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_halo_in_place(order):
    with detecting(order=order) as detector:
        stencil_kernel[(2,)](torch.ones(32), 32, 1, 16)
    # the last program reads its elements itself before it writes them
    finding = only(detector, "race")
    text, lanes = ("tl.store", ((0,),)) if order == "forward" else ("x = tl.load", ((15,),))
    program = (1, 0, 0) if order == "forward" else (0, 0, 0)
    assert_at(finding, stencil_kernel, text, "x_ptr", program, lanes, 1)
    with detecting(order=order) as detector:
        stencil_kernel[(2,)](torch.ones(32), 32, 0, 16)
    assert detector.findings == []


@triton.jit
def total_kernel(x_ptr, y_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if HOW == "store":
        tl.store(y_ptr, x)
    elif HOW == "atomic":
        tl.atomic_add(y_ptr, x)
    elif HOW == "first":
        if tl.program_id(0) == 0:
            tl.store(y_ptr, 0.0)
        tl.atomic_add(y_ptr, x)
    elif HOW == "after":
        tl.atomic_add(y_ptr, x, sem="relaxed")
        tl.store(y_ptr + 1, tl.load(y_ptr))


def test_two_programs_write_an_element():
    x = torch.arange(32.0)
    with detecting() as detector:
        total_kernel[(2,)](x, torch.zeros(1), "store", 16)
    finding = only(detector, "race")
    assert_at(finding, total_kernel, "tl.store(y_ptr, x)", "y_ptr", (1, 0, 0), ((0,),), 1)
    with detecting() as detector:
        total_kernel[(2,)](x, torch.zeros(1), "atomic", 16)
        # the same bits twice are no race
        total_kernel[(2,)](torch.ones(32), torch.zeros(1), "store", 16)
        # nor is what launches do one after another
        for _ in range(2):
            total_kernel[(1,)](x, x[:1], "store", 16)
    assert detector.findings == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_same_bits_twice_are_no_race(dtype):
    x, y = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    with detecting() as detector:
        evens_kernel[(3,)](x, y, 16, 1, 16)
    assert detector.findings == []


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_store_and_an_atomic(order):
    with detecting(order=order) as detector:
        total_kernel[(2,)](torch.ones(32), torch.zeros(1), "first", 16)
    finding = only(detector, "race")
    lines, start = inspect.getsourcelines(total_kernel.fn)
    if order == "forward":
        store = lines.index("            tl.store(y_ptr, 0.0)\n")
        assert finding.line == start + store + 1
        assert f"that program (0, 0, 0) wrote at line {finding.line - 1}" in finding.message
    else:
        assert finding.line == line_of(total_kernel, "tl.store(y_ptr, 0.0)")
    with detecting(order=order) as detector:
        total_kernel[(2,)](torch.ones(32), torch.zeros(2), "after", 16)
    assert [(finding.kind, finding.line) for finding in detector.findings] == [
        ("race", line_of(total_kernel, 'sem="relaxed"')),
        ("race", line_of(total_kernel, "y_ptr + 1, tl.load(y_ptr)")),
    ]


@triton.jit
def split_kernel(x_ptr, parts_ptr, count_ptr, y_ptr, SEM: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    x = tl.sum(tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK)), axis=0)
    tl.store(parts_ptr + pid, x)
    if tl.atomic_add(count_ptr, 1, sem=SEM) == programs - 1:
        total = 0.0
        for part in range(programs):
            total += tl.load(parts_ptr + part)
        tl.store(y_ptr, total)
        tl.store(count_ptr, 0)


@pytest.mark.parametrize("order", ["forward", "reverse", 2])
def test_the_last_program_sums_the_parts(order):
    x, count, y = torch.arange(64.0), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with detecting(order=order) as detector:
        for _ in range(2):
            split_kernel[(4,)](x, torch.empty(4), count, y, "acq_rel", 16)
    assert detector.findings == []
    assert y.item() == x.sum()
    with detecting(order=order) as detector:
        split_kernel[(4,)](x, torch.empty(4), count, y, "relaxed", 16)
    finding = only(detector, "race")
    assert finding.argument == "parts_ptr"
    assert finding.line == line_of(split_kernel, "total += tl.load")
    assert finding.count == 3


@triton.jit
def lock_kernel(x_ptr, y_ptr, lock_ptr, LOCKS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    if LOCKS:
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
    x += tl.load(y_ptr + offs)
    tl.store(y_ptr + offs, x)
    if LOCKS:
        tl.atomic_xchg(lock_ptr, 0)


@pytest.mark.parametrize("order", ["forward", "reverse", 2])
def test_a_lock_orders(order):
    x, y, lock = torch.ones(64), torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    with detecting(order=order) as detector:
        lock_kernel[(4,)](x, y, lock, True, 16)
    assert detector.findings == []
    assert y.tolist() == [4.0] * 16
    with detecting(order=order) as detector:
        lock_kernel[(4,)](x, y, lock, False, 16)
    assert {finding.kind for finding in detector.findings} == {"race"}


@triton.jit
def held_kernel(x_ptr, y_ptr, lock_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    tl.store(y_ptr + offs, tl.load(y_ptr + offs) + x)


# the order of programs


@triton.jit
def scan_kernel(x_ptr, y_ptr, flag_ptr, POLL: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    x = tl.sum(tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if pid > 0:
        if POLL == "atomic":
            while tl.atomic_add(flag_ptr + pid - 1, 0) == 0:
                pass
        elif POLL == "volatile":
            while tl.load(flag_ptr + pid - 1, volatile=True) == 0:
                pass
        else:
            while tl.load(flag_ptr + pid - 1) == 0:
                pass
        x += tl.load(y_ptr + pid - 1)
    tl.store(y_ptr + pid, x)
    tl.atomic_xchg(flag_ptr + pid, 1)


@pytest.mark.parametrize("poll", ["atomic", "volatile"])
def test_a_look_back_is_ordered(poll):
    x, y, flags = torch.ones(64), torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    with detecting() as detector:
        scan_kernel[(4,)](x, y, flags, poll, 16)
    assert detector.findings == []
    assert y.tolist() == [16.0, 32.0, 48.0, 64.0]


@pytest.mark.parametrize("poll", ["atomic", "volatile", "plain"])
def test_a_program_that_waits_in_vain_is_given_up(poll, monkeypatch):
    monkeypatch.setattr(detector_module, "SPIN_LIMIT", 200)
    x, y, flags = torch.ones(64), torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    with detecting(order="reverse") as detector:
        with pytest.raises(ProgramOrderError, match=r"program \(3, 0, 0\) asks `flag_ptr`"):
            scan_kernel[(4,)](x, y, flags, poll, 16)
        # the next launch is none the worse
        copy_kernel[(1,)](x, torch.zeros(64), 16, 16, 16)
    finding = only(detector, "program order")
    text = {"atomic": "while tl.atomic", "volatile": "volatile=True", "plain": "- 1) == 0"}[poll]
    assert finding.line == line_of(scan_kernel, text)
    assert (finding.argument, finding.program) == ("flag_ptr", (3, 0, 0))
    assert "in reverse order no program before it gives what it waits for" in finding.message


def test_a_lock_that_is_never_given_back(monkeypatch):
    monkeypatch.setattr(detector_module, "SPIN_LIMIT", 200)
    x, y, lock = torch.ones(64), torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    with detecting() as detector, pytest.raises(ProgramOrderError, match="`lock_ptr`"):
        held_kernel[(4,)](x, y, lock, 16)
    finding = only(detector, "hang")
    assert finding.line == line_of(held_kernel, "while tl.atomic_cas")
    assert (finding.argument, finding.program) == ("lock_ptr", (1, 0, 0))
    assert "program (0, 0, 0), which is done, has left it as it is" in finding.message


@triton.jit
def grid_kernel(y_ptr, turn_ptr):
    pid = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2)
    tl.store(y_ptr + pid + tl.program_id(2), tl.atomic_add(turn_ptr, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_each_order_runs_every_program_once(seed):
    turns = {}
    for order in ("forward", "reverse", seed):
        y, turn = torch.zeros(24, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        with detecting(order=order) as detector:
            grid_kernel[lambda constants: (2, 3, 4)](y, turn)
        assert detector.findings == []
        assert detector.launches == [detectors.Launch("grid_kernel", (2, 3, 4), {}, 24)]
        turns[order] = y.tolist()
    assert turns["forward"] == list(range(24))
    assert turns["reverse"] == list(range(24))[::-1]
    assert turns[seed] not in (turns["forward"], turns["reverse"])
    assert sorted(turns[seed]) == turns["forward"]


# tiles


@triton.jit
def dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    y = tl.dot(x, x, input_precision="ieee")
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], y)


def test_a_tile_that_is_too_small_for_a_product():
    x, y = torch.ones(8, 8).half(), torch.zeros(8, 8)
    with detecting() as detector:
        dot_kernel[(1,)](x, y, 8)
    finding = only(detector, "tile")
    assert finding.line == line_of(dot_kernel, "y = tl.dot")
    assert finding.message == "Input shapes should have M >= 1, N >= 1 and K >= 16"
    assert torch.equal(y, x.float() @ x.float())
    x, y = torch.ones(16, 16).half(), torch.zeros(16, 16)
    with detecting() as detector:
        dot_kernel[(1,)](x, y, 16)
    assert detector.findings == []
