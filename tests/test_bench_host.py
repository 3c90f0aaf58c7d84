"""What calls cost the host: counted in functions, which no other program's load changes."""

import json

import pytest
import torch

from tritorch import bound, launch
from tritorch.bench import gate, host

pytestmark = pytest.mark.compile

BASELINE = gate.BASELINES / "host.json"


@pytest.fixture
def stubbed():
    with host.stub_driver(), torch.no_grad():
        yield


@pytest.mark.parametrize("which", ["host", "host_both"])
@pytest.mark.parametrize("name", host.calls())
def test_no_call_enters_more_functions_than_before(name, which, stubbed):
    rows = json.loads(BASELINE.read_text())["rows"]
    [row] = [row for row in rows if (row["op"], row["pass"]) == (name, which)]
    with torch.set_grad_enabled(which == "host_both"):
        call, _ = (host.calls() if which == "host" else host.steps())[name]
        check(call, row)


def check(call, row):
    for _ in range(host.WARM_UP):
        call()
    with launch.recorded() as launches:
        call()
    found = {"functions": host.functions_entered(call), "launches": len(launches)}
    rewrite = f"if it must be, python -m tritorch.bench.host --json {BASELINE} --force"
    assert found["functions"] <= row["functions"], rewrite
    assert found["launches"] <= row["launches"], rewrite


def test_functions_are_counted():
    def inner():
        pass

    assert host.functions_entered(inner) == 1
    assert host.functions_entered(lambda: (inner(), inner())) == 3


def test_the_stub_is_gone_afterwards():
    before = launch._gpu, bound.bind
    with host.stub_driver():
        assert launch._gpu(torch.ones(3)) == 0
    assert (launch._gpu, bound.bind) == before
    assert launch._gpu(torch.ones(3)) < 0


def test_every_call_is_torchs_too():
    for name, (_, torchs) in [*host.calls().items(), *host.steps().items()]:
        assert torchs() is not None, name
