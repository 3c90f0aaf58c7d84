"""The corrected interpreter: device functions and modules, which share one language."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from tests.test_interpreter import assert_same, normal
from tritorch.testing.interpreter import corrected

pytestmark = pytest.mark.interpret


@triton.jit
def twice(x):
    return x + x


@triton.jit
def call_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, twice(twice(tl.load(x_ptr + offs))))


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


def of_core(x, y):
    return core.minimum(x, y)  # noqa: F821  of the module that a test makes for it


@triton.jit
def least_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, least(tl.load(x_ptr + offs), 3.0))  # noqa: F821  as above


@triton.jit
def most_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.maximum(tl.load(x_ptr), 5.0))


def test_a_device_function_gives_the_same_each_time_it_is_called():
    x = normal(16)
    y = torch.zeros_like(x)
    with corrected():
        for _ in range(2):
            call_kernel[(1,)](x, y, 16)
            assert_same(y, 4 * x)
            y.zero_()


def test_a_device_function_patches_the_language_once_a_launch(monkeypatch):
    x = normal(16)
    functions = []
    patch_lang = triton_interpreter._patch_lang
    monkeypatch.setattr(
        triton_interpreter, "_patch_lang", lambda fn: functions.append(fn) or patch_lang(fn)
    )
    for _ in range(2):
        with corrected():
            call_kernel[(1,)](x, x, 16)
    assert [fn.__name__ for fn in functions] == ["call_kernel"] * 2


def test_a_device_function_may_be_called_by_the_host_after_a_launch():
    x, y = torch.ones(16), torch.zeros(16)
    with corrected():
        call_kernel[(1,)](x, y, 16)
        four = triton_interpreter._implicit_cvt(4)
        assert int(larger(four, 3)) == 4


def test_a_hook_may_launch_another_kernel():
    x, y = torch.ones(16), torch.zeros(16)
    hooked = triton.jit(most_kernel.fn)
    hooked.add_pre_run_hook(lambda *_, **__: call_kernel[(1,)](x, x, 16))
    with corrected():
        hooked[(1,)](x, y)
    assert_same(x, torch.full((16,), 4.0))
    assert y[0] == 5


@pytest.fixture
def patched_core():
    """Triton itself never restores what a device function patches."""
    before = dict(vars(tl.core))
    yield
    for name, value in before.items():
        setattr(tl.core, name, value)


@pytest.mark.usefixtures("patched_core")
@pytest.mark.parametrize("more", [{}, {"tl": tl}], ids=["core", "both"])
def test_a_module_may_name_another_part_of_the_language(more):
    # as if it were of a module that imports triton.language.core
    function = FunctionType(of_core.__code__, {"core": tl.core, **more})
    globals()["least"] = triton.jit(function)
    x, y = torch.arange(16.0), torch.zeros(16)
    with corrected():
        least_kernel[(1,)](x, y, 16)
    assert_same(y, x.clamp(max=3.0))
