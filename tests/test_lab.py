"""The correctness lab, judged by kernels in the style of public ones: it finds nothing in correct
ones, and in broken ones the defect that is there, at the line where it is.

A kernel that is right and accused is as bad as one that is wrong and acquitted: who is accused
twice without cause stops listening.
"""

from __future__ import annotations

import pytest

import tritorch
from tests.lab import corpus
from tritorch.testing import detector, parts, requests
from tritorch.testing.findings import KINDS, Finding
from tritorch.testing.report import Report

CORRECT = corpus.kernels("tests/lab/correct")
BROKEN = corpus.kernels("tests/lab/broken")
EXAMPLES = corpus.kernels("examples/check")

# of the kinds in the corpus, those whose findings name a line of the kernel
WITH_LINE = {
    "out-of-bounds read",
    "out-of-bounds write",
    "out-of-bounds atomic",
    "unwritten output",
    "mutation",
    "uninitialised read",
    "masked lane",
    "int32 overflow",
    "race",
    "tile",
    "resources",
    "tf32",
    "compilation",
    "error",
    "hang",
}
# what only a compiler sees
COMPILED = {"resources", "tf32", "compilation"}
# what needs a GPU, or fakes of one, as tests of battery_gpu.py have them
ON_GPU = {"cuda graph", "stream", "guard band"}
# what a process does not survive
FATAL = {"crash"}

# of each example the kind of its defect, and how the line begins; no line for a wrong number
DEFECTS = {
    "gather_rows": ("int32 overflow", "row_ptr = table_ptr + row * stride_v"),
    "linear": ("values", ""),
    "matmul": ("out-of-bounds read", "a = tl.load("),
    "silu": ("out-of-bounds read", "grad_y = tl.load("),
    "softmax": ("masked lane", "x = tl.load("),
}


def interpreted(kernel: corpus.Kernel) -> Report:
    """The findings of the battery, in this process."""
    return tritorch.check(kernel.function(), targets=())


def compiled(kernel: corpus.Kernel) -> list[Finding]:
    """The findings of the limits of GPUs, in this process."""
    request = requests.Request(target=kernel.target)
    found: list[Finding] = []

    def say(event: str, **fields: object) -> None:
        if event == "finding":
            found.append(parts.as_finding(fields["finding"]))

    parts.compile_part(request, requests.find(request), say)
    return found


def assert_named(findings: list[Finding], kind: str, line: int) -> None:
    named = [finding for finding in findings if finding.kind == kind]
    assert named, f"no finding is of the kind {kind!r}: {findings}"
    if kind in WITH_LINE:
        assert line in {finding.line for finding in named}, named


def with_defects(*kinds: str) -> list[corpus.Kernel]:
    return [kernel for kernel in BROKEN if kernel.defect in kinds]


@pytest.mark.interpret
def test_corpus_says_what_is_wrong():
    assert len(CORRECT) > 20
    assert not [str(kernel) for kernel in CORRECT if kernel.defect or kernel.line]
    found = {kernel.defect for kernel in BROKEN} | {kind for kind, _ in DEFECTS.values()}
    assert found | ON_GPU == KINDS.keys()
    unmarked = [k for k in BROKEN if k.defect in WITH_LINE and not k.line]
    assert not [str(kernel) for kernel in unmarked]
    assert {str(kernel) for kernel in EXAMPLES} == DEFECTS.keys()


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", CORRECT, ids=str)
def test_correct_kernel_is_not_accused(kernel):
    report = interpreted(kernel)
    assert not report.findings, str(report)


@pytest.mark.compile
@pytest.mark.parametrize("kernel", CORRECT, ids=str)
def test_correct_kernel_fits_gpus(kernel):
    assert compiled(kernel) == []


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", [k for k in BROKEN if k.defect not in COMPILED | FATAL], ids=str)
def test_defect_is_found(kernel, monkeypatch):
    # a program that hangs has asked often enough by then
    monkeypatch.setattr(detector, "SPIN_LIMIT", 200)
    assert_named(interpreted(kernel).findings, kernel.defect, kernel.line)


@pytest.mark.compile
@pytest.mark.parametrize("kernel", with_defects(*COMPILED), ids=str)
def test_defect_is_found_by_compiling(kernel):
    assert_named(compiled(kernel), kernel.defect, kernel.line)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", with_defects(*FATAL), ids=str)
def test_process_that_dies_is_a_finding(kernel):
    report = tritorch.check(kernel.target, targets=())
    assert_named(report.findings, kernel.defect, kernel.line)


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", EXAMPLES, ids=str)
def test_example_passes_its_own_test(kernel):
    kernel.module().naive_test()


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", EXAMPLES, ids=str)
def test_example_is_seen_through(kernel):
    kind, statement = DEFECTS[str(kernel)]
    lines = [line.strip() for line in kernel.path.read_text().splitlines()]
    line = next(i for i, text in enumerate(lines, 1) if text.startswith(statement))
    assert_named(interpreted(kernel).findings, kind, line)
