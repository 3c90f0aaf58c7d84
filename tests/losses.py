"""How the tests of losses compare: in float64, and with nothing that leaves the kernels."""

import pytest

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import backend
from tritorch.registry import specs
from tritorch.testing import cases

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def kernels_only():
    backend.reset()
    yield
    assert backend.explain() == {}


@pytest.fixture
def fallbacks(kernels_only):
    """The counts of calls that left the kernels, forgotten afterwards."""
    yield backend.explain
    backend.reset()


def check(name, **arguments):
    """The op agrees with its reference in float64, NaN and infinities included."""
    spec = next(spec for spec in specs() if spec.name == name)
    found = cases.verdicts(spec, arguments, cases.random_gradient(name))
    failures = [f"{what}: {verdict.failure}" for what, verdict in found if not verdict.accepted]
    assert not failures, "\n".join(failures)
