"""Variables of loops in interpreted kernels, which are scalars where a kernel converts them."""

import builtins

import pytest
import torch
import triton
import triton.language as tl

from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret


@triton.jit
def stored(y_ptr, m):
    for n in range(2):
        tl.store(y_ptr + m * 2 + n, m.to(tl.int64) * 2147483648 + n.to(tl.int64))


@triton.jit
def counting_kernel(y_ptr, M, LANGUAGES: tl.constexpr):
    if LANGUAGES:
        for m in tl.range(0, M):
            tl.store(y_ptr + m, (-m).to(tl.int64) * 2147483648)
    else:
        for m in range(M):
            tl.store(y_ptr + m, (2 * m + 1).to(tl.int64) * 2147483648)
            tl.store(y_ptr + M, (~m).cast(tl.int64))
            tl.store(y_ptr + M + 1, tl.full((), m, m.dtype))


@triton.jit
def calling_kernel(y_ptr, M):
    for m in range(M):
        stored(y_ptr, m)


@pytest.mark.parametrize("languages", [True, False])
def test_the_variable_of_a_loop_is_a_scalar(languages):
    y = torch.zeros(5, dtype=torch.int64)
    with corrected():
        counting_kernel[(1,)](y, 3, languages)
    factors, rest = ([0, -1, -2], [0, 0]) if languages else ([1, 3, 5], [-3, 2])
    assert y.tolist() == [*(factor * 2**31 for factor in factors), *rest]


def test_the_variable_of_a_loop_is_a_scalar_in_a_device_function():
    y = torch.zeros(4, dtype=torch.int64)
    with corrected():
        calling_kernel[(1,)](y, 2)
    assert y.tolist() == [0, 1, 2**31, 2**31 + 1]


def test_a_range_outside_a_kernel_is_pythons():
    y = torch.zeros(5, dtype=torch.int64)
    with corrected():
        counting_kernel[(1,)](y, 3, False)
        assert "range" not in globals()
        assert type(next(iter(range(3)))) is int
        with pytest.raises(Exception, match="absent"):
            absent_kernel[(1,)](y, 3)
    assert "range" not in globals()


@triton.jit
def absent_kernel(y_ptr, M):
    for m in range(M):
        tl.store(y_ptr + m, absent)  # noqa: F821


def test_a_module_that_has_the_name_keeps_it(monkeypatch):
    monkeypatch.setitem(globals(), "range", builtins.range)
    test_the_variable_of_a_loop_is_a_scalar(False)
    assert globals()["range"] is builtins.range
