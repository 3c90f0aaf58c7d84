"""What `promises` hears of a kernel's words to the compiler, and what it makes numbers be."""

import pytest
import torch
import triton
import triton.language as tl

from tritorch.testing import interpreter, promises

pytestmark = pytest.mark.interpret

# the lines of the kernel below, counted from its `def`
MULTIPLE, CONTIGUOUS, CONSTANT = 3, 4, 5


@triton.jit
def numbers_kernel(x_ptr, y_ptr, start, step, SIZE: tl.constexpr):
    lanes = tl.arange(0, 8)
    first = tl.multiple_of(start, SIZE)
    offsets = tl.max_contiguous(first + lanes * step, SIZE)
    flags = tl.max_constancy(lanes // step, SIZE)
    tl.store(y_ptr + lanes, offsets + 100 * flags)


def numbers(start, step, size=4):
    y = torch.empty(8, dtype=torch.int32)
    with interpreter.corrected():
        numbers_kernel[(1,)](y, y, start, step, SIZE=size)
    return y.tolist()


def lines(found):
    first = numbers_kernel.fn.__code__.co_firstlineno
    return {place.line - first: said for place, said in found.broken.items()}


def test_what_holds_is_heard_and_left_alone():
    plain = numbers(8, 1, size=1)
    with promises.watching() as found:
        assert numbers(8, 1, size=1) == plain
    assert (found.heard, found.broken) == (3, {})


def test_each_promise_that_does_not_hold_is_named():
    with promises.watching() as found:
        watched = numbers(6, 2)
    # two apart, and flags alike in twos
    assert watched == [6, 8, 110, 112, 214, 216, 318, 320]
    assert found.heard == 3
    said = lines(found)
    assert set(said) == {MULTIPLE, CONTIGUOUS, CONSTANT}
    assert said[MULTIPLE] == (
        "tl.multiple_of(..., 4) does not hold: lane (0,) is 6, where 4 was promised"
    )
    assert said[CONTIGUOUS] == (
        "tl.max_contiguous(..., 4) does not hold: lane (1,) is 8, where 7 was promised"
    )
    assert said[CONSTANT] == (
        "tl.max_constancy(..., 4) does not hold: lane (2,) is 1, where 0 was promised"
    )


def test_numbers_are_believed():
    with promises.believed():
        # from 4, in runs of four lanes, each with the flag of its first
        assert numbers(6, 2) == [4, 5, 6, 7, 212, 213, 214, 215]
    assert numbers(6, 2) == [6, 8, 110, 112, 214, 216, 318, 320]


@triton.jit
def pointer_kernel(x_ptr, y_ptr):
    lanes = tl.arange(0, 4)
    pointers = tl.max_contiguous(x_ptr + 2 * lanes, 4)
    tl.store(y_ptr + lanes, tl.load(pointers))


def test_pointers_go_by_elements():
    x, y = torch.arange(8.0), torch.empty(4)
    with promises.believed(), interpreter.corrected():
        pointer_kernel[(1,)](x, y)
    assert y.tolist() == [0, 1, 2, 3]


@triton.jit
def wrapped_kernel(y_ptr, M):
    rows = tl.multiple_of(tl.arange(0, 8) % M, 8)
    tl.store(y_ptr + tl.arange(0, 8), rows)


def test_lanes_of_a_run_need_not_be_multiples_themselves():
    y = torch.empty(8, dtype=torch.int32)
    with promises.watching() as found, interpreter.corrected():
        wrapped_kernel[(1,)](y, 5)
    assert found.broken == {}
    assert y.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
