"""The command line: help, wrong calls, what is written, what is said of a failure."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

import tritorch
from tritorch import backend, ops
from tritorch.cli import main

pytestmark = pytest.mark.reference

SHORT = ("train", "--device", "cpu", "--epochs", "1", "--batch", "256")


@pytest.fixture(autouse=True)
def settings_are_restored(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    products = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [flags.fp32_precision for flags in products]
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for flags, precision in zip(products, before, strict=True):
        flags.fp32_precision = precision


def call(*arguments):
    return CliRunner().invoke(main, arguments)


def test_help_names_each_command_in_a_line():
    lines = call("--help").output.splitlines()
    listed = [line.split(maxsplit=1) for line in lines[lines.index("Commands:") + 1 :]]
    assert {"bench", "check", "train"} <= set(main.commands)
    expected = [(name, True) for name in sorted(main.commands)]
    assert [(name, bool(text)) for name, text in listed] == expected


def test_version_is_the_package_s():
    assert call("--version").output == f"tritorch, version {tritorch.__version__}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--epochs", "0"), "--epochs"),
        (("--lr", "nan"), "not a finite number"),
        (("--momentum", "inf"), "not a finite number"),
        (("--json", __file__ + "/run.json"), "not a folder to write in"),
        (("--out", __file__), "is a file"),
        (("--dtype", "float64"), "--dtype"),
        (("--no-replay", "--replay-steps", "2"), "contradict"),
    ],
)
def test_wrong_call_is_status_2(options, said):
    result = call(*SHORT, *options)
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_seconds_of_tuning_are_finite():
    result = call("tune", "softmax", "--seconds", "nan")
    assert (result.exit_code, "nan is not a finite number" in result.output) == (2, True)


def test_numbers_are_not_replaced_unasked(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("mine")
    result = call(*SHORT, "--no-replay", "--json", str(path))
    assert (result.exit_code, path.read_text()) == (2, "mine")
    assert call(*SHORT, "--no-replay", "--json", str(path), "--force").exit_code == 0
    assert json.loads(path.read_text())["kind"] == "train"


def test_an_earlier_report_is_replaced(tmp_path):
    for seed in (1, 2):
        assert (
            call(*SHORT, "--no-replay", "--seed", str(seed), "--out", str(tmp_path)).exit_code == 0
        )
        assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == seed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "run.json"]


def test_stdout_is_json_alone_where_asked():
    result = call(*SHORT, "--no-replay", "--json", "-")
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout)
    assert [row["epoch"] for row in run["rows"]] == [1]
    assert run["summary"]["largest_gap"] == 0.0
    assert "equal: the twins agree" in result.stderr


def test_a_missing_gpu_is_status_3(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("train", "--device", "cuda")
    assert (result.exit_code, "no GPU" in result.output) == (3, True)


def test_missing_triton_is_status_3_unless_no_replay_is_asked(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "triton" else found(name, *more),
    )
    result = call(*SHORT)
    assert result.exit_code == 3
    assert "the kernels were not checked" in result.output
    assert call(*SHORT, "--no-replay").exit_code == 0


def test_a_result_that_cannot_be_written_is_status_3(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tritorch.bench.environment.write_result", full)
    result = call(*SHORT, "--no-replay", "--json", str(tmp_path / "run.json"))
    assert result.exit_code == 3
    assert "could not be written: [Errno 28] No space left" in result.output


def test_a_call_that_leaves_the_kernels_is_status_1(monkeypatch):
    def leaves(*arguments, **options):
        raise backend.FallbackError("conv2d: the kernels do not take this call: why")

    monkeypatch.setattr("tritorch.training.train.run", leaves)
    result = call(*SHORT, "--no-replay")
    assert result.exit_code == 1
    assert "do not take this call: why" in result.output
    assert "reproduce: tritorch train" in result.output


def test_failure_says_how_to_see_it_again(monkeypatch):
    right = ops.relu
    monkeypatch.setattr(ops, "relu", lambda *arguments: right(*arguments) * 1.001)
    result = call(*SHORT, "--no-replay", "--seed", "5")
    assert result.exit_code == 1
    assert "the losses are" in result.output
    assert "reproduce: tritorch train --seed 5 --epochs 1 --batch 256" in result.output
