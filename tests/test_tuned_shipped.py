"""The tables that are shipped, and what `tritorch tune` makes of them: rows that a GPU measured, of
kernels that exist, which compile.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

from tritorch import launch, tuned
from tritorch.bench import candidates, tuned_table
from tritorch.bench.recording import record
from tritorch.bench.resnet50 import Shapes
from tritorch.bench.tune import Answer
from tritorch.testing import configurations, dry

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tritorch" / "data" / "tuned").glob("*.json"))
# what a table may say beside what the entries of the kernel's own have
TILE_OF_PIXELS = {"BLOCK_N", "BLOCK_P", "BLOCK_Q"}
LIBRARIES = {"cudnn", "cublas"}


def test_there_are_tables():
    assert FILES


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request, tmp_path, monkeypatch):
    """A shipped table after another run has gone on with it, on the same GPU."""
    file = Path(shutil.copy(request.param, tmp_path))
    [gpu] = {one["gpu"] for one in json.loads(file.read_text())["environments"]}
    here = {"gpu": gpu, "commit": "0" * 40, "date": "2099-01-01T00:00:00+00:00"}
    monkeypatch.setattr(tuned_table, "environment", lambda: here)
    table = tuned_table.TunedTable(file)
    for answer in answers():
        assert not table.knows(answer.function, answer.sizes, answer.config)
        table.add(answer.row(), answer.config)
    return file


def answers():
    """A kernel's own entry, a tile of pixels, and that the portable kernel is the fastest."""
    entry = launch.kernels("pool").POOL_CONFIGS[2][0]
    yield Answer("pool_config", (True, 64, 2), entry, (("max_pool_forward", 33.3, 33.3),), 3)
    sizes = (3, 56, 56, 64, 64, 9, 1, False)
    *_, tile = candidates.candidates("conv2d_tma_config", sizes, 2)
    assert tile.kwargs.keys() >= TILE_OF_PIXELS
    calls = ("convolution(a)", 25.0, 20.0), ("convolution(b)", 27.0, 21.5)
    yield Answer("conv2d_tma_config", sizes, tile, calls, 9, ("this: another result",))
    sizes = (64, 64, 3, 3, 3, 56, 56, 1)
    yield Answer("conv2d_grad_weight_tma_config", sizes, None, (("a", 5.0, 5.0),), 2)


def test_a_table_says_where_each_row_was_measured(file):
    content = json.loads(file.read_text())
    shipped = json.loads((ROOT / "tritorch" / "data" / "tuned" / file.name).read_text())
    added = len(content["rows"]) - len(list(answers()))
    # what was there is as it was
    assert content["rows"][:added] == shipped["rows"]
    assert content["environments"][:-1] == shipped["environments"]
    for one in content["environments"]:
        assert tuned.shipped(one["gpu"]).name == file.name
        assert one["date"]
        assert len(one["commit"]) == 40
        if "source" in one:
            source = json.loads((ROOT / one["source"]).read_text())["environment"]
            assert {**source, "source": one["source"]} == one
    measured = [row["environment"] for row in content["rows"]]
    assert sorted(set(measured)) == list(range(len(content["environments"])))
    assert measured[added:] == [len(shipped["environments"])] * len(list(answers()))


def test_rows_are_of_kernels_that_exist(file):
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        family = candidates.family(row["function"])
        choose = getattr(family, row["function"])
        inspect.signature(choose).bind(*row["sizes"])
        if row["kwargs"] is not None:
            names = set(entries(row["function"])[0].kwargs)
            # with a stride a tile of several columns may read others than its own
            if row["function"] == "conv2d_tma_config" and row["sizes"][6] == 1:
                names |= TILE_OF_PIXELS & set(row["kwargs"])
            assert set(row["kwargs"]) == names
    assert len(tuned.read(file)) == len(rows)


def entries(function):
    table = configurations.tables(candidates.family(function).__name__.rpartition(".")[2])[function]
    return (
        [entry for some in table.values() for entry in some] if isinstance(table, dict) else table
    )


def test_tune_would_find_every_row(file):
    """Its configuration is among those that are timed for its sizes."""
    for (function, sizes), config in tuned.read(file).items():
        timed = candidates.candidates(function, sizes, 2)
        timed.append(candidates.own(function, sizes))
        assert str(config) in map(str, timed), (function, sizes)


def test_no_row_is_slower_than_what_else_was_measured(file):
    """Than the kernel's own choice of that day, and than the portable kernel; summed over the calls
    that ask the same.
    """
    content = json.loads(file.read_text())
    for row in content["rows"]:
        assert row["calls"]
        for name in ("own_us", "median_us"):
            mean = sum(call[name] for call in row["calls"]) / len(row["calls"])
            assert row[name] == pytest.approx(mean, abs=1e-3)
        assert row["median_us"] <= row["own_us"]
        source = content["environments"][row["environment"]].get("source")
        if source is not None:
            agrees(row, times_of(source))


def times_of(source):
    times = {}
    for row in json.loads((ROOT / source).read_text())["rows"]:
        case = times.setdefault(f"{row['name']} {row['pass']} {row['batch']}", {})
        case[row["configuration"]] = row["median_us"]
    return times


def agrees(row, times):
    """With the result file that its times are from."""
    timed = []
    for call in row["calls"]:
        case = times[call["call"]]
        assert call["own_us"] == case["default"]
        of_row = [case[label] for label in case if label.removesuffix(" split*1") == label_of(row)]
        # the own choice was timed by that name, and only a kernel's own entry by that name alone
        assert call["median_us"] in (*of_row, case["default"])
        if of_row:
            assert of_row[0] == pytest.approx(call["median_us"], rel=0.1)
        else:
            kwargs = [entry.kwargs for entry in entries(row["function"]) if same(entry, row)]
            assert row["kwargs"] in kwargs
        timed.append({one for one in case if " split*" not in one or one.endswith(" split*1")})
    assert row["candidates"] == len(set.intersection(*timed) - LIBRARIES - {"portable"})
    measured = [times[call["call"]].get("portable") for call in row["calls"]]
    if None not in measured:
        assert sum(call["median_us"] for call in row["calls"]) <= sum(measured), row


def same(entry, row):
    settings = "num_warps", "num_stages", "maxnreg"
    return all(getattr(entry, name) == row[name] for name in settings)


def label_of(row):
    """What a sweep calls a configuration."""
    sizes, ends = row["kwargs"], f"w{row['num_warps']} s{row['num_stages']}"
    if row["function"] == "matmul_tma_config":
        m, n, k = (sizes[f"BLOCK_{axis}"] for axis in "MNK")
        halves = sizes["PIECES"] != (2 if n > 128 or m * n > 128 * 128 else 1)
        return f"{sizes['FORM']} {m}x{n}x{k} {ends}{' halves' * halves}"
    k, c = sizes["BLOCK_K"], sizes["BLOCK_C"]
    if row["function"] == "conv2d_grad_weight_tma_config":
        return f"K{k} C{c} px{sizes['BLOCK_PIXELS']} taps{sizes['TAPS']} {ends}"
    pixels = sizes["BLOCK_NPQ"]
    own = launch.kernels("conv_tma_configs").tile_of_pixels(*row["sizes"][:3], pixels)
    blocks = (sizes.get(name, one) for name, one in zip(sorted(TILE_OF_PIXELS), own, strict=True))
    tile = ",".join(map(str, blocks))
    return f"K{k} px{pixels} C{c} {ends} p{int(sizes['PERSISTENT'])} {tile}"


def test_rows_compile_without_a_spill(file, monkeypatch):
    """Each configuration in each form in which ResNet-50 or a square product launches it; what they
    do not launch, in the first of them that asks its function.  Entries of the kernels' own tables
    are compiled elsewhere.
    """
    table = tuned.read(file)
    launched, seen = launch.Prepared.__call__, set()

    def run(self, *tensors, floats=()):
        form = self.kernel.__name__, str(self.config), str(self.constants)
        if form not in seen and any(self.config is one for one in wanted):
            seen.add(form)
            launched(self, *tensors, floats=floats)

    def compile_(case, wants):
        function = case.implementations["tritorch"]
        return record(function, case.arguments, "sm_90", gradients=wants).launches

    wanted = [config for config in table.values() if config is not None]
    monkeypatch.setattr(launch.Prepared, "__call__", run)
    kernels, asking = [], {}
    for case in cases():
        for wants in case.passes.values():
            with tuned.using(table), launch.questions() as asked:
                kernels += compile_(case, wants)
            for function, _ in asked:
                asking.setdefault(function, (case, wants))
    for (function, _), config in table.items():
        compiled = {one for _, one, _ in seen}
        own = {str(entry) for entry in entries(function)}
        if config is not None and str(config) not in compiled | own:
            with launch.override(function, config):
                kernels += compile_(*asking[function])
            assert str(config) in {one for _, one, _ in seen}
    assert len(kernels) == len(seen)
    for kernel in kernels:
        assert dry.problems(kernel, "sm_90") == []
        assert dry.resources(kernel).count("HGMMA") > 0


def cases():
    for batch in (256, 32):
        yield from Shapes(batch).convolutions()
    yield from (case for case in Shapes(256).products() if case.name.startswith("square"))
