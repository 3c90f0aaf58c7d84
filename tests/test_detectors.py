"""The detectors: each with a tiny broken kernel, at whose line, argument and lane it must point,
and its corrected twin, on which it must be silent.
"""

from __future__ import annotations

import inspect
import time
from collections import namedtuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import cases, detectors, shadow, watch
from tritorch.testing import detector as detector_module
from tritorch.testing.detectors import (
    ProgramOrderError,
    detecting,
    masked_lane_findings,
    virtual_tensor,
)
from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret

Pair = namedtuple("Pair", ("first", "second"))


def line_of(kernel, text):
    """The line of the kernel's file where the text is, which must be there once."""
    lines, start = inspect.getsourcelines(kernel.fn)
    (found,) = [start + i for i, line in enumerate(lines) if text in line]
    return found


def only(detector, kind):
    """The one finding, of that kind."""
    assert [finding.kind for finding in detector.findings] == [kind], detector.findings
    return detector.findings[0]


def assert_at(finding, kernel, text, argument, program, lanes, count):
    assert finding.file == __file__
    assert finding.line == line_of(kernel, text)
    assert finding.argument == argument
    assert finding.program == program
    assert finding.lanes == lanes
    assert finding.count == count


# memory out of bounds


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, m, BLOCK: tl.constexpr):
    # a comment before the first statement

    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.store(
        y_ptr + offs,
        x,
        mask=offs < m,
    )


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def shift_kernel(x_ptr, y_ptr, by, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + by))


def test_a_read_past_the_end():
    x, y = torch.ones(33), torch.zeros(33)
    with detecting() as detector:
        copy_kernel[(3,)](x, y, 48, 33, 16)
    finding = only(detector, "out-of-bounds read")
    lanes = ((1,), (2,), (3,), (4,))
    assert_at(finding, copy_kernel, "x = tl.load", "x_ptr", (2, 0, 0), lanes, 15)
    assert finding.kernel == "copy_kernel"
    assert finding.source == "x = tl.load(x_ptr + offs, mask=offs < n, other=0)"
    assert finding.message == (
        "loads 15 elements past the end of `x_ptr` (33 elements, shape (33,)), at offsets 33 to 47"
    )
    assert y.tolist() == x.tolist()


def test_a_write_past_the_end_is_left_out():
    storage = torch.zeros(48)
    with detecting() as detector:
        copy_kernel[(3,)](torch.ones(48), storage[:33], 48, 48, 16)
    finding = only(detector, "out-of-bounds write")
    lanes = ((1,), (2,), (3,), (4,))
    assert_at(finding, copy_kernel, "tl.store(", "y_ptr", (2, 0, 0), lanes, 15)
    assert finding.source == "tl.store( y_ptr + offs, x, mask=offs < m, )"
    assert storage.tolist() == [1.0] * 33 + [0.0] * 15


@pytest.mark.parametrize("order", ["forward", "reverse", 0, 1])
def test_a_masked_copy_is_in_bounds(order):
    x, y = torch.arange(33.0), torch.zeros(33)
    with detecting(order=order) as detector:
        copy_kernel[(3,)](x, y, 33, 33, 16)
    assert detector.findings == []
    assert torch.equal(x, y)
    assert detector.launches == [detectors.Launch("copy_kernel", (3, 1, 1), {"BLOCK": 16}, 3)]


def test_an_atomic_past_the_end_is_left_out():
    storage = torch.zeros(16)
    with detecting() as detector:
        add_kernel[(1,)](torch.ones(16), storage[:12], 16, 16)
    finding = only(detector, "out-of-bounds atomic")
    lanes = ((12,), (13,), (14,), (15,))
    assert_at(finding, add_kernel, "tl.atomic_add", "y_ptr", (0, 0, 0), lanes, 4)
    assert storage.tolist() == [1.0] * 12 + [0.0] * 4
    with detecting() as detector:
        add_kernel[(1,)](torch.ones(16), storage[:12], 12, 16)
    assert detector.findings == []


def test_a_read_before_the_start_gives_poison():
    x, y = torch.ones(20), torch.zeros(16)
    with detecting() as detector:
        shift_kernel[(1,)](x[4:], y, -2, 16)
    finding = only(detector, "out-of-bounds read")
    assert finding.lanes == ((0,), (1,))
    assert "2 elements before the start of `x_ptr`" in finding.message
    assert "at offsets -2 to -1" in finding.message
    assert y.isnan().tolist() == [True] * 2 + [False] * 14


def test_the_memory_of_another_argument_is_out_of_bounds():
    both = torch.ones(32)
    with detecting() as detector:
        shift_kernel[(1,)](both[:16], both[16:], 8, 16)
    assert only(detector, "out-of-bounds read").argument == "x_ptr"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.bfloat16])
def test_bounds_are_of_every_dtype(dtype):
    x, y = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    with detecting() as detector:
        shift_kernel[(1,)](x, y, 1, 16)
    assert only(detector, "out-of-bounds read").lanes == ((15,),)


@triton.jit
def rows_kernel(x_ptr, y_ptr, stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride + offs, mask=offs < COLUMNS, other=0)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, x)


def test_the_gaps_of_a_view_are_out_of_bounds():
    x, y = torch.ones(3, 16), torch.zeros(3, 16)
    with detecting() as detector:
        rows_kernel[(3,)](x[:, :12], y, 16, 16, 16)
    finding = only(detector, "out-of-bounds read")
    lanes = ((12,), (13,), (14,), (15,))
    assert_at(finding, rows_kernel, "x = tl.load", "x_ptr", (0, 0, 0), lanes, 12)
    assert "between the elements of `x_ptr` (36 elements, shape (3, 12))" in finding.message
    with detecting() as detector:
        rows_kernel[(3,)](x[:, :12], y, 16, 12, 16)
    assert detector.findings == []
    with detecting(extent="storage") as detector:
        rows_kernel[(3,)](x[:, :12], y, 16, 16, 16)
    assert detector.findings == []


@pytest.mark.parametrize(
    ("shape", "strides", "inside"),
    [
        ((4,), (1,), [0, 1, 2, 3]),
        ((4,), (2,), [0, 2, 4, 6]),
        ((2, 3), (1, 2), [0, 1, 2, 3, 4, 5]),
        ((2, 2, 2), (7, 1, 3), [0, 1, 3, 4, 7, 8, 10, 11]),
        ((3, 1), (0, 5), [0]),
        ((3, 3), (1, 1), [0, 1, 2, 3, 4]),
        ((2, 3), (3, 2), [0, 2, 3, 4, 5, 7]),
        ((0, 3), (3, 1), []),
        ((), (), [0]),
    ],
)
def test_an_extent_is_the_elements_of_the_view(shape, strides, inside):
    storage = torch.zeros(32, dtype=torch.int16)
    view = storage.as_strided(shape, strides, 8)
    extent = shadow.Extent("x", view)
    offsets = torch.arange(-8, 24)
    addresses = (storage.data_ptr() + 2 * (8 + offsets)).numpy().astype("uint64")
    assert offsets[~torch.from_numpy(extent.outside(addresses, 2))].tolist() == inside


@triton.jit
def block_kernel(x_ptr, y_ptr, n, CHECK: tl.constexpr):
    if CHECK:
        x = tl.load(tl.make_block_ptr(x_ptr, (n,), (1,), (8,), (16,), (0,)), boundary_check=(0,))
    else:
        x = tl.load(tl.make_block_ptr(x_ptr, (n,), (1,), (8,), (16,), (0,)))
    tl.store(y_ptr + tl.arange(0, 16), tl.where(tl.arange(0, 16) < 12, x, 0))


@pytest.mark.skipif(
    not hasattr(triton_interpreter, "BlockPointerHandle"),
    reason="Triton has no block pointers since 3.9",
)
# deprecated in 3.7
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr")
def test_a_block_pointer_out_of_bounds():
    x, y = torch.ones(20), torch.zeros(16)
    with detecting() as detector:
        block_kernel[(1,)](x, y, 20, False)
    finding = only(detector, "out-of-bounds read")
    lanes = ((12,), (13,), (14,), (15,))
    assert_at(finding, block_kernel, "(0,)))", "x_ptr", (0, 0, 0), lanes, 4)
    with detecting() as detector:
        block_kernel[(1,)](x, y, 20, True)
    assert detector.findings == []


@triton.jit
def device_descriptor_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    y = tl.make_tensor_descriptor(y_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    tile = x.load([0, 0])
    y.store([0, 0], tile)


@triton.jit
def host_descriptor_kernel(x, y):
    y.store([0, 0], x.load([0, 0]))


def test_a_descriptor_made_on_the_device():
    x, y = torch.ones(6, 16), torch.zeros(6, 16)
    with detecting() as detector:
        device_descriptor_kernel[(1,)](x, y, 7, 8)
    read, write = detector.findings
    assert (read.kind, write.kind) == ("out-of-bounds read", "out-of-bounds write")
    lanes = ((6, 0), (6, 1), (6, 2), (6, 3))
    assert_at(read, device_descriptor_kernel, "x.load", "x_ptr", (0, 0, 0), lanes, 16)
    assert_at(write, device_descriptor_kernel, "y.store", "y_ptr", (0, 0, 0), lanes, 16)
    with detecting() as detector:
        device_descriptor_kernel[(1,)](x, y, 6, 8)
    assert detector.findings == []
    assert torch.equal(x, y)


def test_a_descriptor_made_on_the_host():
    x, y = torch.ones(6, 16), torch.zeros(8, 16)
    with detecting() as detector:
        host_descriptor_kernel[(1,)](
            TensorDescriptor(x, [7, 16], [16, 1], [8, 16]),
            TensorDescriptor.from_tensor(y, [8, 16]),
        )
    finding = only(detector, "out-of-bounds read")
    lanes = ((6, 0), (6, 1), (6, 2), (6, 3))
    assert_at(finding, host_descriptor_kernel, "y.store", "x", (0, 0, 0), lanes, 16)
    with detecting() as detector:
        host_descriptor_kernel[(1,)](
            TensorDescriptor.from_tensor(x, [8, 16]), TensorDescriptor.from_tensor(y, [8, 16])
        )
    assert detector.findings == []


@triton.jit
def tuple_kernel(ptrs, pair, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(pair.second + offs, tl.load(ptrs[0] + offs) + tl.load(ptrs[1] + offs))


@pytest.mark.parametrize(
    ("sizes", "kind", "argument"),
    [
        ((16, 16, 16), None, None),
        ((16, 12, 16), "out-of-bounds read", "ptrs[1]"),
        ((16, 16, 12), "out-of-bounds write", "pair.second"),
    ],
)
def test_tensors_in_tuples(sizes, kind, argument):
    first, second, third = (torch.ones(size) for size in sizes)
    with detecting() as detector:
        tuple_kernel[(1,)]((first, second), Pair(first, third), 16)
    assert [finding.argument for finding in detector.findings] == ([argument] if kind else [])
    assert [finding.kind for finding in detector.findings] == ([kind] if kind else [])


def test_a_reinterpreted_tensor():
    x, y = torch.ones(15, dtype=torch.int16), torch.zeros(16, dtype=torch.float16)
    with detecting() as detector:
        shift_kernel[(1,)](triton.reinterpret(x, tl.float16), y, 0, 16)
    assert only(detector, "out-of-bounds read").argument == "x_ptr"
    with detecting() as detector:
        shift_kernel[(1,)](triton.reinterpret(x, tl.float16), y[:15], 0, 8)
    assert detector.findings == []


@triton.jit
def table_kernel(table_ptr, n, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n, other=0), mask=offs < n)


def test_a_table_of_pointers_may_lead_to_any_tensor():
    tensors = [torch.ones(12) for _ in range(3)]
    table = torch.tensor([tensor.data_ptr() for tensor in tensors])
    with detecting() as detector:
        table_kernel[(3,)](table, 12, 16)
    assert detector.findings == []
    assert [tensor.sum().item() for tensor in tensors] == [24.0] * 3


def test_a_table_of_null_pointers():
    with detecting() as detector:
        table_kernel[(2,)](torch.zeros(2, dtype=torch.int64), 12, 16)
    read, write = detector.findings
    assert (read.message, write.message) == (
        "loads through a null pointer",
        "stores through a null pointer",
    )
    assert (read.count, write.count) == (24, 24)


@triton.jit
def load_row(x_ptr, row, BLOCK: tl.constexpr):
    return tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK))


@triton.autotune([triton.Config({}, num_warps=1)], key=[])
@triton.heuristics({"TWICE": lambda arguments: arguments["BLOCK"] > 1})
@triton.jit
def calling_kernel(
    x_ptr,
    y_ptr,
    BLOCK: tl.constexpr,
    TWICE: tl.constexpr,
):
    # a comment

    x = (
        load_row(
            x_ptr,
            tl.program_id(0),
            BLOCK,
        )
        + 1
    )
    tl.store(
        y_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK),
        x,
    )


def test_the_line_is_of_the_innermost_function_and_the_kernel_is_named():
    kernel = calling_kernel.fn.fn
    with detecting() as detector:
        calling_kernel.fn[(2,)](torch.ones(16), torch.ones(31), 16)
    read, write = detector.findings
    lanes = ((0,), (1,), (2,), (3,))
    assert_at(read, load_row, "return tl.load", "x_ptr", (1, 0, 0), lanes, 16)
    assert read.kernel == "calling_kernel"
    assert_at(write, kernel, "    tl.store(", "y_ptr", (1, 0, 0), ((15,),), 1)
    assert detector.launches[0].constants == {"BLOCK": 16, "TWICE": True}


# elements that nobody wrote


@triton.jit
def evens_kernel(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * STEP, tl.load(x_ptr + offs, mask=offs < n, other=0), mask=offs < n)


ALLOCATIONS = {
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "empty_like": lambda x: torch.empty_like(x),
    "empty_strided": lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(x.shape),
    "new_empty_strided": lambda x: x.new_empty_strided(x.shape, x.stride()),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool]


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_is_half_written(dtype, allocate):
    x = torch.ones(16, dtype=dtype)
    with detecting() as detector:
        y = allocate(x)
        evens_kernel[(1,)](x, y, 8, 2, 16)
        assert detector.findings == []
        detector.check_written({"output 0": y})
    finding = only(detector, "unwritten output")
    lanes = ((1,), (3,), (5,), (7,))
    assert_at(finding, evens_kernel, "tl.store", "y_ptr", None, lanes, 8)
    assert finding.kernel == "evens_kernel"
    assert finding.message == (
        "8 of the 16 elements of `output 0` (shape (16,)) are never written; evens_kernel got it"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_is_written(dtype):
    x = torch.ones(16, dtype=dtype)
    with detecting() as detector:
        whole, rest, view = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        evens_kernel[(1,)](x, whole, 16, 1, 16)
        rest[1::2] = 0
        evens_kernel[(1,)](x, rest, 8, 2, 16)
        evens_kernel[(1,)](x, view, 8, 2, 16)
        detector.check_written({"whole": whole, "rest": rest, "view": view[::2], "torch": x + 1})
    assert detector.findings == []
    assert rest.tolist() == [1, 0] * 8


def test_an_output_that_no_kernel_got():
    with detecting() as detector:
        y = torch.empty(4)
        detector.check_written({"y": y})
    finding = only(detector, "unwritten output")
    assert (finding.count, finding.kernel, finding.argument) == (4, "", "y")
    assert finding.message.endswith("no kernel got it")


@triton.jit
def halves_kernel(y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    narrow = y_ptr.to(tl.pointer_type(tl.int16))
    tl.store(narrow + 2 * offs, tl.zeros((BLOCK,), tl.int16))


def test_an_element_that_is_half_written():
    with detecting() as detector:
        y, z = torch.empty(16, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
        halves_kernel[(1,)](y, 16)
        evens_kernel[(1,)](y, z, 16, 1, 16)
        detector.check_written({"y": y, "z": z})
    read, unwritten = detector.findings
    assert (read.kind, read.argument) == ("uninitialised read", "x_ptr")
    assert (unwritten.kind, unwritten.count) == ("unwritten output", 16)


def test_a_read_of_what_nobody_wrote():
    with detecting() as detector:
        x, y = torch.empty(16), torch.zeros(16)
        x[:12] = 1
        copy_kernel[(1,)](x, y, 16, 16, 16)
    finding = only(detector, "uninitialised read")
    lanes = ((12,), (13,), (14,), (15,))
    assert_at(finding, copy_kernel, "x = tl.load", "x_ptr", (0, 0, 0), lanes, 4)
    with detecting() as detector:
        x = torch.empty(16)
        x[:12] = 1
        copy_kernel[(1,)](x, y, 12, 16, 16)
    assert detector.findings == []


def test_a_sum_into_what_nobody_wrote():
    with detecting() as detector:
        add_kernel[(1,)](torch.ones(16), torch.empty(16), 16, 16)
    assert only(detector, "uninitialised read").argument == "y_ptr"
    with detecting() as detector:
        add_kernel[(1,)](torch.ones(16), torch.empty(16).zero_(), 16, 16)
    assert detector.findings == []


# masked lanes


@triton.jit
def two_loads_kernel(x_ptr, y_ptr, z_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n, other=OTHER)
    z = tl.max(tl.where(offs < n, x, 0) + y, axis=0)
    tl.store(z_ptr, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_masked_lane_that_changes_the_result(dtype, sign):
    x, y = torch.ones(12, dtype=dtype), torch.ones(12, dtype=dtype)

    def run():
        z = torch.zeros(1, dtype=dtype)
        two_loads_kernel[(1,)](x, sign * y, z, 12, None, 16)
        return [z]

    (finding,) = masked_lane_findings(run)
    assert finding.kind == "masked lane"
    lanes = ((12,), (13,), (14,), (15,))
    assert_at(finding, two_loads_kernel, "y = tl.load", "y_ptr", (0, 0, 0), lanes, 4)
    assert "1 of 1 elements of result 0" in finding.message


def test_a_masked_lane_that_changes_nothing_and_how_often_that_runs():
    x, runs = torch.ones(12), []

    def run(other):
        z = torch.zeros(1)
        two_loads_kernel[(1,)](x, x, z, 12, other, 16)
        runs.append(z)
        return [z]

    assert masked_lane_findings(lambda: run(0)) == []
    assert len(runs) == 3
    assert masked_lane_findings(lambda: run(0), sites=()) == []
    assert len(runs) == 3


@triton.jit
def gather_kernel(index_ptr, x_ptr, y_ptr, n, SAFE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offs, mask=offs < n)
    if SAFE:
        index = tl.where(offs < n, index, 0)
    tl.store(y_ptr + offs, tl.load(x_ptr + index * 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_masked_lane_as_an_address_is_no_second_finding(dtype):
    index, x, y = torch.arange(12).to(dtype), torch.ones(24), torch.zeros(16)
    with detecting() as detector:
        gather_kernel[(1,)](index, x, y, 12, False, 16)
    finding = only(detector, "masked lane")
    lanes = ((12,), (13,), (14,), (15,))
    text = "index = tl.load"
    assert_at(finding, gather_kernel, text, "index_ptr", (0, 0, 0), lanes, 4)
    with detecting() as detector:
        gather_kernel[(1,)](index, x, y, 12, True, 16)
    assert detector.findings == []


def test_what_was_not_loaded_is_no_address_of_a_second_finding():
    index, x, y = torch.arange(12), torch.ones(24), torch.zeros(16)
    with detecting() as detector:
        gather_kernel[(1,)](index, x, y, 16, False, 16)
    assert only(detector, "out-of-bounds read").argument == "index_ptr"


# offsets of more than 32 bits


@triton.jit
def strided_rows_kernel(x_ptr, y_ptr, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    start = row * stride
    offs = start + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * BLOCK + tl.arange(0, BLOCK), tl.load(x_ptr + offs))


def test_an_offset_of_more_than_32_bits():
    x = virtual_tensor((4, 16), (2**30, 1))
    x.copy_(torch.arange(64.0).reshape(4, 16))
    y = torch.zeros(4, 16)
    with detecting() as detector:
        strided_rows_kernel[(4,)](x, y, 2**30, False, 16)
    finding = only(detector, "int32 overflow")
    lanes = ((0,), (1,), (2,), (3,))
    assert_at(finding, strided_rows_kernel, "start = row", "x_ptr", (2, 0, 0), lanes, 32)
    load = line_of(strided_rows_kernel, "tl.load")
    assert finding.message == (
        "a 32-bit product of 2147483648 wraps around to -2147483648, and is an address at line "
        f"{load}"
    )
    with detecting() as detector:
        strided_rows_kernel[(4,)](x, y, 2**30, True, 16)
    assert detector.findings == []
    assert torch.equal(x, y)


@triton.jit
def shapes_kernel(x_ptr, y_ptr, stride, HOW: tl.constexpr):
    offs = tl.arange(0, 16)
    far = offs * stride
    if HOW == "reshape":
        far = tl.reshape(tl.reshape(far, (4, 4)), (16,))
    elif HOW == "transpose":
        far = tl.reshape(tl.trans(tl.reshape(far, (4, 4))), (16,))
    elif HOW == "T":
        far = tl.reshape(tl.reshape(far, (4, 4)).T, (16,))
    elif HOW == "broadcast":
        far = tl.reshape(tl.broadcast_to(far[:, None], (16, 2)), (32,))
    elif HOW == "expand":
        far = far[:, None] + tl.arange(0, 2)[None, :]
    elif HOW == "join":
        far = tl.join(far, offs)
    elif HOW == "split":
        far, _ = tl.split(tl.join(far, offs))
    elif HOW == "where":
        far = tl.where(offs < 12, far, 0)
    elif HOW == "cast":
        far = far.to(tl.int64) + 1
    elif HOW == "divide":
        far = far // 2
    elif HOW == "remainder":
        far = far % 7
    elif HOW == "pointer":
        tl.store(y_ptr + offs, tl.load((x_ptr + far) + 1))
    if HOW == "masked":
        tl.store(y_ptr + offs, tl.load(x_ptr + far, mask=offs < 2, other=0))
    elif HOW == "hidden":
        tl.store(y_ptr + offs, tl.load(x_ptr + tl.where(offs < 2, far, 0)))
    elif HOW == "value":
        tl.store(y_ptr + offs, far.to(tl.float32))
    elif HOW == "hash":
        mixed = (far ^ (far >> 3)) & 15
        tl.store(y_ptr + offs, tl.load(x_ptr + mixed))
    elif HOW == "unsigned":
        mixed = far.to(tl.uint32) * 2654435769 % 16
        tl.store(y_ptr + offs, tl.load(x_ptr + mixed))
    elif HOW == "random":
        tl.store(y_ptr + offs, tl.load(x_ptr + tl.randint(far, offs) % 16) + tl.rand(7, far))
    elif HOW != "pointer":
        tl.load(x_ptr + far)


HOWS = ["reshape", "transpose", "T", "broadcast", "expand", "join", "split", "where", "cast"]


@pytest.mark.parametrize("how", [*HOWS, "divide", "remainder", "pointer"])
def test_a_wrapped_offset_is_followed_to_the_address(how):
    x, y = virtual_tensor((2**34,), (1,), torch.int8), torch.zeros(16)
    with detecting() as detector:
        shapes_kernel[(1,)](x[2**33 :], y, 2**29, how)
    finding = only(detector, "int32 overflow")
    assert finding.line == line_of(shapes_kernel, "far = offs * stride")
    assert finding.count == {"broadcast": 24, "expand": 24, "where": 8}.get(how, 12)


@pytest.mark.parametrize("how", ["masked", "hidden", "value", "hash", "unsigned", "random"])
def test_a_wrapped_number_that_is_no_address(how):
    x, y = torch.ones(2**4, dtype=torch.int8), torch.zeros(16)
    stride = 2**29 if how in ("masked", "hidden") else 2**30 + 1
    if how in ("masked", "hidden"):
        x = virtual_tensor((2**30,), (1,), torch.int8)
    with detecting() as detector:
        shapes_kernel[(1,)](x, y, stride, how)
    assert detector.findings == []


@triton.jit
def narrowing_kernel(x_ptr, y_ptr, stride: tl.int64, BLOCK: tl.constexpr):
    offs = (tl.program_id(0) * stride).to(tl.int32)
    tl.store(y_ptr + tl.program_id(0), tl.load(x_ptr + offs))


def test_a_cast_to_32_bits():
    x = virtual_tensor((4,), (2**30,))
    with detecting() as detector:
        narrowing_kernel[(4,)](x, torch.zeros(4), 2**30, 16)
    finding = only(detector, "int32 overflow")
    assert finding.line == line_of(narrowing_kernel, ".to(tl.int32)")
    assert "a 32-bit cast of 2147483648" in finding.message


@triton.jit
def descriptor_offset_kernel(x_ptr, y_ptr, step, n: tl.int64):
    x = tl.make_tensor_descriptor(x_ptr, [n], [1], [16])
    tl.store(y_ptr + tl.arange(0, 16), x.load([step * 4]))


def test_an_offset_of_a_descriptor():
    x, y = virtual_tensor((2**32,), (1,)), torch.zeros(16)
    with detecting() as detector:
        descriptor_offset_kernel[(1,)](x, y, 2**29, 2**32)
    finding = only(detector, "int32 overflow")
    assert finding.line == line_of(descriptor_offset_kernel, "step * 4")


def test_only_the_corners_of_a_large_grid_run():
    x, y = virtual_tensor((2**31 + 48,), (1,), torch.int8), virtual_tensor((2**31 + 48,), (1,))
    with detecting(virtual=True) as detector:
        copy_kernel[(2**27 + 3,)](x, y, 2**31 + 48, 2**31 + 48, 16)
    assert detector.launches[0].programs == 2**27 + 3
    assert only(detector, "int32 overflow").program == (2**27 + 1, 0, 0)


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


# the context


def attributes():
    """Every attribute of what the detectors patch."""
    owners = (
        triton_interpreter,
        triton_interpreter.InterpreterBuilder,
        triton_interpreter.TensorHandle,
        triton_interpreter.TensorDescHandle,
        triton_interpreter.GridExecutor,
        torch.Tensor,
        torch,
    )
    return {
        (owner.__name__, name): value for owner in owners for name, value in vars(owner).items()
    }


def test_nothing_stays_patched():
    before = attributes()
    with detecting():
        assert attributes() != before
    assert attributes() == before
    with pytest.raises(ZeroDivisionError), detecting():
        raise ZeroDivisionError
    assert attributes() == before
    with corrected():
        inside = attributes()
        with detecting(), corrected(), detecting(order="reverse"):
            copy_kernel[(1,)](torch.ones(16), torch.empty(16), 16, 16, 16)
        assert attributes() == inside
    assert attributes() == before


def test_the_innermost_detector_sees_the_launch():
    x, y = torch.ones(16), torch.zeros(16)
    with detecting() as outer:
        with detecting() as inner:
            copy_kernel[(1,)](x, y[:8], 16, 16, 16)
        copy_kernel[(1,)](x, y, 16, 16, 16)
    assert (len(outer.launches), len(inner.launches)) == (1, 1)
    assert outer.findings == []
    assert only(inner, "out-of-bounds write").count == 8


def test_an_error_of_the_kernel_comes_through():
    with detecting() as detector:
        with pytest.raises(InterpreterError, match="power of 2"):
            copy_kernel[(1,)](torch.ones(16), torch.zeros(16), 16, 16, 12)
        copy_kernel[(1,)](torch.ones(16), torch.zeros(16), 16, 16, 16)
    assert detector.findings == []


def test_a_missing_private_part_is_named(monkeypatch):
    monkeypatch.setattr(watch, "_patches", [])
    monkeypatch.setattr(watch, "_marks_patches", [])
    after = attributes()
    monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_addptr")
    expected = rf"triton {triton.__version__} has no InterpreterBuilder\.create_addptr"
    with pytest.raises(RuntimeError, match=expected):
        detecting().__enter__()
    monkeypatch.undo()
    with detecting():
        pass
    assert attributes() == after


@pytest.mark.parametrize("options", [{"order": "backwards"}, {"extent": "tensor"}])
def test_an_option_that_is_not_one(options):
    with pytest.raises(ValueError, match="detecting: "):
        detecting(**options)


# tritorch's own kernels


@pytest.mark.parametrize("order", ["forward", "reverse", 3])
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_our_own_kernels_are_found_clean(spec, order):
    name = next(s.name for s in spec.samples(Maker(torch.float32, "meta")) if s.layouts)
    given = dict(cases.sample_of(spec, name, Maker(torch.float32, "cpu", name)).arguments)
    with detecting(order=order) as detector:
        grad = cases.random_gradient(name, None)
        outcome = cases.run(spec.op, spec, given, grad_outputs=grad)
        detector.check_written(dict(outcome.named()))
    assert detector.launches
    assert detector.findings == []


def test_detecting_costs_less_than_twice_the_corrected_interpreter_again():
    spec = next(spec for spec in specs() if spec.name == "matmul")
    name = next(s.name for s in spec.samples(Maker(torch.float32, "meta")) if s.layouts)
    given = dict(cases.sample_of(spec, name, Maker(torch.float32, "cpu", name)).arguments)

    def seconds(context):
        with context:
            spec.op(**given)
            taken = []
            for _ in range(7):
                start = time.perf_counter()
                spec.op(**given)
                taken.append(time.perf_counter() - start)
        return min(taken)

    # the least of several, and one more try: others use the machine too
    assert any(seconds(detecting()) < 3 * seconds(corrected()) for _ in range(3))
