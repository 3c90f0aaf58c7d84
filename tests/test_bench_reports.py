"""What a result has besides times is in the tables, the CSV and the page too."""

from __future__ import annotations

import csv

import pytest

from tritorch.bench import plots, reports, timing, told
from tritorch.bench.store import Store

pytestmark = pytest.mark.reference

KERNELS = [
    {"kernel": "a_kernel", "registers": 40, "spills": 0, "num_warps": 4, "shared_bytes": 0},
    {"kernel": "b_kernel", "registers": 168, "spills": 6, "num_warps": 8, "shared_bytes": 147456},
]
ROW = {
    "op": "conv2d", "name": "s1", "shape": [8, 3], "dtype": "bfloat16", "layout": "channels_last",
    "pass": "forward", "implementation": "tritorch", "baseline": "torch", "median_us": 20.0,
    "speedup": 1.5, "speedup_interval": [1.4, 1.6], "verified": True, "roofline": 0.5,
    "tflops": 1.0, "gbps": 100.0, "graph_us": 17.25, "host_us": 9.5, "peak_bytes": 3 << 20,
    "first_seconds": 1.234, "kernels": KERNELS,
}  # fmt: skip
TORCH = {
    **{name: ROW[name] for name in ("op", "name", "shape", "dtype", "layout", "pass")},
    "implementation": "torch", "baseline": "", "median_us": 30.0, "speedup": None,
    "verified": True,
}  # fmt: skip


def result(*rows):
    return {"schema": 1, "environment": {"gpu": "G"}, "rows": list(rows)}


DETAILS = (
    "1", "100", "17.25", "9.5", "3.0 MiB", "1.23",
    "a: 40 registers, 4 warps; b: 168 registers, 6 spilled, 144 KiB shared, 8 warps",
)  # fmt: skip


def test_details_are_cells():
    assert reports.details(ROW)[4:] == DETAILS
    assert reports.details(TORCH)[4:] == ("",) * 7


def test_a_graph_that_finds_a_warm_cache_and_a_late_host_are_marked():
    assert reports.details({**ROW, "graph_cold": True})[6] == "17.25"
    assert reports.details({**ROW, "graph_cold": False})[6] == "17.25 warm"
    assert reports.line({**ROW, "host_bound": False})[-1] == ""
    assert reports.line({**ROW, "host_bound": True})[-1] == "waited for the host"
    text = reports.markdown(result({**ROW, "host_bound": True, "graph_cold": False}))
    assert "waited for the host" in text
    assert "| 17.25 warm |" in text


def test_markdown_has_a_second_table_where_there_is_something_to_tell():
    text = reports.markdown(result(ROW, TORCH))
    assert " | ".join(DETAILS) in text
    # torch's row has no such numbers
    assert text.count("| torch |") == 1
    assert "CUDA graph" not in reports.markdown(result(TORCH))


def test_the_page_has_them_too():
    page = reports.page(result(ROW, TORCH))
    for cell in DETAILS:
        assert f"<td>{cell}</td>" in page


def test_the_page_tells_of_a_cold_cache_on_a_gpu_alone():
    text = " ".join(reports.page(result(ROW)).split())
    assert timing.CpuClock().cache() == 0
    assert "on a GPU each on a cold cache" in text
    assert text.count("cold cache") == 1


def test_csv_has_a_line_for_each_number():
    lines = csv.DictReader(reports.csv_text(result(ROW, TORCH)).splitlines())
    found = {one["metric"]: one["value"] for one in lines if one["implementation"] == "tritorch"}
    assert found["graph_us"] == "17.25"
    assert found["peak_bytes"] == str(3 << 20)
    # the most of any kernel, and all spills
    assert (found["registers"], found["spills"], found["shared_bytes"]) == ("168", "6", "147456")


def test_a_line_grows_with_the_least_time_that_the_ceilings_allow():
    rows = [{**ROW, "median_us": us, "roofline": share} for us, share in ((4, 0.5), (10, 0.4))]
    assert plots._lines(rows) == {}
    rows.append({**ROW, "median_us": 20.0, "roofline": 0.9})
    points = plots._lines(rows)["conv2d", "forward"]["tritorch"]
    assert points == [(2.0, 4), (4.0, 10), (18.0, 20.0)]
    # what has no ceiling has no place
    assert plots._lines([{**row, "roofline": None} for row in rows]) == {}


def test_a_machine_without_matplotlib_gets_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    store = Store(tmp_path / "gpu.json")
    store.rows, store.environment = [ROW], {"gpu": "G"}
    told.pictures(store)
    assert "Pictures need matplotlib" in (tmp_path / "gpu.html").read_text()
    assert not (tmp_path / "gpu.png").exists()
    assert "skipped: pictures: matplotlib is not installed" in capsys.readouterr().out


def test_estimates_have_a_picture_of_their_own_that_says_what_they_are(tmp_path):
    estimates = [
        {"op": op, "measured_us": us, "estimated_us": 1.1 * us}
        for op in ("relu", "conv2d")
        for us in (5.0, 50.0)
    ]
    titles = [title for title, _ in plots.figures([], estimates)]
    assert titles == ["Static estimates (not measurements) against what was measured"]
    page = reports.page({**result(), "calibration": estimates})
    assert page.count("<svg") == 1
    assert titles[0] in page
    plots.png([], tmp_path / "a.png", estimates)
    assert (tmp_path / "a.png").stat().st_size > 10_000
