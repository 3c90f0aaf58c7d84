"""Functions to check, right ones and wrong ones, small because every check calls them many times.

Their names say what is wrong with them.  What a test wants to hear from inside a call goes to the
file that the variable CALLED names.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(y_ptr + offs, x * 2, mask=offs < N)


@triton.jit
def unmasked_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # without a mask
    tl.store(y_ptr + offs, x * 2, mask=offs < N)


@triton.jit
def spinning_kernel(y_ptr, N):
    count = N
    while count > 0:  # for ever
        count = count * 1
    tl.store(y_ptr, count)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["N"])
@triton.jit
def tuned_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    # 3 where it is 32
    tl.store(y_ptr + offs, x * (1 + BLOCK // 16), mask=offs < N)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 64})], key=["N"])
@triton.heuristics({"EVEN": lambda given: given["N"] % 16 == 0})
@triton.jit
def even_kernel(x_ptr, y_ptr, N, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # even for one of its tiles
    mask = offs < (N + BLOCK if EVEN else N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask) * 2, mask=offs < N)


@triton.jit
def summing_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    before = tl.zeros((), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, N, BLOCK):
        tile = tl.load(x_ptr + row * N + start + offs, mask=start + offs < N, other=0.0)
        # what came before the tile before is forgotten
        before, total = tl.sum(tile), before + tl.sum(tile)
    tl.store(y_ptr + row, total)


@triton.jit
def null_kernel(y_ptr, BLOCK: tl.constexpr):
    nowhere = tl.full((BLOCK,), 0, tl.int64).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(nowhere))  # of address 0


def launched(kernel, x, y):
    if x.numel():
        kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y


def reference(x):
    return x * 2


def double(x):
    x = x.contiguous()
    return launched(double_kernel, x, torch.empty_like(x))


def unmasked(x):
    x = x.contiguous()
    return launched(unmasked_kernel, x, torch.empty_like(x))


def thrice(x):
    return double(x) * 1.5


def talkative(x):
    sys.stdout.write("to stdout, which is the report's\n")
    os.write(1, b'{"not": "the report"}\n')
    return double(x)


def dereferences_null(x):
    ctypes.string_at(0)  # nowhere


def start_another():
    """A process that outlives whoever starts it, unless it is ended too."""
    if called := os.environ.get("CALLED"):
        subprocess.Popen(["sleep", "600"])
        Path(called).touch()


def exits(x):
    start_another()
    os._exit(3)


def aborts(x):
    os.abort()  # SIGABRT


def leaves(x):
    sys.exit(7)  # no Exception


def loops(x):
    start_another()
    while True:  # for ever
        pass


def loops_over_one(x):
    while x.stride() == (0,):
        pass
    return double(x)


def spins(x):
    y = torch.empty_like(x)
    spinning_kernel[(1,)](y, 1)
    return y


def of_none(x):
    double(x)


_kept: list[torch.Tensor] = []


def stale(x):
    """Gives what another size was given before, once there has been one."""
    _kept.append(x)
    changed = any(x.shape != other.shape for other in _kept)
    return double(x) + changed


def in_place(x):
    # no copy: what it is given is what it writes
    if x.numel():
        x.copy_(double(x))


def in_place_reference(x):
    x.mul_(2)


def forms(x, form):
    """Twice the argument, in each form of result."""
    y = double(x)
    results = {
        "tensor": y,
        "tuple": (y, x.dim()),
        "list": [y, None, y],
        "dict": {"b": y, "a": x.numel()},
        "nested": {"pair": (y, [y])},
        "number": x.dim(),
        "nothing": None,
        "text": "twice",
    }
    return results[form]


def forms_reference(x, form):
    y = x * 2
    results = {
        "tensor": y,
        "tuple": (y, x.dim()),
        "list": [y, None, y],
        "dict": {"a": x.numel(), "b": y},
        "nested": {"pair": (y, [y])},
        "number": x.dim(),
        "nothing": None,
        "text": y,
    }
    return results[form]


def raises_value_error(x):
    raise ValueError("not this one")  # not this one


def samples_that_raise(make):
    raise ValueError("no sample today")  # no sample today
    yield


def samples_that_raise_later(make):
    yield {"x": make(3)}
    if make.dtype == torch.float16:
        raise ValueError("no half today")  # no half today


def fails_inside(x):
    """Asks the checks for what they do not expect: a replaced part of them that raises."""
    from tritorch.testing import accesses

    original = accesses._outside
    accesses._outside = None
    try:
        return unmasked(x)
    finally:
        accesses._outside = original


def highest(x):
    """Of equal numbers the last, and where it is; torch takes the first."""
    return double(x).exp().max(), x.numel() - 1 - x.flip(0).argmax()


def highest_reference(x):
    return (x * 2).exp().max(), x.argmax()


def drops_nan(x):
    y = double(x)
    return torch.where(y.isnan(), 0, y)


def tuned(x, kernel=tuned_kernel):
    y = torch.empty_like(x)
    if x.numel():
        grid = lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)  # noqa: E731
        kernel[grid](x.contiguous(), y, x.numel())
    return y


def forgets(x):
    x, y = x.contiguous(), x.new_zeros(x.shape[0])
    if x.shape[0]:
        summing_kernel[(x.shape[0],)](x, y, x.shape[1], BLOCK=16)
    return y


def rows_reference(x):
    return x.sum(1)


def even(x):
    return tuned(x, even_kernel)


def null_reference(x):
    """A reference that is a kernel, which nothing watches."""
    y = torch.empty(16)
    null_kernel[(1,)](y, BLOCK=16)
    return y
