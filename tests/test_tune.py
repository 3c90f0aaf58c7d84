"""Tuning: what a program asks, what is measured, and what is kept."""

import io
import json
import pkgutil

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from tritorch import backend, hardware, kernels, launch, ops, tuned
from tritorch.bench import candidates, timing, tune, tuned_table
from tritorch.bench.tuned_table import TunedTable
from tritorch.cli import main
from tritorch.cli import tune as tune_command
from tritorch.ops import matmul_tma
from tritorch.testing import configurations

pytestmark = pytest.mark.interpret

PLAN = timing.Plan(seconds=0.01)


def program(device):
    a, b = (torch.randn(33, 33, device=device, requires_grad=True) for _ in range(2))
    return lambda: ops.relu(ops.matmul(a, b)).sum().backward()


def test_what_a_program_asks_and_the_calls_that_ask_it(device):
    asked = tune.asked_by([program(device), program(device)])
    # forward, then the two gradients: one operand is transposed
    assert {name: list(map(str, tasks)) for (name, _), tasks in asked.items()} == {
        "matmul_config": ["matmul(33x33, 33x33)"] * 3,
    }
    layouts = [
        [a.stride() for a in task.arguments[:2]] for [_, tasks] in asked.items() for task in tasks
    ]
    assert layouts == [[(33, 1), (33, 1)], [(33, 1), (1, 33)], [(1, 33), (33, 1)]]
    tensors = [a for [task, *_] in asked.values() for a in task.arguments if torch.is_tensor(a)]
    assert {a.device.type for a in tensors} == {"meta"}


def test_a_table_in_use_does_not_hide_what_is_asked(device, monkeypatch):
    """Where a kernel declines by itself, another one asks next."""
    seen = []
    monkeypatch.setattr(tuned, "find", lambda *_: seen.append(tuned.forced))
    with tuned.using({("matmul_config", (1,)): None}):
        tune.asked_by([program(device)])
    assert seen == [{}] * 3


def test_a_call_that_runs_another_configuration_than_it_asks_for_is_not_tuned(device, monkeypatch):
    monkeypatch.setattr(matmul_tma, "_MIN_PRODUCTS", 0)
    last = torch.channels_last
    x = torch.randn(2, 16, 4, 4, device=device, dtype=torch.float16).contiguous(memory_format=last)
    w = torch.randn(16, 16, 1, 1, device=device, dtype=torch.float16)
    calls = {
        True: lambda: ops.conv2d(x, w),
        False: lambda: ops.conv2d_batch_norm(x, w, None, None, training=True),
    }
    for is_tuned, call in calls.items():
        with hardware.pretend(90), backend.use("triton"):
            asked = tune.asked_by([call])
        assert ("matmul_tma_config" in {function for function, _ in asked}) == is_tuned


@pytest.fixture
def two(monkeypatch):
    """Two small configurations of matmul, of which the kernel chooses the first."""
    kernels = launch.kernels("matmul")
    [first, *_] = kernels.MATMUL_CONFIGS[4]
    sizes = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 1}
    pair = [type(first)(sizes | {"BLOCK_K": k}, num_warps=4, num_stages=1) for k in (16, 64)]
    monkeypatch.setattr("tritorch.kernels.matmul.MATMUL_CONFIGS", {4: pair})
    monkeypatch.setattr(kernels, "MATMUL_CONFIGS", {4: pair}, raising=False)
    from tritorch.kernels import matmul

    def matmul_config(*sizes):
        return pair[0]

    monkeypatch.setattr(matmul, "matmul_config", matmul_config)
    monkeypatch.setattr(kernels, "matmul_config", matmul_config, raising=False)
    from tritorch.testing import configurations

    configurations.tables.cache_clear()
    monkeypatch.setattr(matmul_config, "__module__", matmul.__name__)
    # whatever is shipped
    monkeypatch.setattr(candidates, "_shipped", dict)
    yield pair
    configurations.tables.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """What each side takes, by name, one after the other; the names that were measured."""
    measured, values = [], {}

    def measure(sides, clock, plan, **options):
        measured.append((list(sides), plan.seconds))
        made = timing.intervals.median
        found = {name: values[name].pop(0) for name in sides}
        return {name: timing.Timing(((us,),), made([us])) for name, us in found.items()}

    monkeypatch.setattr(timing, "measure", measure)
    return measured, values


def test_the_fastest_of_all_calls_is_kept_and_not_measured_again(device, two, tmp_path, clock):
    measured, values = clock
    # in the first call the other one is slower
    values |= {"own": [9.0, 10.0, 20.0], "1": [11.0, 5.0, 14.0]}
    asked = tune.asked_by([program(device)])
    file = tmp_path / "table.json"
    here = torch.device(device)
    [found] = tune.tune(asked, TunedTable(file), here, PLAN)
    assert (found.function, found.config, found.own, found.best) == (
        "matmul_config",
        two[1],
        13,
        10,
    )
    # the time is for all calls together
    assert measured == [(["own", "1"], pytest.approx(PLAN.seconds / 3))] * 3
    assert str(tuned.read(file)["matmul_config", found.sizes]) == str(two[1])
    [row] = json.loads(file.read_text())["rows"]
    assert (row["own_us"], row["median_us"], row["candidates"]) == (13, 10, 2)
    assert [(one["own_us"], one["median_us"]) for one in row["calls"]] == [
        (9, 11),
        (10, 5),
        (20, 14),
    ]
    assert list(tune.tune(asked, TunedTable(file), here, PLAN)) == []
    assert len(measured) == 3


def test_the_own_choice_stays_where_the_sum_is_not_smaller(device, two, tmp_path, clock):
    clock[1].update({"own": [9.0, 10.0, 20.0], "1": [5.0, 11.0, 23.0]})
    asked = tune.asked_by([program(device)])
    [found] = tune.tune(asked, TunedTable(tmp_path / "t.json"), torch.device(device), PLAN)
    assert (found.config, found.own, found.best) == (two[0], 13, 13)


def test_what_one_call_cannot_take_is_not_taken(device, two, monkeypatch, clock):
    """Another result in the second of three calls."""
    measured, values = clock
    values |= {"own": [9.0] * 3, "1": [5.0] * 3}
    [(question, tasks)] = tune.asked_by([program(device)]).items()
    # expected and candidate of two calls; the own one alone of the third
    results, original = iter((1.0, 1.0, 1.0, 0.0, 1.0)), tune._results

    def other(*arguments):
        return [result.fill_(next(results)) for result in original(*arguments)]

    monkeypatch.setattr(tune, "_results", other)
    found = tune.answer(*question, tasks, torch.device(device), PLAN)
    assert found.config is two[0]
    assert found.refused == (f"{two[1]}: another result",)
    assert [names for names, _ in measured] == [["own", "1"], ["own"], ["own"]]
    assert found.candidates == 1


def test_a_call_that_another_kernel_takes_is_refused(device, two, monkeypatch, clock):
    """A plan may decline a configuration; its time is then not that configuration's."""
    clock[1].update({"own": [9.0] * 3, "1": [5.0] * 3})
    [(question, tasks)] = tune.asked_by([program(device)]).items()
    original = tune._results

    def portable(*arguments):
        found = original(*arguments)
        if launch._overrides:
            launch._recorders[-1][:] = ["some_other_kernel"]
        return found

    monkeypatch.setattr(tune, "_results", portable)
    found = tune.answer(*question, tasks, torch.device(device), PLAN)
    assert found.refused == (f"{two[1]}: another kernel runs",)


def test_every_function_chooses_for_kernels():
    functions = [
        function
        for module in pkgutil.iter_modules(kernels.__path__)
        for function in configurations.tables(module.name)
    ]
    assert {"matmul_tma_config", "conv2d_tma_config", "batch_norm_config"} <= set(functions)
    assert all(map(candidates.kernels_of, functions))
    assert "matmul_tma_kernel" in candidates.kernels_of("matmul_tma_config")
    assert "conv2d_tma_kernel" in candidates.kernels_of("conv2d_tma_config")
    assert "batch_norm_stats_kernel" in candidates.kernels_of("batch_norm_config")
    # of the portable kernel another function does
    assert "conv2d_kernel" not in candidates.kernels_of("conv2d_tma_config")


def test_a_kernel_that_declines_by_itself_is_asked_too(device, two, tmp_path, monkeypatch, clock):
    """Its choice is None: one of its configurations is the answer, or null is."""
    family = launch.kernels("matmul")
    monkeypatch.setattr(candidates, "own", lambda function, sizes: None)
    asked = tune.asked_by([program(device)])
    here, file = torch.device(device), tmp_path / "t.json"
    clock[1].update({"own": [9.0] * 3, "0": [9.0] * 3, "1": [5.0] * 3})
    [found] = tune.tune(asked, TunedTable(tmp_path / "first.json"), here, PLAN)
    assert (found.config, found.candidates) == (two[1], 3)
    clock[1].update({"own": [4.0] * 3, "0": [9.0] * 3, "1": [5.0] * 3})
    [found] = tune.tune(asked, TunedTable(file), here, PLAN)
    assert (found.config, found.best) == (None, 4)
    assert tuned.read(file) == {("matmul_config", found.sizes): None}
    assert list(tune.tune(asked, TunedTable(file), here, PLAN)) == []
    # and a launch then takes the kernel's own choice
    with tuned.using(tuned.read(file)), launch.choices() as chosen:
        program(device)()
    assert {config for _, config in chosen} == {family.matmul_config()}


@pytest.fixture
def one_row(device, tmp_path, two):
    """A table that another run wrote, of one question; and the question."""
    [key] = tune.asked_by([program(device)])
    table = TunedTable(tmp_path / "t.json")
    found = tune.Answer(*key, two[1], (("matmul(a)", 9.0, 5.0),), 2)
    table.add(found.row(), found.config)
    return table.file, key


def test_each_run_says_where_it_measured(one_row, two, monkeypatch):
    file, key = one_row
    here = {**tuned_table.environment(), "commit": "of the second run"}
    monkeypatch.setattr(tuned_table, "environment", lambda: here)
    table = TunedTable(file)
    for size in (1, 2):
        table.add(tuned.row(key[0], (size, *key[1][1:]), two[0]), two[0])
    content = json.loads(file.read_text())
    assert [one["commit"] for one in content["environments"]][1:] == ["of the second run"]
    assert [row["environment"] for row in content["rows"]] == [0, 1, 1]


def test_a_table_of_another_gpu_is_left_as_it_is(one_row, monkeypatch, command):
    file, _ = one_row
    before = file.read_bytes()
    monkeypatch.setattr(tuned_table, "environment", lambda: {"gpu": "another GPU"})
    with pytest.raises(ValueError, match=r"is of .*, and this is another GPU: name another file"):
        TunedTable(file)
    result = command()
    assert result.exit_code == 2
    assert "this is another GPU" in " ".join(result.output.split())
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"environments": []},
        {"environments": None},
        {"environments": [{}]},
        {"environments": 3},
        {"rows": [{"environment": 1}]},
        {"rows": [{}]},
    ],
)
def test_what_does_not_say_where_it_was_measured_is_not_continued(one_row, change):
    file, _ = one_row
    content = json.loads(file.read_text())
    [row] = content["rows"]
    if "rows" in change:
        del row["environment"]
        change = {"rows": [row | one for one in change["rows"]]}
    file.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="does not say where its rows were measured"):
        TunedTable(file)


def test_a_row_that_launches_do_not_take_is_written_anew(one_row, two, monkeypatch):
    file, key = one_row
    content = json.loads(file.read_text())
    del content["rows"][0]["kwargs"]["BLOCK_K"]
    file.write_text(json.dumps(content))
    table = TunedTable(file)
    assert not table.knows(*key, two[0])
    # where the kernel by itself would decline, too
    monkeypatch.setattr(candidates, "own", lambda function, sizes: None)
    assert not table.knows(*key, candidates.like(*key))
    table.add(tuned.row(*key, two[0]), two[0])
    assert table.knows(*key, two[0])
    assert {key: str(config) for key, config in tuned.read(file).items()} == {key: str(two[0])}
    assert [row["environment"] for row in json.loads(file.read_text())["rows"]] == [1]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["tune", "matmul"])
    assert (result.exit_code, "no GPU" in result.output) == (3, True)
    result = CliRunner().invoke(main, ["tune"])
    assert (result.exit_code, "name ops" in result.output) == (2, True)


@pytest.mark.parametrize(
    "target", ["nowhere:at_all", "math:nothing", "math:pi", "collections:Counter"]
)
def test_what_is_no_program_is_said(target):
    with pytest.raises(ValueError, match=f"tune: {target}"):
        tune.program(target)


MODEL = """
import torch
from tritorch import ops
def factory():
    a, b = torch.ones(33, 33, device=DEVICE), torch.ones(33, 20, device=DEVICE)
    return lambda: ops.matmul(ops.matmul(a, b), b.T)
"""


@pytest.fixture
def command(device, two, tmp_path, monkeypatch):
    """`tritorch tune` of a model that asks two questions, whose answers take no time."""
    (tmp_path / "asking.py").write_text(f"DEVICE = {device!r}\n{MODEL}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tritorch.cli.tune._device", lambda: torch.device(device))

    def measure(sides, clock, plan, **options):
        made = timing.intervals.median
        value = {"own": 9.0, "1": 5.0}
        return {name: timing.Timing(((value[name],),), made([value[name]])) for name in sides}

    monkeypatch.setattr(timing, "measure", measure)
    arguments = ["tune", "--model", "asking:factory", "--out", str(tmp_path / "t.json")]
    return lambda: CliRunner().invoke(main, arguments)


def test_a_model_is_tuned_into_a_table_and_not_twice(command, tmp_path):
    result = command()
    assert result.exit_code == 0, result.output
    assert result.output.count("matmul_config") == 2
    assert "BLOCK_K: 64" in result.output
    assert len(tuned.read(tmp_path / "t.json")) == 2
    again = command()
    assert (again.exit_code, "matmul_config" in again.output) == (0, False)


def test_an_interrupted_run_keeps_its_answers_and_goes_on(command, tmp_path, monkeypatch):
    answer, asked = tune.answer, []

    def interrupted(*arguments):
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(tune, "answer", interrupted)
    result = command()
    assert result.exit_code == 130
    assert "interrupted: what was measured is kept" in result.output
    assert result.output.count("matmul_config") == 1
    assert len(tuned.read(tmp_path / "t.json")) == 1
    # the one that is known is not asked again
    assert command().exit_code == 0
    assert len(asked) == 3
    assert len(tuned.read(tmp_path / "t.json")) == 2


def test_a_terminal_sees_how_far_it_is(device, two, tmp_path, clock):
    clock[1].update({"own": [9.0] * 5, "1": [5.0] * 5})
    a = torch.ones(33, 20, device=device)
    programs = iter([program(device), lambda: ops.matmul(a.T, a)])
    shown, answers = io.StringIO(), []
    console = Console(file=shown, force_terminal=True, width=100)
    table = TunedTable(tmp_path / "t.json")
    tune_command._tuned(programs, table, torch.device(device), PLAN, answers, console)
    assert len(answers) == 2
    assert "running what is to be tuned" in shown.getvalue()
    assert "matmul_config 20 20 33" in shown.getvalue()
    assert "2/2" in shown.getvalue()


def test_a_full_disk_is_said(command, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned_table, "write_whole", full)
    result = command()
    assert result.exit_code == 3
    assert "the table could not be written: [Errno 28] No space left" in result.output
