"""The estimate is held against what a run has measured, and its error is kept with the result."""

from __future__ import annotations

import json
import time

import pytest
from click.testing import CliRunner

from tritorch.bench import calibration, gpu, predictions
from tritorch.bench.environment import environment
from tritorch.bench.store import Store
from tritorch.cli import main

ROW = {
    "op": "relu", "name": "activation", "shape": [256, 64, 112, 112], "dtype": "bfloat16",
    "layout": "channels_last", "pass": "forward", "implementation": "tritorch",
    "median_us": 280.0, "baseline_us": 300.0, "speedup": 300 / 280, "verified": True,
}  # fmt: skip


def result(*rows, **more):
    where = {"gpu": "G", "capability": "9.0", "commit": "0" * 40, "date": "1"}
    return {"schema": 1, "kind": "bench", "environment": where, "rows": list(rows), **more}


@pytest.fixture
def doubled(monkeypatch):
    """An estimate that is twice what was measured, and nothing for the backward pass."""

    def predicted(found):
        for one in found:
            if one.row["pass"] == "forward":
                yield predictions.Prediction(one, 2 * one.row["median_us"])
            elif one.row["median_us"] == 666.0:
                raise ValueError("no such instruction")

    monkeypatch.setattr(predictions, "predicted", predicted)


@pytest.mark.reference
def test_the_error_is_printed_and_kept(doubled, capsys):
    backward = {**ROW, "pass": "backward"}
    # torch's own, what the host held up, and a GPU that was slowed down
    others = [{**ROW, "implementation": "torch"}, {**backward, "host_bound": True}]
    slowed = {**ROW, "shape": [256, 64, 56, 56], "throttled": ["hardware slowdown"]}
    store = Store.of(result(ROW, *others, slowed, {**backward, "name": ""}))
    calibration.add(store, 1, fresh=True)
    kept = store.more["calibration_summary"]
    assert store.more["calibration"] == [
        {
            "op": "relu", "name": "activation", "shape": [256, 64, 112, 112],
            "dtype": "bfloat16", "layout": "channels_last", "pass": "forward",
            "measured_us": 280.0, "estimated_us": 560.0, "error": pytest.approx(1.0),
        }
    ]  # fmt: skip
    assert kept["failures"] == ["relu activation: a fallback to torch, which has no estimate"]
    assert (kept["left_out"], kept["same_kernels"]) == (0, True)
    assert kept["errors"].startswith(
        "median +100%, eight of ten between +100% and +100%; 0% within"
    )
    said = capsys.readouterr().out
    assert "it is never a measurement" in said
    assert "relu  forward  1     +100%   x2.00" in said
    assert "other kernels" not in said
    # no row of the result has become an estimate
    assert store.rows[0] == ROW


@pytest.mark.reference
def test_an_estimate_that_fails_costs_itself_alone(doubled):
    store = Store.of(result({**ROW, "pass": "backward", "median_us": 666.0}, ROW))
    calibration.add(store, 1, fresh=True)
    kept = store.more["calibration_summary"]
    assert kept["failures"] == ["relu activation: ValueError: no such instruction"]
    assert len(store.more["calibration"]) == 1


@pytest.mark.reference
def test_what_there_is_no_time_for_is_left_out_and_said(doubled, capsys):
    store = Store.of(result(ROW, {**ROW, "shape": [256, 64, 56, 56]}))
    calibration.add(store, 1, until=time.time() - 1, fresh=True)
    assert store.more["calibration_summary"]["left_out"] == 1
    assert "skipped: calibration: 1 rows: no time left" in capsys.readouterr().out


@pytest.mark.reference
def test_it_runs_by_itself_on_an_old_result(doubled, tmp_path, capsys):
    old = result(ROW, skipped=[{"section": "conv", "what": "a", "why": "b"}], command="c")
    (tmp_path / "gpu.json").write_text(json.dumps(old))
    call = ["--out", str(tmp_path), "--sections", "calibration", "--device", "cpu"]
    assert gpu.main([*call, "--workers", "1"]) == 0
    new = json.loads((tmp_path / "gpu.json").read_text())
    assert len(new.pop("calibration")) == 1
    assert not new.pop("calibration_summary")["same_kernels"]
    assert new == old
    assert "measured with other kernels" in capsys.readouterr().out


@pytest.mark.reference
def test_an_old_result_is_left_as_it_is_and_gets_a_file_beside_it(doubled, tmp_path):
    old = json.dumps(result(ROW))
    (tmp_path / "1-gpu.json").write_text(old)
    calibration.main([str(tmp_path / "1-gpu.json"), "--workers", "1"])
    assert (tmp_path / "1-gpu.json").read_text() == old
    new = json.loads((tmp_path / "1-calibration.json").read_text())
    assert (new["kind"], new["source"], new["rows"]) == ("calibration", "1-gpu.json", [])
    assert new["environment"] == json.loads(old)["environment"]
    assert len(new["calibration"]) == 1


@pytest.mark.reference
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "Expecting"), ("[]", "is no result of a benchmark")],
)
def test_what_is_no_result_is_a_wrong_call(tmp_path, capsys, content, said):
    path = tmp_path / "a-gpu.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        calibration.main([str(path)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a-calibration.json").exists()


@pytest.mark.reference
def test_nothing_measured_is_said(capsys):
    calibration.add(Store.of({**result(ROW), "environment": environment()}), 1)
    assert "no row of a GPU" in capsys.readouterr().out


@pytest.mark.reference
def test_the_newest_error_of_a_target_is_known(tmp_path):
    assert calibration.known("sm_90", tmp_path) == ""
    for date, errors in (("2", "good"), ("1", "bad")):
        summary = {"errors": errors, "same_kernels": date == "1"}
        one = result(calibration=[1, 2], calibration_summary=summary)
        one["environment"]["date"] = date
        (tmp_path / "G" / date).mkdir(parents=True)
        (tmp_path / "G" / date / "gpu.json").write_text(json.dumps(one))
    said = "good of 2 rows on G, measured with earlier kernels"
    assert calibration.known("sm_90", tmp_path) == said
    assert calibration.known("sm_80", tmp_path) == ""


@pytest.mark.reference
def test_the_distribution_is_told_in_words():
    errors = [0.0] * 8 + [0.15, -3.0]
    assert predictions.spread(errors) == (
        "median +0%, eight of ten between +0% and +0%; "
        "80% within 10%, 90% within 20%, 90% within 50%"
    )


@pytest.mark.compile
def test_a_real_estimate_is_near(capsys):
    store = Store.of(result({**ROW, "median_us": 280.0}))
    calibration.add(store, 1, fresh=True)
    (row,) = store.more["calibration"]
    # twice 411 MB at three quarters of an H100's bandwidth
    assert 200 < row["estimated_us"] < 400


@pytest.mark.reference
def test_kinds_of_results_that_have_no_times_are_left_alone(tmp_path):
    (tmp_path / "G" / "1").mkdir(parents=True)
    (tmp_path / "G" / "1" / "tests.json").write_text(json.dumps(result(ROW) | {"kind": "tests"}))
    assert predictions.measured(tmp_path) == []


@pytest.mark.compile
def test_inspect_says_how_far_off_its_estimate_was(monkeypatch):
    monkeypatch.setattr(calibration, "known", lambda target: f"{target} good")
    result = CliRunner().invoke(main, ["inspect", "relu", "--arch", "sm_90"])
    assert result.exit_code == 0, result.output
    assert "how far off it was for sm_90: sm_90 good" in result.output


@pytest.mark.compile
def test_what_has_no_configurations_is_not_ranked():
    result = CliRunner().invoke(main, ["inspect", "relu", "--rank"])
    assert (result.exit_code, "relu has no table" in result.output) == (2, True)


@pytest.mark.compile
def test_a_call_that_there_is_not_is_named():
    result = CliRunner().invoke(main, ["inspect", "relu", "--calls", "triangle"])
    assert (result.exit_code, "no kernel with --calls triangle" in result.output) == (3, True)
