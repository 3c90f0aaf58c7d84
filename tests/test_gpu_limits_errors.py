"""What keeps a kernel from being judged: errors of compiler, assembler and host code, and where."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from tests.limited import autotuned, line_of, product, square, square_kernel
from tritorch.testing import dry, gpu_limits
from tritorch.testing.gpu_limits import limits

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("no_gpu")]


def test_an_error_that_autotune_does_not_catch_says_so():
    kernel = autotuned((32, 32, 4, 2), (24, 32, 4, 2))
    (finding,) = limits(lambda: square(kernel))
    assert finding.kind == "tile"
    assert finding.message == (
        "sm_80, sm_90: SIZE=24, BLOCK_K=32, num_warps=4, num_stages=2 fails: "
        "arange's range must be a power of 2; autotune does not catch that and raises"
    )
    assert finding.line == line_of(square_kernel, "tl.arange(0, SIZE)")
    assert not gpu_limits.is_discarded(finding)


@triton.jit
def asserting_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 10)
    tl.store(x_ptr, 0.0)


@triton.jit
def misusing_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    x = product(x, x, x, "ieee")
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


@triton.jit
def huge_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.zeros((BLOCK, BLOCK), tl.float32)))


@pytest.mark.parametrize(
    ("kernel", "block", "kind", "message", "function", "line"),
    [
        (
            asserting_kernel,
            16,
            "compilation",
            "CompileTimeAssert",
            asserting_kernel,
            "static_assert",
        ),
        # the place is in the function that is called
        (misusing_kernel, 16, "compilation", "equal ranks >= 2", product, "tl.dot"),
        # the language's own functions are no place
        (huge_kernel, 2048, "tile", "exceeds triton maximum tensor numel", huge_kernel, "tl.zeros"),
    ],
    ids=["assertion", "called function", "tile"],
)
def test_an_error_of_the_compiler_is_at_the_users_line(
    kernel, block, kind, message, function, line
):
    (finding,) = limits(lambda: kernel[(1,)](torch.empty(16), block), ["sm_90"])
    assert finding.kind == kind
    assert message in finding.message
    assert finding.kernel == kernel.__name__
    assert finding.file == function.fn.__code__.co_filename
    assert finding.line == line_of(function, line)
    assert line in finding.source


@triton.jit
def packing_kernel(x_ptr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    x = tl.inline_asm_elementwise("bogus $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=PACK)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


@pytest.fixture
def standard_error(tmp_path):
    """Makes standard error a file, as in a process of a check."""

    @contextlib.contextmanager
    def as_file():
        kept = os.dup(2)
        with (tmp_path / "said").open("wb") as file:
            os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

    return as_file


def test_what_the_compiler_prints_is_told_at_its_line(standard_error):
    with standard_error():
        (finding,) = limits(lambda: packing_kernel[(1,)](torch.empty(16).int(), 3, 16))
    assert finding.kind == "compilation"
    assert finding.message == (
        "sm_80, sm_90: the compiler says: number of input elements 16 must be a multiple of the "
        "op's packed_element attribute, 3"
    )
    assert finding.line == line_of(packing_kernel, "tl.inline_asm")
    assert finding.source.startswith("x = tl.inline_asm_elementwise(")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("sm_90", "Not a name of any known instruction: 'bogus'"),
        ("gfx942", "invalid instruction: "),
    ],
)
def test_what_an_assembler_prints_is_told(target, said, standard_error):
    with standard_error():
        (finding,) = limits(lambda: packing_kernel[(1,)](torch.empty(16).int(), 1, 16), [target])
    assert finding.message.startswith(f"{target}: the compiler says: {said}")
    assert finding.line == line_of(packing_kernel, "def packing_kernel")


def test_kernels_after_one_that_does_not_compile_are_compiled_too():
    def call():
        x = torch.empty(16, device="cuda")
        asserting_kernel[(1,)](x, 16)
        misusing_kernel[(1,)](x, 16)

    findings = limits(call, ["sm_90"])
    assert [finding.kernel for finding in findings] == ["asserting_kernel", "misusing_kernel"]


def test_host_code_that_raises_is_told_with_its_line():
    def call():
        result = square(SIZE=32, BLOCK_K=32, num_stages=2)
        # what the kernel did not write is zero
        assert result[0].item() == 0
        return 1 / result[0].item()

    (finding,) = limits(call)
    assert finding.kind == "error"
    assert "sm_80, sm_90: the host code raised ZeroDivisionError: " in finding.message
    assert "after 1 launches" in finding.message
    assert finding.line == line_of(call, "1 / result")


def test_nothing_stays_replaced():
    owners = (torch, torch.cuda, Tensor, Autotuner, JITFunction, triton.compiler.compiler)
    before = [dict(vars(owner)) for owner in owners]
    limits(lambda: asserting_kernel[(1,)](torch.empty(1), 16), ["sm_80"])
    for owner, names in zip(owners, before, strict=True):
        changed = {n for n in vars(owner).keys() | names if vars(owner).get(n) is not names.get(n)}
        assert not changed, owner
    assert dry.active() is None
