"""What a report says, word by word, of findings and counts that are given."""

from __future__ import annotations

import pytest

from tritorch.testing.findings import Finding
from tritorch.testing.report import Report, grammatical

pytestmark = pytest.mark.reference


def of(finding, cases=1):
    report = Report("mine", "torch's", "quick", 0, "cpu")
    report.section("memory").cases = cases
    report.section("rounding").cases = cases
    report.add("rounding", [finding])
    return report


@pytest.mark.parametrize(
    ("said", "people_say"),
    [
        (
            "1 lanes that are masked off without `other` change the result: 3 of 3 elements of "
            "result 0 when they hold a large number instead of NaN",
            "1 lane that is masked off without `other` changes the result: 3 of 3 elements of "
            "result 0 when it holds a large number instead of NaN",
        ),
        (
            "11 lanes that are masked off without `other` change the result: 1 of 3 elements of "
            "result 0 when they hold a large number instead of NaN",
            None,
        ),
        (
            "output 0: 1 of 1 elements differ, first at (0,): nan where 2 is right",
            "output 0: 1 of 1 element differs, first at (0,): nan where 2 is right",
        ),
        ("output 0: 21 of 31 elements differ, first at (0,)", None),
        (
            "at (1,) nan; 1 elements are not finite: memory that nobody wrote",
            "at (1,) nan; 1 element is not finite: memory that nobody wrote",
        ),
        (
            "1 of the 5 elements of `y_ptr` (shape (5,)) are never written; k got it",
            "1 of the 5 elements of `y_ptr` (shape (5,)) is never written; k got it",
        ),
        (
            "loads 15 elements past the end of `a` (1 elements, shape (1, 1)), at offsets 1 to 15",
            "loads 15 elements past the end of `a` (1 element, shape (1, 1)), at offsets 1 to 15",
        ),
        ("loads 1 elements that belong to no tensor", "loads 1 element that belongs to no tensor"),
        ("error 0.1 elements, 2,1 elements", None),
    ],
)
def test_one_thing_is_no_plural(said, people_say):
    expected = said if people_say is None else people_say
    assert grammatical(said) == expected
    (finding,) = of(Finding("values", said)).findings
    # in the text, and for programs
    assert finding.message == expected


def test_one_case_and_one_lane_are_no_plural():
    finding = Finding("values", "wrong", program=(0, 0, 0), lanes=((3,),), count=1)
    text = str(of(finding))
    assert "rounding  FAIL  1 case, 1 finding\n" in text
    assert "program (0, 0, 0); lane 3\n" in text
    assert "1 finding in 1 case, " in text
    several = Finding("values", "wrong", program=(0, 0, 0), lanes=((3,), (4,)), count=2)
    text = str(of(several, cases=2))
    assert "rounding  FAIL  2 cases, 1 finding\n" in text
    assert "program (0, 0, 0); lanes 3, 4\n" in text
    assert "lanes 3, ..." in str(
        of(Finding("values", "w", program=(0, 0, 0), lanes=((3,),), count=9))
    )


def test_a_property_that_shows_a_known_finding_does_not_pass():
    report = of(Finding("values", "wrong", argument="y"), cases=2)
    report.section("layouts").cases = 3
    assert report.add("layouts", [Finding("values", "wrong elsewhere", argument="y")]) == []
    assert [finding.message for finding in report.findings] == ["wrong"]
    text = str(report)
    assert "  rounding  FAIL  2 cases, 1 finding\n" in text
    assert "  layouts   FAIL  3 cases, no new finding\n" in text
    assert "  memory    pass  2 cases\n" in text
    rows = {row["name"]: row["failed"] for row in report.to_json()["sections"]}
    assert rows == {"memory": False, "rounding": True, "layouts": True}
