"""The catalogue of defects fits the code, and what is reported of it is what the result says."""

import json

import pytest

from tests.mutation import catalogue, report

pytestmark = pytest.mark.reference

ROOT = catalogue.FOLDER.parents[2]
MUTANTS = catalogue.read()


def test_every_defect_can_be_applied():
    """A line that has changed takes its entry along, or the entry goes."""
    stale = []
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        try:
            changed = mutant.applied(source).splitlines()
        except ValueError as error:
            stale.append(str(error))
            continue
        compile("\n".join(changed), mutant.file, "exec")
        differs = [
            n
            for n, pair in enumerate(zip(source.splitlines(), changed, strict=True), 1)
            if pair[0] != pair[1]
        ]
        assert differs == [mutant.line(source)], mutant.id
    assert not stale, "\n".join(stale)


def test_ids_are_taken_once():
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS) >= 70


def test_every_op_has_defects():
    import tritorch.ops  # noqa: F401  declares the specs
    from tritorch.registry import specs

    assert {op for mutant in MUTANTS for op in mutant.ops} == {spec.name for spec in specs()}


@pytest.mark.parametrize(
    ("function", "occurrence", "line"),
    [("f", 0, 2), ("", 2, 4), ("g", 1, 4), ("g", 2, 5)],
)
def test_a_line_is_found_where_it_is_said_to_be(function, occurrence, line):
    source = "def f():\n    a = 1\ndef g():\n    a = 1\n    a = 1\n"
    mutant = defect(function=function, occurrence=occurrence)
    assert mutant.line(source) == line
    assert mutant.applied(source).splitlines()[line - 1] == "    a = 2"


@pytest.mark.parametrize(
    ("source", "occurrence", "number"),
    [("b = 1\n", 0, "0 lines"), ("a = 1\na = 1\n", 0, "2 lines"), ("a = 1\n", 1, "1 lines")],
)
def test_a_stale_entry_is_an_error(source, occurrence, number):
    with pytest.raises(ValueError, match=rf"one: kernels/x.py has {number} 'a = 1'"):
        defect(function="", occurrence=occurrence).line(source)


def defect(**fields):
    given = {"id": "one", "family": "x", "file": "kernels/x.py", "before": "a = 1"}
    given |= {"after": "a = 2", "kind": "off by one", "defect": "", "ops": (), "survives": ""}
    given["unchecked"] = ""
    return catalogue.Mutant(**given, **fields)


def test_an_unknown_line_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_text("family: x\n\n[one] off by one: it is\nwhere: f\n")
    with pytest.raises(ValueError, match="cannot read 'where: f'"):
        catalogue.read(tmp_path)


def test_the_table_is_that_of_the_result():
    rows = list(report.read(report.RESULT).values())
    text = report.GUIDE.read_text()
    assert report.regenerated(text, rows) == text, "run python -m tests.mutation.run"


def test_what_a_check_does_not_find_is_explained():
    rows = report.read(report.RESULT)
    alive = {i for i, r in rows.items() if not r.get("check", {}).get("killed", True)}
    unexplained = {mutant.id for mutant in MUTANTS if not mutant.unchecked}
    assert not {i for i in alive if "survives" not in rows[i]} & unexplained
    # and what it does find needs no excuse
    killed = {i for i, r in rows.items() if r.get("check", {}).get("killed")}
    assert killed <= unexplained


def test_the_totals_are_those_of_the_rows():
    result = json.loads(report.RESULT.read_text())
    assert result["totals"] == report.totals(result["rows"])
    for half in ("suite", "check"):
        killed = [row for row in result["rows"] if row.get(half, {}).get("killed")]
        assert all(row[half]["by"] for row in killed)


def test_defects_that_nothing_can_see_do_not_count():
    rows = [
        {"family": "a", "suite": {"killed": True}},
        {"family": "a", "suite": {"killed": False}, "survives": "equal numbers"},
        {"family": "b", "suite": {"killed": False}},
    ]
    totals = report.totals(rows)
    assert totals["suite"] == {"measured": 2, "killed": 1, "percent": 50.0}
    assert totals["check"] == {"measured": 0, "killed": 0, "percent": None}
    assert "| a | 2 | 1 of 1 | 0 of 0 |\n| b | 1 | 0 of 1 | 0 of 0 |\n| all | 3 |" in (
        report.table(rows)
    )
