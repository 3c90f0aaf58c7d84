"""What the tests of the detectors share: kernels, and how a finding is held against its line."""

from __future__ import annotations

import inspect

import triton
import triton.language as tl


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
    assert finding.file == kernel.fn.__code__.co_filename
    assert finding.line == line_of(kernel, text)
    assert finding.argument == argument
    assert finding.program == program
    assert finding.lanes == lanes
    assert finding.count == count


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
def evens_kernel(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * STEP, tl.load(x_ptr + offs, mask=offs < n, other=0), mask=offs < n)
