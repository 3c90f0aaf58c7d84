"""No shipped configuration is worse than its baseline; and a worse one would be found."""

import pytest

from tritorch.bench import gate, inspection

pytestmark = pytest.mark.compile

BASELINE = gate.load()
SPECS = [spec for spec in inspection.own_ops([]) if not spec.configurations_of]


@pytest.fixture
def baseline():
    if BASELINE is None:
        pytest.skip("no baseline is committed for the Triton that is installed")
    return BASELINE


@pytest.mark.parametrize("target", gate.TARGETS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_configuration_got_worse(spec, target, baseline):
    verdict = gate.judge(baseline, gate.rows(spec, target, baseline["rows"]), spec, target)
    assert verdict.ok, "\n".join(verdict.lines())


def test_baseline_is_of_this_estimator(baseline):
    assert baseline["readers"] == gate.readers(), f"run {gate.COMMAND}"


def test_baseline_has_every_op(baseline):
    assert {row["op"] for row in baseline["rows"]} == {spec.name for spec in SPECS}


def test_rows_of_the_same_code_are_not_measured_again(baseline, monkeypatch):
    (spec,) = inspection.own_ops(["relu"])
    found = gate.rows(spec, "sm_90", baseline["rows"])
    monkeypatch.setattr(inspection, "inspected", None)
    assert gate.rows(spec, "sm_90", found) == found


def test_what_is_worse_new_or_gone_is_named():
    (spec,) = inspection.own_ops(["relu"])
    found = gate.rows(spec, "sm_90")
    first, *others = found
    better = first | {"registers": 1, "code": "other"}
    baseline = {"rows": [better, *others], "readers": gate.readers()}
    verdict = gate.judge(baseline, found, spec, "sm_90")
    assert not verdict.ok
    ((name, changes),) = verdict.worse
    assert "activation" in name
    assert str(changes[0]).startswith("registers 1 -> ")
    assert gate.COMMAND in "\n".join(verdict.lines())

    assert gate.judge({**baseline, "rows": found}, found, spec, "sm_90").ok
    lacking = gate.judge({**baseline, "rows": others}, found, spec, "sm_90")
    assert [text for text in lacking.unknown if text.endswith("has no baseline")]
    left = gate.judge({**baseline, "rows": found}, others, spec, "sm_90")
    assert [text for text in left.unknown if text.endswith("is not shipped any more")]


def test_another_estimator_is_not_held_against_a_kernel():
    (spec,) = inspection.own_ops(["relu"])
    found = gate.rows(spec, "sm_90")
    cheaper = [row | {"estimate": {"us": 0.1}, "code": "other"} for row in found]
    for readers, ok in ((gate.readers(), False), ("another", True)):
        baseline = {"rows": cheaper, "readers": readers}
        assert gate.judge(baseline, found, spec, "sm_90").ok == ok


@pytest.mark.parametrize("name", ["nosuchop", "a.py:f"])
def test_an_op_that_there_is_not_is_a_wrong_call(monkeypatch, capsys, name):
    monkeypatch.setattr("sys.argv", ["gate", "relu", name, "--write"])
    with pytest.raises(SystemExit) as stopped:
        gate.main()
    assert stopped.value.code == 2
    assert f"error: there is no op {name}" in capsys.readouterr().err
