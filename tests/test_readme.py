"""The README's tables are those of the code, and its examples run."""

import json
import re
from pathlib import Path

import pytest
import torch

from tritorch.bench import tables

pytestmark = pytest.mark.reference

README = Path(__file__).resolve().parent.parent / "README.md"


def test_tables_are_fresh():
    text = README.read_text()
    assert set(re.findall(r"<!-- table: ([a-z-]+) -->", text)) == set(tables.TABLES)
    assert tables.regenerated(text) == text, "run python -m tritorch.bench.tables README.md"


def test_a_stale_table_is_seen():
    text = "a\n<!-- table: ops -->\n| old |\n<!-- end -->\nb\n"
    assert (
        tables.regenerated(text) == f"a\n<!-- table: ops -->\n{tables.ops_table()}<!-- end -->\nb\n"
    )
    with pytest.raises(KeyError, match="unknown"):
        tables.regenerated("<!-- table: unknown -->\n<!-- end -->")


def test_unverified_rows_show_no_speedup(tmp_path):
    (tmp_path / "gpu").mkdir()
    row = {"op": "relu", "pass": "forward", "implementation": "tritorch"}
    row |= {"median_us": 2.0, "speedup": 3.0}
    environment = {"gpu": "G", "date": "2026-01-02T03:04:05"}
    rows = [row | {"verified": verified} for verified in (True, False)]
    result = json.dumps({"environment": environment, "rows": rows})
    (tmp_path / "gpu" / "1.json").write_text(result)
    table = tables.results_table(tmp_path).splitlines()
    assert table[2] == "| G | 2026-01-02 | relu | forward | tritorch | 2.0 | 3.00 |"
    assert table[3] == "| G | 2026-01-02 | relu | forward | tritorch | 2.0 | not verified |"
    assert "No result of a GPU" in tables.results_table(tmp_path / "gpu")


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
