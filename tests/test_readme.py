"""The README's tables are those of the code, and its examples run."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import tritorch.nn
from tritorch.bench import peers_table, rows, tables
from tritorch.bench.sections import Setting, planned

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_tables_are_fresh():
    docs = [ROOT / "docs" / f"{name}.md" for name in ("performance", "predictions")]
    pages = README, ROOT / "bench" / "README.md", *docs
    named = [re.findall(r"<!-- table: ([a-z-]+) -->", page.read_text()) for page in pages]
    assert sorted(name for names in named for name in names) == sorted(tables.TABLES)
    for page in pages:
        text = page.read_text()
        assert tables.regenerated(text) == text, f"run python -m tritorch.bench.tables {page}"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file"), ("<!-- table: nosuch -->\n<!-- end -->\n", "no table 'nosuch'")],
)
def test_a_page_that_cannot_be_written_anew_is_said_in_a_line(text, says, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    monkeypatch.setattr("sys.argv", ["tables", str(page)])
    with pytest.raises(SystemExit) as stopped:
        tables.main()
    message = str(stopped.value)
    assert message.startswith(f"{page}: ")
    assert says in message
    assert "\n" not in message


def test_every_layer_has_a_row():
    layers = {
        name
        for name, layer in vars(tritorch.nn).items()
        if inspect.isclass(layer) and layer.__module__ == "tritorch.nn"
    }
    rows = [line.split("|") for line in tables.ops_table().splitlines()[2:]]
    first = [name.strip(" `") for row in rows for name in row[1].split(",")]
    assert sorted(layers) == sorted(name for name in first if hasattr(torch.nn, name))
    ops = [name.strip(" `") for row in rows for name in row[2].split(",")]
    assert sorted(ops) == sorted(spec.name for spec in tables.specs())


def test_ops_that_are_alike_share_a_row(monkeypatch):
    first = tables.specs()[0]
    kernels = ("b.one_kernel", "a.two_kernel", "b.three_kernel")
    specs = [
        dataclasses.replace(first, name=name, layers=layers, notes=notes, kernels=kernels)
        for name, layers, notes in (
            ("without", (), "for this"),
            ("x", ("Z", "b"), ""),
            ("W", ("a",), ""),
        )
    ]
    specs.append(dataclasses.replace(specs[1], name="other", layers=("c",), kernels=kernels[:1]))
    monkeypatch.setattr(tables, "specs", lambda: tuple(specs))
    found = [line.split(" | ")[:3] for line in tables.ops_table().splitlines()[2:]]
    assert found == [
        ["| `a`, `b`, `Z`", "`W`, `x`", "[b](kernels/b.py) [a](kernels/a.py)"],
        ["| `c`", "`other`", "[b](kernels/b.py)"],
        ["| for this", "`without`", "[b](kernels/b.py) [a](kernels/a.py)"],
    ]


def test_a_second_gradient_that_raises_is_explained_where_there_is_one(monkeypatch):
    first = tables.specs()[0]
    explained = '"raises": the first gradient is right'
    for supported in (True, False):
        spec = dataclasses.replace(first, double_backward=supported)
        monkeypatch.setattr(tables, "specs", lambda spec=spec: (spec,))
        assert (explained in tables.ops_table()) == (not supported)
    assert explained not in README.read_text()


def test_a_stale_table_is_seen():
    text = "a\n<!-- table: ops -->\n| old |\n<!-- end -->\nb\n"
    assert (
        tables.regenerated(text) == f"a\n<!-- table: ops -->\n{tables.ops_table()}<!-- end -->\nb\n"
    )
    with pytest.raises(KeyError, match="unknown"):
        tables.regenerated("<!-- table: unknown -->\n<!-- end -->")


def test_results_are_summed_and_unverified_ones_show_no_speedup(tmp_path):
    def result(date, rows):
        environment = {"gpu": "G", "date": date}
        (tmp_path / "gpu").mkdir(exist_ok=True)
        text = json.dumps({"environment": environment, "rows": rows})
        (tmp_path / "gpu" / f"{date}.json").write_text(text)

    def row(op, which, shape, ours, torchs, verified=True, **more):
        times = {"median_us": ours, "baseline_us": torchs, "speedup": torchs / ours}
        found = {"op": op, "pass": which, "shape": shape, **times, "verified": verified}
        return {**found, "section": "pointwise", **more}

    result("2026-01-01", [row("relu", "forward", [1], 100.0, 1.0)])
    result(
        "2026-01-02",
        [
            # newer than the one above
            row("relu", "forward", [1], 2.0, 3.0),
            row("relu", "forward", [2], 4.0, 2.0, count=2),
            row("relu", "backward", [1], 2.0, 9.0),
            row("relu", "backward", [2], 2.0, 9.0, verified=False),
            row("relu", "host", [], 5.0, 1.0, verified=False),
            row("net", "train_step", [8], 4.0, 6.0),
            row("net", "train_step", [9], 4.0, 2.0),
            # of one shape, and another call each
            row("pool", "forward", [1], 1.0, 1.0, name="a", layout="contiguous"),
            row("pool", "forward", [1], 2.0, 4.0, name="b", layout="contiguous"),
            row("pool", "forward", [1], 4.0, 7.0, name="b", layout="channels_last"),
            row("pool", "forward", [1], 8.0, 12.0, name="b", layout="channels_last", dtype="f"),
            # of a user's own, and of another table
            row("pool", "forward", [2], 50.0, 1.0, section=None),
            row("pool", "forward", [3], 50.0, 1.0, section="layers"),
            {"op": "copy", "pass": "forward", "shape": [1], "median_us": 1.0},
        ],
    )
    assert tables.results_table(tmp_path).splitlines()[2:] == [
        "| G | net | train_step | [8] | 4 | 6 | 1.50 | 1.50 |",
        "| G | net | train_step | [9] | 4 | 2 | 0.50 | 0.50 |",
        "| G | pool | forward | 4 | 15 | 24 | 1.60 | 1.00 |",
        "| G | relu | backward | 2 | 4 | 18 |  | 1 not verified |",
        "| G | relu | forward | 2 | 10 | 7 | 0.70 | 0.50 |",
        "| G | relu | host | 1 | 5 | 1 |  |  |",
    ]
    # the weakest in brackets, and nothing where one of two was not verified
    assert tables.speedups_table(tmp_path).splitlines() == [
        "| GPU | op | forward | backward | grad_input | grad_weight |",
        "| -- | -- | -- | -- | -- | -- |",
        "| G | pool | 1.60 (1.00) |  |  |  |",
        "| G | relu | 0.70 (0.50) | 1 not verified |  |  |",
    ]
    for table in tables.results_table, tables.speedups_table, tables.layers_table:
        assert "No result of a GPU" in table(tmp_path / "gpu" / "none")


def test_a_layer_that_another_section_measured_has_a_row(tmp_path):
    """Its call is in two sections, and measured in the first of them."""

    def row(case, section, us, **more):
        times = {"median_us": us, "baseline_us": 2 * us, "speedup": 2.0, "verified": True}
        return {**rows.head(case, "forward", "tritorch"), **times, "section": section, **more}

    cases = {case.op: case for case in planned("layers", Setting())}
    found = [
        row(cases["cross_entropy"], "pointwise", 3.0),
        row(cases["cross_entropy"], "pointwise", 9.0, name="another call"),
        row(cases["softmax"], "layers", 4.0),
        # of a user's own
        row(cases["relu"], None, 5.0),
    ]
    (tmp_path / "gpu").mkdir()
    text = json.dumps({"environment": {"gpu": "G", "date": "1"}, "rows": found})
    (tmp_path / "gpu" / "1.json").write_text(text)
    assert tables.layers_table(tmp_path).splitlines()[2:] == [
        "| G | cross_entropy | input[256, 1000] target[256]:int64 | 3.0 | 2.00 |  |  |",
        "| G | softmax | input[4096, 1000] dim=1 dtype=None | 4.0 | 2.00 |  |  |",
    ]


def test_peers_stand_beside_us_in_the_newest_run_that_has_them(tmp_path):
    def result(date, *rows):
        text = json.dumps({"environment": {"gpu": "G", "date": date}, "rows": rows})
        (tmp_path / "gpu").mkdir(exist_ok=True)
        (tmp_path / "gpu" / f"{date}.json").write_text(text)

    def row(who, us, speedup=None, verified=True, which="forward"):
        return {
            "op": "relu",
            "name": "odd",
            "shape": [3, 5],
            "dtype": "bfloat16",
            "layout": "contiguous",
            "pass": which,
            "implementation": who,
            "median_us": us,
            "speedup": speedup,
            "verified": verified,
        }

    result("2026-01-01", row("torch", 9.0), row("tritorch", 9.0, 1.0), row("attorch", 1.0, 9.0))
    result(
        "2026-01-02",
        row("torch", 2.0),
        row("tritorch", 1.0, 2.0),
        row("flag_gems", 4.0, 0.5),
        row("attorch", 1.0, verified=False),
        row("liger_kernel", None, verified=False),
        row("torch", 5.0, which="backward"),
        row("tritorch", 5.0, 1.0, which="backward"),
    )
    # nobody is beside us in the newest one
    result("2026-01-03", row("torch", 8.0), row("tritorch", 8.0, 1.0))
    assert peers_table.table(tmp_path).splitlines()[2:] == [
        "| G | relu | odd [3, 5] | bfloat16 | forward | 2.0 | 2.00 | 0.50 | wrong | raises |"
    ]
    assert "No result" in peers_table.table(tmp_path / "none")


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert 1.0 < loss.item() < 5.0
    assert len(list(names["original"].parameters())) == 6
