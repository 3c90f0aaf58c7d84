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


def operations(monkeypatch):
    """By numpy's name, what a launch of `add_kernel` computes of two operands."""
    computed = []
    original = triton_interpreter.InterpreterBuilder.binary_op

    def counting(self, lhs, rhs, op):
        computed.append(op)
        return original(self, lhs, rhs, op)

    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "binary_op", counting)
    x = torch.arange(16, dtype=torch.int32)
    y = torch.zeros_like(x)
    with corrected():
        add_kernel[(1,)](x, y, 16)
    assert torch.equal(y, 2 * x)
    return computed


def test_a_sum_of_integers_is_computed_once(monkeypatch):
    assert operations(monkeypatch).count(np.add) == 1


def test_without_shortcuts_it_is_computed_more_often(monkeypatch):
    without(monkeypatch)
    assert operations(monkeypatch).count(np.add) > 1


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


def made():
    """Types whose lengths or elements are alike, each described as the first and the second."""
    elements = (tl.int32, tl.float16, tl.pointer_type(tl.float32), tl.pointer_type(tl.int32))
    shapes = ([16], [16, 1], [1, 16], [4, 4], tl.tuple([4, 4]), [tl.constexpr(4), tl.constexpr(4)])
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
        assert one.shape is other.shape
        assert one != tl.block_type(tl.int32, [16])
        assert one != tl.block_type(tl.uint32, [4, 4])
        # of one name
        near, far = (tl.pointer_type(tl.int32, space) for space in (1, 3))
        assert tl.block_type(near, [4]) != tl.block_type(far, [4])
        assert tl.int32 == tl.dtype("int32")
        assert tl.int32 != tl.uint32
        with pytest.raises(TypeError, match="0d block_type"):
            tl.block_type(tl.int32, [])
        with pytest.raises(AssertionError):
            tl.block_type(tl.int32, (4, 4))


def test_what_triton_lacks_is_not_replaced(monkeypatch):
    monkeypatch.setattr(shortcuts, "_patches", [])
    monkeypatch.delattr(tl.semantic.TritonSemantic, "binary_op_sanitize_overflow_impl")
    monkeypatch.setattr(shortcuts, "_originals", {})
    names = [name for _, name, _ in shortcuts._found()]
    assert "broadcast_impl_value" in names
    assert "binary_op_sanitize_overflow_impl" not in names
