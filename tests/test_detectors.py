"""The detectors' bounds: each with a tiny broken kernel, at whose line, argument and lane they must
point, and its corrected twin, on which they must be silent.
"""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.detected import add_kernel, assert_at, copy_kernel, only
from tritorch.testing import detectors, shadow
from tritorch.testing.detectors import detecting

pytestmark = pytest.mark.interpret

Pair = namedtuple("Pair", ("first", "second"))


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
    assert finding.source == "tl.store(y_ptr + offs, x, mask=offs < m)"
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
    before = torch.tensor([tensor.data_ptr() for tensor in tensors])
    with detecting() as detector:
        table_kernel[(3,)](before, 12, 16)
        within = torch.tensor([tensor.data_ptr() for tensor in tensors])
        table_kernel[(3,)](within, 12, 16)
    assert detector.findings == []
    assert [tensor.sum().item() for tensor in tensors] == [48.0] * 3


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
