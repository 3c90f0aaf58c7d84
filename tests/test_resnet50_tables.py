"""Tables of convolutions: what is measured, what is estimated, and what became of predictions."""

import json

import pytest

from tritorch.bench import regret, resnet50_tables
from tritorch.bench.resnet50_tables import Time

pytestmark = pytest.mark.reference

LAYER = "s1.conv2"


def row(which, us, baseline_us, **more):
    made = {
        "op": "conv2d", "name": LAYER, "shape": [256, 64, 56, 56, 64, 3, 1], "dtype": "bfloat16",
        "pass": which, "median_us": us, "baseline_us": baseline_us, "verified": True,
    }  # fmt: skip
    return {**made, **more}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(resnet50_tables, "_estimated", lambda *_: Time(40.0, 20.0, False))
    (tmp_path / "gpu").mkdir()
    rows = [
        row("forward", 10.0, 15.0),
        row("grad_weight", 10.0, 5.0, verified=False),
        # another batch, another dtype, another op
        row("grad_input", 1.0, 1.0, shape=[32, 64, 56, 56, 64, 3, 1]),
        row("grad_input", 1.0, 1.0, dtype="float32"),
        row("grad_input", 1.0, 1.0, op="linear"),
    ]
    text = json.dumps({"environment": {"gpu": "G"}, "rows": rows})
    (tmp_path / "gpu" / "1.json").write_text(text)
    return tmp_path


def cells(table, first):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_say_what_is_measured_and_what_is_estimated(folder, tmp_path):
    table = resnet50_tables.convolutions(folder)
    assert len(table.splitlines()) == 2 + 23
    found = cells(table, LAYER)
    assert found[4:13] == ["10", "15", "1.50", "40", "20", "0.50", "10", "5", "not verified"]
    assert found[-1] == "estimated for sm_90, not torch's but the roofline: grad_input"
    stem = cells(table, "stem")
    assert stem[7:10] == ["", "", ""]
    assert stem[-1] == "estimated for sm_90, not torch's but the roofline"
    assert "| measured, G |" not in table
    none = resnet50_tables.convolutions(tmp_path / "none")
    assert cells(none, LAYER)[4:7] == ["40", "20", "0.50"]


def test_a_layer_that_is_measured_says_so(folder):
    rows = [row(which, 10.0, 15.0) for which in resnet50_tables.PASSES]
    text = json.dumps({"environment": {"gpu": "G", "date": "2"}, "rows": rows})
    (folder / "gpu" / "2.json").write_text(text)
    assert cells(resnet50_tables.convolutions(folder), LAYER)[-1] == "measured, G"


def test_sums_count_a_layer_as_often_as_the_network_has_it(folder):
    lines = [line.split(" | ") for line in resnet50_tables.sums(folder).splitlines()[2:]]
    by_kind = {line[1]: line[2:] for line in lines}
    # three of 16 layers are the one that is measured
    assert by_kind["3x3"][:2] == ["16", f"{(3 * 15 + 13 * 20) / (3 * 10 + 13 * 40):.2f}"]
    assert by_kind["3x3"][3] == ""
    assert {basis.strip(" |") for *_, basis in lines} == {"estimated"}


def test_whole_steps_are_the_newest_of_each_kind(tmp_path):
    def step(op, which, batch, us, **more):
        shape = [batch, 3, 224, 224]
        return row(which, us, 6000.0, op=op, shape=shape, **more)

    (tmp_path / "gpu").mkdir()
    for date, rows in {
        "2": [
            step("resnet50", "train_step", 32, 4000.0),
            step("resnet50", "train_step_graph", 32, 2000.0),
            step("resnet50", "train_step", 256, 3000.0),
        ],
        "1": [
            step("resnet50", "train_step", 32, 9000.0),
            step("resnet50_fused", "train_step", 32, 5000.0, verified=False),
            row("forward", 1.0, 1.0),
        ],
    }.items():
        text = json.dumps({"environment": {"gpu": "G", "date": date}, "rows": rows})
        (tmp_path / "gpu" / f"{date}.json").write_text(text)
    assert resnet50_tables.newest_steps(tmp_path).splitlines()[2:] == [
        "| G | 256 | as written | 3.0 | 6.0 | 2.00 |  |  |  |",
        "| G | 32 | as written | 4.0 | 6.0 | 1.50 | 2.0 | 6.0 | 3.00 |",
        "| G | 32 | fused | 5.0 | 6.0 | not verified |  |  |  |",
    ]


def test_the_table_of_a_section_is_joined_with_its_results():
    log = f"""
## One
| layer | pass | predicted |
|--|--|--|
| stem | forward | 7 |
## Two
| layer | pass | predicted |
|--|--|--|
| {LAYER} | forward | 100 |
<!-- table: outcome -->
| {LAYER} | forward | 1 |
"""
    assert resnet50_tables._predictions(log, "Two") == [(LAYER, "forward", 100.0)]
    own = next(
        row["median_us"]
        for row in json.loads(resnet50_tables._SWEEP.read_text())["rows"]
        if (row["name"], row["pass"], row["configuration"]) == ("s1.c2", "forward", "default")
    )
    found = cells(resnet50_tables.outcome(log, "Two"), LAYER)
    assert found[2:5] == ["100", f"{own:.0f}", f"{own / 100 - 1:+.0%}"]
    with pytest.raises(ValueError, match="unpack"):
        resnet50_tables.outcome(log, "Three")


def test_regret_is_over_the_best_of_ours(monkeypatch):
    def timed(configuration, us):
        case = {"op": "matmul", "name": "s", "pass": "forward", "batch": 1, "m": 1, "n": 1, "k": 1}
        return {**case, "configuration": configuration, "median_us": us}

    rows = [timed("cudnn", 1.0), timed("default", 6.0), timed("a", 4.0), timed("b", 5.0)]
    monkeypatch.setattr(regret, "_chosen", lambda op, some: "b")
    assert regret.regrets(rows) == [("matmul", "forward", 0.5, 0.25)]
    monkeypatch.setattr(regret, "_chosen", lambda op, some: "c")
    assert regret.regrets(rows) == [("matmul", "forward", 0.5, None)]
