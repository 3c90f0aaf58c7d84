"""A fixture that checks functions which launch Triton kernels; pytest finds it by itself.

    def test_softmax(tritorch_check):
        tritorch_check(softmax, reference=torch_softmax, samples="x[M, N]")

No part of the package: pytest loads it in every run, and whoever imports tritorch waits for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tritorch.testing.report import Report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tritorch")
    group.addoption(
        "--tritorch-level",
        choices=("quick", "full", "soak"),
        default="quick",
        help="what tritorch_check takes for each function: seconds, minutes, a night",
    )
    group.addoption(
        "--tritorch-repro",
        metavar="DIR",
        help="where tritorch_check writes a script for each finding",
    )


@pytest.fixture(scope="session")
def tritorch_check(pytestconfig: pytest.Config) -> Callable[..., Report]:
    """`tritorch.check` with the same arguments: fails the test with what it finds, else its report.

    Where kernels are interpreted (TRITON_INTERPRET=1 before pytest starts) a function may be any
    object; elsewhere it is checked in a process of its own, which must be able to import it.
    """
    options = {
        "level": pytestconfig.getoption("--tritorch-level"),
        "reproductions": pytestconfig.getoption("--tritorch-repro"),
    }

    def check(fn: Callable[..., Any] | str, *arguments: Any, **more: Any) -> Report:
        # the report says where; this line does not
        __tracebackhide__ = True
        import tritorch

        report = tritorch.check(fn, *arguments, **options | more)
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return report

    return check
