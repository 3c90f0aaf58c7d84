"""The interpreter's shortcuts: fewer computations, the same values and types."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from tritorch.testing import shortcuts
from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret


@triton.jit
def integers_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, (x * n + offs - 3) // (offs + 1) % 1000)


@triton.jit
def add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + x)


@triton.jit
def tiles_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows * N + columns)
    half = x.to(tl.float16)
    wide = (half + tl.sum(x, axis=1, keep_dims=True)) * tl.max(x, axis=0)[None, :] - 0.5
    kept = tl.where((rows >= columns) & (wide > 0), wide, tl.trans(tl.reshape(x, (N, M))))
    tl.store(y_ptr + rows * N + columns, kept.to(tl.bfloat16) + tl.sum(tl.sum(x, 0), 0))


def without(monkeypatch):
    """The interpreter is corrected alone."""
    monkeypatch.setattr(shortcuts, "patch", lambda: None)
    monkeypatch.setattr(shortcuts, "restore", lambda: None)


def integers(n):
    x = torch.arange(16, dtype=torch.int32) * 1_000_003
    y = torch.zeros_like(x)
    integers_kernel[(1,)](x, y, n, 16)
    return y


def tiles():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(x)
    tiles_kernel[(1,)](x, y, 16, 8)
    return y


# the second wraps around
@pytest.mark.parametrize("run", [lambda: integers(3), lambda: integers(2**20 + 1), tiles])
def test_values_are_those_of_the_interpreter(run, monkeypatch):
    with corrected():
        found = run()
    without(monkeypatch)
    with corrected():
        expected = run()
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def add():
    x = torch.arange(16, dtype=torch.int32)
    y = torch.zeros_like(x)
    with corrected():
        add_kernel[(1,)](x, y, 16)
    assert torch.equal(y, 2 * x)


def counted(monkeypatch, owner, name):
    """Calls of Triton's own while `add_kernel` runs, not for the first time."""
    add()
    calls = []
    original = getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    add()
    return len(calls)


# what is left: in each of two addresses a scalar meets a block
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (tl.semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", 0),
        (tl.semantic.TritonSemantic, "broadcast_impl_value", 2),
        (tl.block_type, "__init__", 0),
        (tl.tensor, "__init__", 0),
        (triton_interpreter.InterpreterBuilder, "create_add", 1),
    ],
)
def test_tritons_own_is_left_out(owner, name, calls, monkeypatch):
    assert counted(monkeypatch, owner, name) == calls
    without(monkeypatch)
    assert counted(monkeypatch, owner, name) > calls


def overflowing():
    x = torch.full((16,), 2**30, dtype=torch.int32)
    y = torch.zeros_like(x)
    with corrected():
        add_kernel[(1,)](x, y, 16)
    return y


def test_a_sum_wraps_around_unless_the_interpreter_is_told_to_assert(monkeypatch):
    assert (overflowing() == -(2**31)).all()
    builder = triton_interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation add"):
        overflowing()


def described(type):
    """The attributes of a type and of a tensor of it, in words."""
    tensor = tl.tensor(None, type)
    return [
        {name: str(value) for name, value in vars(one).items()} | {"class": str(one.__class__)}
        for one in (type, tensor)
    ]


ELEMENTS = (tl.int32, tl.float32, tl.uint32, tl.pointer_type(tl.float32), tl.pointer_type(tl.int32))


def made():
    """Types whose lengths or elements are alike, each described as the first and the second."""
    four = tl.constexpr(4)
    shapes = ([16], [16, 1], [1, 16], [4, 4], tl.tuple([4, 4]), [four, four], tl.tuple([four, 4]))
    elements = (*ELEMENTS, tl.constexpr(tl.float32))
    types = [tl.block_type(element, shape) for element in elements for shape in shapes]
    return [described(type) for type in [*types, tl.int32, tl.pointer_type(tl.int8)]]


def test_types_are_those_of_triton():
    expected = made()
    with corrected():
        assert made() == expected
        assert made() == expected


def test_types_are_equal_where_tritons_are():
    with corrected():
        one, other = (tl.block_type(tl.int32, [4, 4]) for _ in range(2))
        assert one == other
        assert one.shape is other.shape is tl.block_type(tl.float16, [4, 4]).shape
        assert one != tl.block_type(tl.int32, [16])
        assert one != tl.block_type(tl.uint32, [4, 4])
        # of one name
        near, far = (tl.pointer_type(tl.int32, space) for space in (1, 3))
        assert tl.block_type(near, [4]) != tl.block_type(far, [4])
        assert tl.int32 == tl.dtype("int32")
        assert tl.int32 == tl.constexpr(tl.int32)
        assert tl.int32 != tl.uint32


# each is equal to 4 or 1, or has it
NO_LENGTHS = ([4.0], [True], [np.int32(4)], [], (4,), range(4, 5), {4: 1}, 4, None)


def refusals():
    found = []
    for shape in NO_LENGTHS:
        try:
            found.append(str(tl.block_type(tl.float32, shape).shape))
        except (AssertionError, AttributeError, TypeError) as error:
            found.append((type(error), str(error)))
    return found


def test_shapes_that_are_none_are_refused_as_by_triton():
    expected = refusals()
    with corrected():
        for length in (1, 4):
            tl.block_type(tl.float32, [length])
        assert refusals() == expected
        # a number is no truth value for another type that has it
        assert str(tl.block_type(tl.float32, [1]).shape) == "['1']"


def test_attributes_of_subclasses_are_their_own():
    class Tagged(tl.tensor):
        def __init__(self, handle, type, tag):
            self.tag = tag
            super().__init__(handle, type)

    with corrected():
        # that of no other test
        type = tl.block_type(tl.int8, [2, 2, 2])
        first, second = (Tagged(None, type, tag) for tag in ("first", "second"))
        assert (first.tag, second.tag) == ("first", "second")
        assert "tag" not in vars(tl.tensor(None, type))


def test_types_made_outside_are_not_kept():
    with corrected():
        known = len(shortcuts._tensors)
    for length in (1, 2, 4, 8):
        type = tl.block_type(tl.int64, [length, 32])
        with corrected():
            assert [int(n) for n in tl.tensor(None, type).shape] == [length, 32]
    assert len(shortcuts._tensors) == known


class NoTensor:
    """A language without the class, which the interpreter itself could not do with."""

    semantic = tl.semantic

    class core:
        dtype, block_type = tl.dtype, tl.block_type


def test_what_triton_lacks_is_not_replaced(monkeypatch):
    monkeypatch.delattr(tl.semantic.TritonSemantic, "broadcast_impl_value")
    monkeypatch.setattr(shortcuts.importlib, "import_module", lambda name: NoTensor)
    found = {(owner.__name__, name) for owner, name, _ in shortcuts._found()}
    assert found == {
        ("TritonSemantic", "binary_op_sanitize_overflow_impl"),
        ("dtype", "__eq__"),
        ("block_type", "__init__"),
    }
