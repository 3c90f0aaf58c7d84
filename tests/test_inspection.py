"""What a kernel does, takes and should cost, on kernels of which all of it is known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from click.testing import CliRunner

from tests.lab.gallery import ROOT
from tritorch.bench import (
    differences,
    estimate,
    inspection,
    inspection_tables,
    ranking,
    recording,
    traffic,
)
from tritorch.bench.occupancy import occupancy
from tritorch.cli import main
from tritorch.testing import dry

pytestmark = pytest.mark.compile

EXAMPLE = f"{ROOT}/examples/check/matmul.py:matmul"


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M, N, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptr + rows[:, None] * K + (k * BLOCK_K + ks)[None, :])
        b = tl.load(b_ptr + (k * BLOCK_K + ks)[:, None] * N + columns[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def triangle_kernel(x_ptr, y_ptr, times_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if pid >= n:
        return
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(pid, n):
        for j in range(i):
            total += tl.load(x_ptr + (i * n + j) * BLOCK + offs)
        if i % 2 == 0:
            tl.atomic_add(y_ptr + offs, total)
    for _ in range(tl.load(times_ptr)):
        tl.store(y_ptr + offs, total)


def product(size=64, sides=(512, 512, 256), dtype=torch.float16, target="sm_90", **options):
    m, n, k = sides
    a, b, c = (torch.empty(*shape, dtype=dtype) for shape in ((m, k), (k, n), (m, n)))
    with dry.compiling_for(target) as recorder:
        grid = (m // size, n // size)
        product_kernel[grid](a, b, c, m, n, k, size, 32, **options)
    return recorder.launches[0]


def copied(n, target="sm_90"):
    x = torch.empty(n)
    with dry.compiling_for(target) as recorder:
        copy_kernel[(triton.cdiv(n, 1024),)](x, torch.empty_like(x), n, 1024)
    return recorder.launches[0]


def test_turns_bytes_and_operations_of_a_product():
    moved = traffic.of_launch(product())
    assert moved.turns == (8.0,)
    assert moved.total("dot") == 2 * 64 * 64 * 256
    assert moved.total("load") == 2 * 64 * 256 * 2
    assert moved.total("store") == 64 * 64 * 2
    assert moved.within(0, "load") == 2 * 64 * 32 * 2
    assert moved.unknown == ()
    sizes = {"a_ptr": 512 * 256 * 2, "b_ptr": 256 * 512 * 2, "c_ptr": 512 * 512 * 2}
    assert traffic.by_pointer(moved, sizes, 64) == sizes


def test_loops_that_depend_on_the_program_and_branches_are_followed():
    n = 5
    x, y, times = torch.empty(n * n * 16), torch.empty(16), torch.empty(1, dtype=torch.int32)
    with dry.compiling_for("sm_90") as recorder:
        triangle_kernel[(8,)](x, y, times, n, 16)
    moved = traffic.of_launch(recorder.launches[0])
    outer, inner, _ = moved.turns
    programs = [range(pid, n) for pid in range(8)]
    assert outer == sum(map(len, programs)) / 8
    assert inner == sum(map(sum, programs)) / 8
    assert moved.parents == (-1, 0, -1)
    assert moved.total("load") >= inner * 64
    assert moved.total("atomic") == sum(i % 2 == 0 for p in programs for i in p) / 8 * 64
    # how often the last loop turns stands in memory
    assert len(moved.unknown) == 1


def test_the_rest_of_a_long_loop_is_like_its_beginning():
    assert traffic.of_launch(product(sides=(64, 64, 1 << 20))).turns == (float(1 << 15),)


def test_what_cannot_be_followed_is_said(monkeypatch):
    monkeypatch.setattr(traffic, "translated", None)
    moved = traffic.of_launch(product())
    assert moved.total("dot") == 0
    (why,) = moved.unknown
    assert why.startswith("what it moves: TypeError")
    assert math.isfinite(estimate.of_launch(product(), "sm_90").us)


def used(registers, shared, warps):
    return SimpleNamespace(registers=registers, shared=shared, num_warps=warps)


@pytest.mark.parametrize(
    ("target", "resources", "blocks", "limit"),
    [
        ("sm_90", used(255, 0, 8), 1, "registers"),
        ("sm_90", used(128, 0, 8), 2, "registers"),
        ("sm_90", used(32, 0, 4), 16, "registers"),
        ("sm_90", used(16, 0, 1), 32, "blocks"),
        ("sm_90", used(16, 227 * 1024, 4), 1, "shared memory"),
        ("sm_90", used(16, 227 * 1024 + 1, 4), 0, "shared memory"),
        ("sm_80", used(32, 80 * 1024, 4), 2, "shared memory"),
        ("sm_80", used(40, 49152, 16), 3, "registers"),
        ("gfx942", used(128, 32768, 4), 2, "shared memory"),
        ("gfx942", used(256, 0, 4), 2, "registers"),
    ],
)
def test_blocks_of_a_multiprocessor(target, resources, blocks, limit):
    held = occupancy(resources, target)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * resources.num_warps


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("sm_80", "HMMA 16x8x16 f16"),
        ("sm_90", "HGMMA 64x64x16 f16"),
        ("sm_100", "UTCHMMA 64x64"),
        ("gfx942", "32x32x8 f16"),
    ],
)
def test_an_inspection(target, shape):
    label = inspection.Label("mine", "", "float16", "forward", target)
    one = inspection.inspected(product(target=target), label)
    assert 0 < one.registers <= dry.TARGETS[target].registers
    assert one.blocks > 0
    assert 0 < one.warps <= one.most_warps
    assert one.shared <= one.shared_limit
    assert any(shape in name for name in one.shapes)
    assert one.hot["instructions"] < one.instructions
    assert one.per_product is not None
    assert one.per_product >= 1
    assert one.problems == []
    assert one.estimate["flops"] == 2 * 512 * 512 * 256
    row = json.loads(json.dumps(one.to_json()))
    assert row["grid"] == [8, 8, 1]
    assert differences.changes(row, row) == []


def test_copies_of_a_product_are_asynchronous_and_wide():
    label = inspection.Label("mine", "", "float16", "forward", "sm_90", kernel="product_kernel")
    row = inspection.inspected(product(), label).to_json()
    assert row["hot"]["widths"] == {"async copy": {"16": row["hot"]["kinds"]["async copy"]}}
    text = rendered(inspection_tables.table([row], "sm_90"), inspection_tables.details(row))
    for word in ("product_kernel", "HGMMA 64x64x16 f16", "async 16 B", "total"):
        assert word in text
    assert "not measured" in " ".join(inspection_tables.notes(row))


def rendered(*parts):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


def test_a_copy_is_estimated_at_the_bandwidth_of_memory():
    n = 1 << 28
    guess = estimate.of_launch(copied(n), "sm_90")
    assert guess.bound == "DRAM"
    assert guess.dram == 2 * 4 * n
    floor = 2 * 4 * n / estimate.DEVICES["sm_90"].dram * 1e6
    assert floor < guess.us < 1.4 * floor
    twice = estimate.of_launch(copied(2 * n), "sm_90")
    assert 1.9 < twice.us / guess.us < 2.1


def test_a_larger_tile_is_estimated_to_be_faster_and_a_launch_costs_something():
    sides = (4096, 4096, 4096)
    small, large = (
        estimate.of_launch(product(size, sides, num_warps=warps), "sm_90")
        for size, warps in ((32, 4), (128, 8))
    )
    assert small.flops == large.flops == 2 * 4096**3
    assert large.us < small.us / 2
    # not faster than the tensor cores
    assert large.us > large.flops / 989e12 * 1e6
    assert estimate.of_launch(copied(16), "sm_90").us > estimate.MODEL.launch


def test_estimates_of_all_targets():
    for target in dry.TARGETS:
        guess = estimate.of_launch(product(target=target), target)
        assert math.isfinite(guess.us)
        assert guess.us > 0


def test_a_recording_tells_the_passes_apart():
    (spec,) = inspection.own_ops(["relu"])
    x = torch.empty(64, 64, dtype=torch.float16)
    recorded = recording.record(spec.op, {"input": x}, "sm_90", gradients=["input"])
    assert [one.kernel for one in recorded.forward] == ["activation_forward_kernel"]
    assert [one.kernel for one in recorded.backward] == ["activation_backward_kernel"]
    alone = recording.record(spec.op, {"input": x}, "sm_90")
    assert [one.kernel for one in alone.launches] == ["activation_forward_kernel"]


ROW = {
    "op": "mine", "kernel": "k", "registers": 100, "stack": 0, "spills": 0, "shared": 40000,
    "blocks": 2, "problems": [], "per_product": 10.0, "serialized": False, "instructions": 500,
    "hot": {
        "instructions": 40, "kinds": {"TMA load": 2}, "shapes": {"HGMMA 64x256x16 f16": 4},
        "widths": {"async copy": {"16": 4}},
    },
    "widths": {"global load": {"16": 2}}, "estimate": {"us": 100.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"registers": 109}, "registers 100 -> 109: more"),
        ({"stack": 8}, "stack bytes 0 -> 8: spills"),
        ({"shared": 42000}, "shared bytes 40000 -> 42000: more"),
        ({"blocks": 1}, "blocks 2 -> 1: fewer blocks on a multiprocessor"),
        ({"per_product": 10.6}, "instructions per product 10.0 -> 10.6: more"),
        ({"serialized": True}, "every product is waited for"),
        ({"estimate": {"us": 106.0}}, "estimated us 100.0 -> 106.0: slower by the estimate"),
        ({"problems": ["x"]}, "a new problem"),
        ({"widths": {"global load": {"4": 8}}}, "narrower (global load of 4 bytes)"),
        ({"hot": {**ROW["hot"], "shapes": {"HGMMA 64x64x16 f16": 16}}}, "smaller products"),
        ({"hot": {**ROW["hot"], "shapes": {}}}, "no products by tensor cores"),
        ({"hot": {**ROW["hot"], "kinds": {"async copy": 4}}}, "TMA is no longer used"),
    ],
)
def test_a_worsening_is_named(changed, said):
    (change,) = [one for one in differences.changes(ROW, ROW | changed) if one.worse]
    assert said in str(change)
    # and is none the other way round
    assert not any(one.worse for one in differences.changes(ROW | changed, ROW))


def test_small_changes_are_no_worsening():
    new = ROW | {"registers": 108, "shared": 41000, "per_product": 10.4, "instructions": 900}
    found = differences.changes(ROW, new)
    assert [one.what for one in found] == [
        "registers", "shared bytes", "instructions per product", "instructions",
    ]  # fmt: skip
    assert not any(one.worse for one in found)


def invoke(*arguments, status=0):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_a_users_function_is_inspected_and_two_reports_are_compared(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    text = invoke(EXAMPLE, "--arch", "sm_80,sm_90", "--json", first)
    assert "matmul_kernel" in text
    assert "M=1024 K=1024 N=1024" in text
    report = json.loads(first.read_text())
    assert report["kind"] == "inspect"
    assert {row["target"] for row in report["rows"]} == {"sm_80", "sm_90"}
    assert "exists" in invoke(EXAMPLE, "--json", first, status=2)
    report["rows"][0]["registers"] += 40
    report["environment"]["commit"] = "another"
    second.write_text(json.dumps(report))
    compared = invoke("--diff", first, second)
    assert "1 kernels changed, 1 are as they were" in compared
    assert "registers" in compared
    assert "-> another" in compared
    second.write_text("{}")
    assert "no report" in invoke("--diff", first, second, status=2)


def test_a_dtype_that_the_text_fixes_is_the_one_that_is_told():
    def of(text, dtype=torch.float16):
        (found,) = inspection.of_function(inspection.user_function(EXAMPLE, text), "sm_90", dtype)
        return found.label.dtype

    assert of("a[M, K]:float32 b[K, N]:float32") == "float32"
    assert of("a[M, K]:bfloat16 b[K, N]:bfloat16", torch.bfloat16) == "bfloat16"
    assert of("a[M, K] b[K, N]") == "float16"


def test_two_configurations_are_compared():
    options = (
        "--dtypes",
        "float16",
        "--calls",
        "logits",
        "--configs",
        "all",
        "--kernel",
        "forward",
    )
    shown = invoke("softmax", *options)
    assert shown.count("softmax_forward_kernel") >= 3
    compared = invoke("softmax", *options, "--diff", "M 8", "M 1 ")
    assert "1 kernels changed" in compared
    assert "no kernel has the configuration" in invoke(
        "softmax", *options, "--diff", "M 8", "nothing", status=2
    )


def test_configurations_are_ranked():
    (spec,) = inspection.own_ops(["softmax"])
    ((title, entries),) = ranking.of_op(spec, "sm_90", torch.float16, "logits")
    assert title == "softmax logits: softmax_config"
    assert [one.us for one in entries] == sorted(one.us for one in entries)
    assert sum(one.chosen for one in entries) == 1
    # a row of 1000 columns: tiles of 16 go over it many times
    assert entries[-1].entry.kwargs["BLOCK_N"] == 16
    shown = invoke("softmax", "--calls", "logits", "--rank")
    assert shown.count(" us ") == len(entries)
    assert shown.count("chosen") == 1


def test_kernels_are_shown_at_every_stage(tmp_path):
    assert ".version" in invoke("relu", "--calls", "odd", "--emit", "ptx")
    folder = tmp_path / "out"
    stages = [word for stage in ("ttir", "ttgir", "llir", "sass") for word in ("--emit", stage)]
    invoke("relu", "--calls", "odd", "--kernel", "forward", *stages, "--out", folder)
    assert sorted(file.suffix for file in folder.iterdir()) == [".llir", ".sass", ".ttgir", ".ttir"]
    assert "has no amdgcn" in invoke("relu", "--calls", "odd", "--emit", "amdgcn", status=2)
    amd = invoke("relu", "--calls", "odd", "--arch", "gfx942", "--emit", "amdgcn")
    assert "s_endpgm" in amd


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'TARGET'"),
        (("no_such_op",), "no_such_op"),
        (("relu", "--arch", "sm_1"), "expects sm_80, sm_90, sm_100, gfx942, received sm_1"),
        (("relu", "--dtypes", "int4"), "received int4"),
        (("relu", "--out", "x"), "--out needs --emit"),
        ((f"{ROOT}/examples/check/matmul.py:nothing",), "has no 'nothing'"),
        (("no_such_op",), "Error: inspect: expects package"),
        (("relu", "--dtypes", "float33"), "Error: inspect: unknown dtype"),
        ((f"{EXAMPLE}_kernel",), "matmul_kernel is a kernel: name the Python function"),
    ],
)
def test_a_wrong_call_is_refused(arguments, said):
    assert said in invoke(*arguments, status=2)
