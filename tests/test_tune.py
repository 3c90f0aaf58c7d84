"""Tuning: what a program asks, what is measured, and what is kept."""

import json

import pytest
import torch
from click.testing import CliRunner

from tritorch import launch, ops, tuned
from tritorch.bench import timing, tune
from tritorch.cli import main

pytestmark = pytest.mark.interpret

PLAN = timing.Plan(seconds=0.01)


def program(device):
    a, b = (torch.randn(33, 33, device=device, requires_grad=True) for _ in range(2))
    return lambda: ops.relu(ops.matmul(a, b)).sum().backward()


def test_a_program_is_its_library_ops_once_for_each_layout(device):
    tasks = tune.tasks_of(program(device))
    assert [str(task) for task in tasks] == [
        "matmul(33x33, 33x33)",
        "activation_forward(33x33)",
        "activation_backward(33x33, 33x33)",
        # the two gradients: one operand is transposed
        "matmul(33x33, 33x33)",
        "matmul(33x33, 33x33)",
    ]
    assert all(a.device.type == "meta" for t in tasks for a in t.arguments if torch.is_tensor(a))


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
    yield pair
    configurations.tables.cache_clear()


def test_the_fastest_is_kept_and_not_measured_again(device, two, tmp_path, monkeypatch):
    [task, *_] = tune.tasks_of(program(device))
    measured = []

    def measure(sides, clock, plan, **options):
        measured.append(list(sides))
        value = {"own": 9.0, "1": 5.0}
        made = timing.intervals.median
        return {name: timing.Timing(((value[name],),), made([value[name]])) for name in sides}

    monkeypatch.setattr(timing, "measure", measure)
    file = tmp_path / "table.json"
    [found] = tune.tune([task], file, torch.device(device), PLAN)
    assert (found.function, found.config, found.own, found.best) == ("matmul_config", two[1], 9, 5)
    assert measured == [["own", "1"]]
    assert str(tuned.read(file)["matmul_config", found.sizes]) == str(two[1])
    [row] = json.loads(file.read_text())["rows"]
    assert (row["own_us"], row["median_us"], row["candidates"]) == (9, 5, 2)
    assert list(tune.tune([task], file, torch.device(device), PLAN)) == []
    assert len(measured) == 1


def test_what_computes_something_else_is_refused(device, two, tmp_path, monkeypatch):
    [task, *_] = tune.tasks_of(program(device))
    results, original = iter((1.0, 0.0)), tune._results

    def other(*arguments):
        return [result.fill_(next(results)) for result in original(*arguments)]

    monkeypatch.setattr(tune, "_results", other)
    [question] = tune.questions_of(task, torch.device(device))
    found = tune.answer(task, *question, torch.device(device), PLAN)
    assert found.config is two[0]
    assert found.refused == (f"{two[1]}: another result",)


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
    a, b = torch.ones(33, 33), torch.ones(33, 20)
    return lambda: ops.matmul(ops.matmul(a, b), b.T)
"""


@pytest.fixture
def command(device, two, tmp_path, monkeypatch):
    """`tritorch tune` of a model that asks two questions, whose answers take no time."""
    (tmp_path / "asking.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tritorch.tune_command._device", lambda: torch.device(device))

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


def test_a_full_disk_is_said(command, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tune, "write_whole", full)
    result = command()
    assert result.exit_code == 3
    assert "the table could not be written: [Errno 28] No space left" in result.output
