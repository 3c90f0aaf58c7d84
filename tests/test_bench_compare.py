"""Two results of the same speed are SAME, a slow-down is SLOWER, what cannot be told is UNSURE."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest

from tritorch.bench import compare, host, reports
from tritorch.bench.compare import NoResult, read
from tritorch.bench.intervals import median
from tritorch.bench.measured import RESULTS

pytestmark = pytest.mark.reference

REAL = RESULTS / "nvidia-h100-80gb-hbm3" / "2026-11-26" / "163943Z-gpu.json"


def row(number, us, draw, *, noise=0.02, drift=0.005, rounds=6, calls=12, **more):
    """A row as a GPU gives it: samples with a long tail, rounds that differ a little."""
    samples = []
    for _ in range(rounds):
        centre = us * math.exp(draw.gauss(0, drift))
        samples.append([centre * math.exp(abs(draw.gauss(0, noise))) for _ in range(calls)])
    flat = [sample for one in samples for sample in one]
    return {
        "op": "relu",
        "shape": [number],
        "pass": "forward",
        "implementation": "tritorch",
        "median_us": median(flat).value,
        "samples_us": samples,
        "verified": True,
        **more,
    }


def result(seed, factor=1.0, count=100, **options):
    """Rows between 5 and 5000 microseconds; equal ones for every seed, but for noise."""
    draw = random.Random(seed)
    times = [5 * 1000 ** (i / count) for i in range(count)]
    rows = [row(i, us * factor, draw, **options) for i, us in enumerate(times)]
    return {"schema": 1, "rows": rows, "environment": {"gpu": "G", "date": str(seed)}}


@pytest.mark.parametrize("seed", range(5))
def test_the_same_speed_is_the_same_at_least_95_times_of_100(seed):
    report = compare.compare(result(2 * seed), result(2 * seed + 1))
    assert len(report.rows) == 100
    assert report.count("SAME") >= 95
    assert report.count("SLOWER") + report.count("FASTER") == 0
    assert report.geomean.low < 1 < report.geomean.high or abs(report.geomean.value - 1) < 0.005


def test_a_slow_down_of_a_fifth_is_slower():
    report = compare.compare(result(1), result(2, factor=1.2))
    assert report.count("SLOWER") == 100
    assert report.geomean.value == pytest.approx(1.2, rel=0.01)
    # intervals of 95 %
    assert sum(one.ratio.low < 1.2 < one.ratio.high for one in report.rows) >= 90
    back = compare.compare(result(2, factor=1.2), result(1))
    assert back.count("FASTER") == 100


OTHERS = ({"implementation": "torch"}, {"op": "copy", "name": "ceiling", "implementation": "torch"})


@pytest.mark.parametrize("other", [*OTHERS, {"implementation": "flag_gems"}])
def test_the_mean_is_of_our_rows_alone_and_torchs_is_beside_it(other):
    old, new = result(1, count=20), result(2, factor=1.2, count=20)
    both = [{"rows": one["rows"] + result(3, count=20, **other)["rows"]} for one in (old, new)]
    report = compare.compare(*both)
    assert report.geomean.value == pytest.approx(1.2, rel=0.01)
    assert len(report.ours) == report.count("SLOWER") == 20
    if other["implementation"] == "torch":
        assert report.control.value == 1
    else:
        assert report.control is None
    slowed = result(3, factor=1.3, count=20, **other)["rows"]
    report = compare.compare(both[0], {"rows": old["rows"] + slowed})
    assert report.geomean.value == 1
    assert {one.verdict for one in report.ours} == {"SAME"}
    assert report.count("SLOWER") == 20


def test_one_slow_row_among_many_is_found():
    new = result(2)
    slow = row(17, 1.1 * 5 * 1000**0.17, random.Random(5))
    new["rows"][17] = slow
    report = compare.compare(result(1), new)
    assert [one.row["shape"] for one in report.rows if one.verdict == "SLOWER"] == [[17]]
    # the slowest first
    assert report.rows[0].verdict == "SLOWER"


def halves(factor):
    """The even and the odd rounds of what an H100 gave, which took turns."""
    rows = read(REAL)["rows"]
    rows = [row for row in rows if row["verified"] and len(row.get("samples_us") or ()) >= 6]
    for number, slower in ((0, 1.0), (1, factor)):
        found = []
        for row in rows:
            rounds = [[slower * us for us in one] for one in row["samples_us"][number::2]]
            us = median([us for one in rounds for us in one]).value
            found.append({**row, "samples_us": rounds, "median_us": us})
        yield {"rows": found, "environment": {}}


def test_half_of_what_a_gpu_gave_is_as_fast_as_the_other_half():
    report = compare.compare(*halves(1.0))
    assert len(report.rows) > 400
    # few rounds leave some unsure, and none wrong
    assert report.count("SLOWER") + report.count("FASTER") == 0
    assert report.count("SAME") > 0.75 * len(report.rows)
    assert abs(report.geomean.value - 1) < 0.001


def test_a_slow_down_of_a_fifth_of_what_a_gpu_gave_is_slower():
    report = compare.compare(*halves(1.2))
    assert report.count("SLOWER") >= 0.95 * len(report.rows)
    assert report.count("SLOWER") + report.count("UNSURE") == len(report.rows)


def test_a_difference_below_the_threshold_is_the_same():
    old, new = result(1, noise=0.002, drift=0.0005), result(2, 1.01, noise=0.002, drift=0.0005)
    assert compare.compare(old, new).count("SAME") == 100
    assert compare.compare(old, new, threshold=0.005).count("SLOWER") == 100


def test_a_difference_that_may_be_beyond_the_threshold_is_unsure():
    # surely not equal, and perhaps not within 3 %
    old, new = (
        result(seed, factor, noise=0.002, drift=0.004) for seed, factor in ((1, 1), (2, 1.027))
    )
    report = compare.compare(old, new)
    beyond = [one for one in report.rows if one.ratio.high > 1.03 and one.ratio.value < 1.03]
    assert sum(one.chance < 0.05 for one in beyond) > 10
    assert {one.verdict for one in beyond} == {"UNSURE"}


def test_noise_that_hides_the_answer_is_unsure():
    old, new = (result(seed, noise=0.5, drift=0.2, rounds=3, calls=4) for seed in (1, 2))
    report = compare.compare(old, new)
    assert report.count("UNSURE") >= 90
    assert report.count("SLOWER") == 0


def test_rows_that_were_not_verified_are_not_compared():
    old, new = result(1, count=3), result(2, count=3)
    new["rows"][1] |= {"verified": False, "failure": "C1 element"}
    report = compare.compare(old, new)
    (wrong,) = (one for one in report.rows if one.verdict == "WRONG")
    assert (wrong.ratio, wrong.why) == (None, "new: C1 element")
    assert report.rows[0] is wrong


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_call_that_raises_in_one_of_them_is_wrong(which):
    both = {"old": result(1, count=3), "new": result(2, count=3)}
    raises = {"median_us": None, "verified": False, "failure": "raises ValueError: no"}
    both[which]["rows"][1] |= raises
    del both[which]["rows"][1]["samples_us"]
    report = compare.compare(**both)
    assert (report.count("WRONG"), report.only_old, report.only_new) == (1, (), ())
    (wrong,) = (one for one in report.rows if one.verdict == "WRONG")
    assert wrong.why == f"{which}: raises ValueError: no"
    times = {"old": wrong.old_us, "new": wrong.new_us}
    assert times.pop(which) is None
    assert all(us > 0 for us in times.values())


@pytest.mark.parametrize(
    ("old_has", "new_has", "why"),
    [
        ({"host_bound": True}, {"host_bound": False}, "the GPU waited for the host: old"),
        ({}, {"host_bound": True}, "the GPU waited for the host: new"),
        (
            {"clock_mhz": [1980.0, 1980.0]},
            {"clock_mhz": [1200.0, 1215.0]},
            "the GPU's clock was at 1980 MHz, then at 1215",
        ),
        ({"clock_mhz": [1980.0, 1980.0]}, {"clock_mhz": [1600.0, 1905.0]}, ""),
        ({"clock_mhz": [1980.0, 1980.0]}, {"clock_mhz": None}, ""),
        ({"throttled": []}, {"throttled": ["heat"]}, "the GPU was throttled: new"),
    ],
)
def test_what_else_explains_a_difference_makes_it_unsure(old_has, new_has, why):
    old, new = result(1, count=2, **old_has), result(2, factor=1.5, count=2, **new_has)
    report = compare.compare(old, new)
    assert {one.why for one in report.rows} == {why}
    assert report.count("UNSURE" if why else "SLOWER") == 2


def test_what_is_in_one_result_alone_and_what_differs_is_said():
    old, new = result(1, count=3), result(2, count=4)
    del new["rows"][0]
    old["environment"] |= {"torch": "2.11", "tf32": {"conv": False}}
    new["environment"] |= {"torch": "2.13", "tf32": {"conv": True}}
    report = compare.compare(old, new)
    assert report.only_old == ("relu [0] forward tritorch",)
    assert report.only_new == ("relu [3] forward tritorch",)
    assert report.environment == {"torch": ("2.11", "2.13"), "tf32.conv": (False, True)}


def test_other_arguments_are_another_call():
    old, new = result(1, count=2), result(2, factor=0.5, count=2)
    for both, k in ((old, 512), (new, 16)):
        both["rows"][0]["arguments"] = "a[8, 32] b[32, 8]"
        both["rows"][1]["arguments"] = f"a[8, 32] b[32, {k}]"
    report = compare.compare(old, new)
    assert [one.row["arguments"] for one in report.rows] == ["a[8, 32] b[32, 8]"]
    assert report.only_old == ("relu a[8, 32] b[32, 512] forward tritorch",)
    assert report.only_new == ("relu a[8, 32] b[32, 16] forward tritorch",)
    # two calls of one result that differ in nothing else
    new["rows"].append({**new["rows"][0], "shape": [1], "arguments": "a[8, 32] b[32, 512]"})
    assert len(compare.compare(old, new).rows) == 2


def test_results_that_do_not_say_their_arguments_are_compared_by_their_shapes():
    old, new = result(1, count=3), result(2, factor=1.5, count=3)
    for one in new["rows"]:
        one["arguments"] = "input[8]"
    assert compare.compare(old, new).count("SLOWER") == 3
    assert compare.compare(new, old).count("FASTER") == 3


def test_a_shape_that_two_calls_have_tells_neither():
    old, new = result(1, count=1), result(2, count=1)
    [one] = new["rows"]
    new["rows"] = [one | {"arguments": f"input[8] kernel_size={size}"} for size in (1, 3)]
    report = compare.compare(old, new)
    assert report.rows == ()
    assert report.only_old == ("relu [0] forward tritorch",)
    assert report.only_new == tuple(
        f"relu input[8] kernel_size={size} forward tritorch" for size in (1, 3)
    )


def test_old_results_without_samples_are_compared_by_their_intervals():
    old, new = result(1, count=5), result(2, factor=1.5, count=5)
    for one in old["rows"]:
        del one["samples_us"]
        one["interval_us"] = [0.99 * one["median_us"], 1.01 * one["median_us"]]
    assert compare.compare(old, new).count("SLOWER") == 5


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_row_that_is_a_number_alone_is_unsure(which):
    both = {"old": result(1, count=3), "new": result(2, factor=1.5, count=3)}
    for one in both[which]["rows"][:2]:
        del one["samples_us"]
    # what a host takes has neither samples nor an interval
    report = compare.compare(**both)
    assert [one.verdict for one in report.rows] == ["SLOWER", "UNSURE", "UNSURE"]
    assert [one.ratio for one in report.rows[1:]] == [None, None]
    assert report.rows[1].why == "nobody knows how sure these times are: there are no samples"
    assert report.geomean.value == report.rows[0].ratio.value


def test_a_result_is_the_same_as_itself():
    one = result(1)
    assert compare.compare(one, copy.deepcopy(one)).count("SAME") == 100


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting"),
        ("[]", "no result of a benchmark"),
        (json.dumps({"rows": [], "schema": 0}), "has schema 0, this tritorch reads 1"),
        (json.dumps({"rows": [], "schema": 1}), "it has no environment"),
        (json.dumps({"rows": [3], "schema": 1}), "whose rows have no op, shape, pass"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(NoResult, match=said):
        read(tmp_path / "a.json")
    with pytest.raises(NoResult, match="No such file"):
        read(tmp_path / "b.json")


COMMITTED = sorted(RESULTS.glob("*/*/*.json"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in COMMITTED])
def test_what_is_committed_is_compared_and_shown_or_refused(path, monkeypatch):
    # pictures take their time
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kind = json.loads(path.read_text()).get("kind")
    if kind not in ("bench", "calibration"):
        with pytest.raises(NoResult, match=r"whose rows have no |has schema None"):
            read(path)
        return
    content = read(path)
    report = compare.compare(content, content)
    assert report.count("FASTER") + report.count("SLOWER") == 0
    assert "<html" in reports.page(content)


def test_a_result_of_the_host_alone_is_refused(tmp_path, monkeypatch):
    row = {"op": "relu", "median_us": 1.0, "baseline_us": 2.0, "verified": True, "functions": 3}
    rows = [{**row, "pass": which, "launches": 1} for which in ("host", "host_both")]
    monkeypatch.setattr(host, "rows", lambda: rows)
    host.main(["--json", str(tmp_path / "a.json")])
    with pytest.raises(NoResult, match="is of kind host, whose rows have no shape, implementation"):
        read(tmp_path / "a.json")
