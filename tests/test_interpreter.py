"""The corrected interpreter: the language, memory and tiles, and that Triton is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from tritorch import hardware
from tritorch.testing import corrections, interpreter
from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret

NAN = float("nan")


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def masked_kernel(x_ptr, y_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if OTHER is None:
        x = tl.load(x_ptr + offs, mask=offs < n)
    else:
        x = tl.load(x_ptr + offs, mask=offs < n, other=OTHER)
    tl.store(y_ptr + offs, x)


@triton.jit
def loop_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for step in range(tl.cdiv(n, BLOCK)):
        offs = step * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0), mask=offs < n)


@triton.jit
def dot_kernel(x_ptr, y_ptr, z_ptr, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    offs_m = tl.arange(0, M)
    offs_k = tl.arange(0, K)
    x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :])
    y = tl.load(y_ptr + offs_k[:, None] * M + offs_m[None, :])
    z = tl.dot(x, y, input_precision=PRECISION, out_dtype=z_ptr.dtype.element_ty)
    tl.store(z_ptr + offs_m[:, None] * M + offs_m[None, :], z)


@triton.jit
def scale_kernel(x_ptr, y_ptr, scale, exact: tl.float64, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x * scale.to(x.dtype))
    tl.store(y_ptr + BLOCK + offs, x * exact)


@triton.jit
def square_kernel(y_ptr, x, wide: tl.int64):
    tl.store(y_ptr, x * x)
    tl.store(y_ptr + 1, wide * wide)


def normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# the language


@pytest.mark.parametrize("n", [0, 1, 16, 40])
def test_a_loop_bound_may_be_known_at_run_time_alone(n):
    x = normal(64, dtype=torch.float32)
    y = torch.full_like(x, -1.0)
    # numpy 2.4 raises where older ones deprecate
    with warnings.catch_warnings(), corrected():
        warnings.simplefilter("error")
        loop_kernel[(1,)](x, y, n, 16)
    assert_same(y, torch.cat([x[:n], torch.full((64 - n,), -1.0)]))


def test_a_float_argument_is_float32_unless_annotated():
    x = torch.ones(16, dtype=torch.float64)
    y = torch.zeros(2, 16, dtype=torch.float64)
    with corrected():
        scale_kernel[(1,)](x, y, 0.1, 0.1, 16)
    assert_same(y[0], x * torch.tensor(0.1).double())
    assert_same(y[1], x * 0.1)


def test_a_float_argument_may_be_named():
    x = torch.ones(16)
    y = torch.zeros(2, 16)
    with corrected():
        scale_kernel[(1,)](x, y, exact=0.5, scale=0.25, BLOCK=16, num_warps=2)
    assert_same(y, torch.tensor([[0.25], [0.5]]).expand(2, 16))


def test_an_integer_argument_is_as_wide_as_annotated():
    y = torch.zeros(2, dtype=torch.int64)
    with corrected():
        square_kernel[(1,)](y, 2**16, wide=2**16)
    assert y.tolist() == [0, 2**32]


def test_an_argument_too_many_is_refused():
    y = torch.zeros(2, dtype=torch.int64)
    with (
        corrected(),
        pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"),
    ):
        square_kernel[(1,)](y, 1, 1, 1)


# memory


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_a_masked_float_without_other_is_nan(dtype):
    x = normal(16, dtype=dtype)
    y = torch.zeros_like(x)
    with corrected():
        masked_kernel[(1,)](x, y, 5, None, 16)
    assert_same(y, torch.cat([x[:5], torch.full((11,), NAN, dtype=dtype)]))


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [
        (torch.uint8, 0x5B),
        (torch.int8, 0x5B),
        (torch.int16, 0x5B5B),
        (torch.int32, 0x5B5B5B5B),
        (torch.int64, 0x5B5B5B5B5B5B5B5B),
    ],
)
def test_a_masked_integer_without_other_is_large_and_odd(dtype, poison):
    x = torch.arange(16).to(dtype)
    y = torch.zeros_like(x)
    with corrected():
        masked_kernel[(1,)](x, y, 5, None, 16)
    assert_same(y, torch.cat([x[:5], torch.full((11,), poison, dtype=dtype)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64], ids=str)
def test_a_masked_lane_holds_other(dtype):
    x = torch.arange(16).to(dtype)
    y = torch.zeros_like(x)
    with corrected():
        masked_kernel[(1,)](x, y, 5, 7, 16)
    assert_same(y, torch.where(torch.arange(16) < 5, x, 7))


# products


def test_dot_of_bfloat16_accumulates_in_float32():
    x, y = normal(32, 64), normal(64, 32, seed=1)
    z = torch.zeros(32, 32)
    with corrected():
        dot_kernel[(1,)](x, y, z, "ieee", 32, 64)
    torch.testing.assert_close(z, (x.double() @ y.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tile_that_the_compiler_refuses_is_refused(dtype):
    x, y, z = normal(16, 8, dtype=dtype), normal(8, 16, dtype=dtype), torch.zeros(16, 16)
    with corrected(), pytest.raises(InterpreterError, match="N >= 1 and K >= 16"):
        dot_kernel[(1,)](x, y, z, "ieee", 16, 8)


def test_tf32_drops_thirteen_bits_where_asked():
    x, y = normal(16, 16, dtype=torch.float32), normal(16, 16, dtype=torch.float32, seed=1)
    short_x, short_y = ((t.view(torch.int32) & -(2**13)).view(torch.float32) for t in (x, y))
    exact, short = (a.double() @ b.double() for a, b in ((x, y), (short_x, short_y)))

    def product(precision):
        z = torch.zeros(16, 16)
        with corrected():
            dot_kernel[(1,)](x, y, z, precision, 16, 16)
        return z.double()

    def close(actual, expected):
        return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)

    assert not close(exact, short)
    assert close(product("tf32"), exact)
    with corrected(tf32=True):
        assert close(product("tf32"), short)
        assert close(product("ieee"), exact)
        with corrected(tf32=False):
            assert close(product("tf32"), exact)
        assert close(product("tf32"), short)
    assert close(product("tf32"), exact)


def test_tf32_leaves_other_dtypes_alone():
    x, y = normal(16, 16, dtype=torch.float64), normal(16, 16, dtype=torch.float64, seed=1)
    z = torch.zeros(16, 16, dtype=torch.float64)
    with corrected(tf32=True):
        dot_kernel[(1,)](x, y, z, "tf32", 16, 16)
    torch.testing.assert_close(z, x @ y)


# the context


def attributes():
    """Every attribute of what the corrections patch, and of the language that a launch patches."""
    owners = (
        triton_interpreter,
        triton_interpreter.InterpreterBuilder,
        triton_interpreter.TensorHandle,
        triton_interpreter.ReduceOps,
        triton_interpreter.GridExecutor,
        tl.semantic.TritonSemantic,
        tl.dtype,
        tl.block_type,
        tl.tensor,
    )
    return {
        (owner.__name__, name): value for owner in owners for name, value in vars(owner).items()
    }


def truncates():
    """Whether a cast to bfloat16 truncates, as it does in every Triton that is not corrected."""
    x = torch.full((16,), 1 + 3 * 2**-8)
    y = torch.zeros(16, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, 16)
    return bool((y != x.bfloat16()).all())


def test_nothing_stays_patched():
    assert truncates()
    before = attributes()
    with corrected():
        assert not truncates()
        assert attributes() != before
    assert attributes() == before
    assert truncates()


def test_nesting_restores_at_the_outermost_end():
    before = attributes()
    with corrected():
        with corrected():
            assert not truncates()
        assert not truncates()
    assert attributes() == before


def test_an_exception_restores():
    before = attributes()
    with pytest.raises(ZeroDivisionError), corrected(), corrected(tf32=True):
        raise ZeroDivisionError
    assert attributes() == before
    assert corrections.tf32 is False
    assert truncates()


def test_a_failing_kernel_restores():
    before = attributes()
    x = normal(16)
    with pytest.raises(InterpreterError), corrected():
        cast_kernel[(1,)](x, None, 16)
    assert attributes() == before


def test_a_missing_private_part_is_named(monkeypatch):
    monkeypatch.setattr(corrections, "_patches", [])
    monkeypatch.delattr(triton_interpreter.InterpreterBuilder, "create_fabs")
    expected = rf"triton {triton.__version__} has no InterpreterBuilder\.create_fabs"
    with pytest.raises(RuntimeError, match=expected):
        corrected().__enter__()
    assert expected.replace("\\", "") in interpreter.self_test()[0]


def test_self_test_passes():
    assert interpreter.self_test() == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sum", "the sum of bfloat16"),
        ("cast_impl", "rounding float32 to bfloat16"),
        ("create_atomic_rmw", "an atomic sum of bfloat16"),
        ("create_bitcast", "the bits of bfloat16"),
        ("create_dot", "a tile too small for any GPU"),
        ("create_fp_to_fp", "rounding to bfloat16 towards zero"),
        ("create_masked_load", "a masked lane holds NaN"),
        ("create_masked_store", "bfloat16 arithmetic"),
        ("apply_impl", "NaN hides the maximum before it"),
    ],
)
def test_self_test_says_which_correction_is_missing(name, said, monkeypatch):
    with corrected():
        patches = list(corrections._patches)
    monkeypatch.setattr(corrections, "_patches", [patch for patch in patches if patch[1] != name])
    assert said in "\n".join(interpreter.self_test())


def test_this_process_is_interpreting():
    assert interpreter.interpreting()


ELSEWHERE = """
import sys
from tritorch.testing import interpreter
print(interpreter.interpreting(), "triton" in sys.modules)
print(interpreter.self_test())
"""


def test_a_process_that_does_not_interpret_is_told_so():
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "False False"
    assert "set TRITON_INTERPRET=1 in the environment" in second


def test_the_interpreter_takes_the_kernels_that_a_test_asks_for():
    x = torch.ones(1)
    assert hardware.capability(x) == 80
    with hardware.pretend(90):
        assert hardware.capability(x) == 90
        with hardware.pretend(80):
            assert hardware.capability(x) == 80
        assert hardware.capability(x) == 90
    assert hardware.capability(x) == 80
