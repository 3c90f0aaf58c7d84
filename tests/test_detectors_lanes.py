"""The detectors of what no lane may use: elements nobody wrote, masked lanes, wrapped offsets."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.detected import add_kernel, assert_at, copy_kernel, evens_kernel, line_of, only
from tritorch.testing.detectors import detecting, masked_lane_findings, virtual_tensor

pytestmark = pytest.mark.interpret

# elements that nobody wrote


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
