"""Which measured rows the estimate is compared with, and how its error is summed up."""

import json
import math

import pytest

from tritorch.bench import predictions

pytestmark = pytest.mark.reference


def row(**fields):
    made = {
        "op": "relu", "name": "activation", "shape": [256, 64, 112, 112], "dtype": "bfloat16",
        "pass": "forward", "implementation": "tritorch", "median_us": 280.0,
    }  # fmt: skip
    return {**made, **fields}


def results(folder, date, rows, capability="9.0", commit=None):
    folder = folder / "gpu" / date
    folder.mkdir(parents=True)
    environment = {"gpu": "G", "capability": capability, "commit": commit}
    text = json.dumps({"kind": "bench", "environment": environment, "rows": rows})
    (folder / "gpu.json").write_text(text)


def test_rows_are_found_with_their_cases(tmp_path):
    conv = row(op="conv2d", name="stem", shape=[256, 3, 224, 224, 64, 7, 2], median_us=1.0)
    results(tmp_path, "1", [row(median_us=1000.0)])
    results(
        tmp_path,
        "2",
        [
            row(),
            row(**{"pass": "backward"}),
            {**conv, "pass": "grad_weight"},
            # nobody differentiates by an image
            {**conv, "pass": "grad_input"},
            row(implementation="torch"),
            row(shape=[7, 7]),
            row(name="", shape=[256, 64, 56, 56], host_bound=True),
            row(op="no such op"),
        ],
    )
    found = predictions.measured(tmp_path)
    assert [(one.case.op, one.row["pass"], one.row["median_us"]) for one in found] == [
        ("relu", "forward", 280.0),
        ("relu", "backward", 280.0),
        ("conv2d", "grad_weight", 1.0),
    ]
    assert all(one.target == "sm_90" and not one.fresh for one in found)
    assert found[2].case.passes["grad_weight"] == ("weight",)
    assert [one.case.op for one in predictions.measured(tmp_path, ["conv2d"])] == ["conv2d"]


def test_a_gpu_that_no_kernel_is_compiled_for_is_left_out(tmp_path):
    results(tmp_path, "1", [row()], capability="7.0")
    assert predictions.measured(tmp_path) == []


def test_errors_are_summed_up(tmp_path):
    results(tmp_path, "1", [row(), row(**{"pass": "backward"})])
    forward, backward = predictions.measured(tmp_path)
    made = [predictions.Prediction(forward, 140.0), predictions.Prediction(backward, 560.0)]
    assert math.isclose(made[0].error, -made[1].error)
    assert predictions.summary(made) == [
        ("relu", "forward", "1", "-50%", "x2.00", "x2.00", "-50%"),
        ("relu", "backward", "1", "+100%", "x2.00", "x2.00", "+100%"),
        ("all", "", "2", "+0%", "x2.00", "x2.00", "-50%"),
    ]
    assert predictions.summary([]) == []


def test_nothing_measured_is_said(tmp_path, capsys):
    assert predictions.report(tmp_path) == 0
    assert "nothing is measured yet" in capsys.readouterr().out
