"""`tritorch train` as a user runs it: exit status, files, and a wrong layer or kernel is seen."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritorch.training import train as training
from tritorch.training.train import Curves, Epoch
from tritorch.training.twins import Settings

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent
RELU_OFF_BY_ONE_PERCENT = (
    "import tritorch.nn as nn, tritorch.ops as ops;"
    "nn.ReLU.forward = lambda self, x: ops.relu(x) * 1.01;"
)
GRADIENT_OFF_BY_ONE_PERCENT = (
    "from tritorch.ops.matmul_function import Linear;"
    "right = Linear.backward;"
    "wrong = lambda ctx, g: tuple(x if x is None else x * 1.01 for x in right(ctx, g));"
    "Linear.backward = staticmethod(wrong);"
)


def train(*options, before="", interpret="0"):
    """Runs the command in a process of its own: it chooses Triton's mode, once for a process."""
    program = f"{before}from tritorch.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "train", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "report"
    return train("--quick", "--device", "cpu", "--out", str(out)), out


def test_twins_and_kernels_agree(quick):
    run, out = quick
    assert run.returncode == 0, run.stdout + run.stderr
    assert "equal: the twins agree" in run.stdout
    result = json.loads((out / "run.json").read_text())
    assert result["kind"] == "train"
    assert result["environment"]["torch"] == torch.__version__
    assert result["rows"]


def test_page_stands_alone(quick):
    _, out = quick
    page = (out / "index.html").read_text()
    assert "<svg" in page
    for outside in ("http://", "https://", "<link", "<script src"):
        assert outside not in page


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    run = train("--quick", "--no-replay", "--device", "cpu", "--out", str(tmp_path))
    assert run.returncode == 2
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


CURVES = Curves([2.0, 1.0], [2.0, 1.0], [0.0, 0.1], [0.0, 0.1], [0.2, 0.3])
LAST = Epoch(12, 1.0, 1.0, 0.1, 0.1, 0.99, 0.99)


@pytest.mark.parametrize(
    ("curves", "last", "epochs", "said"),
    [
        ({}, {}, 12, []),
        ({"gap": [0.0, 0.4]}, {}, 12, ["step 2: the losses are 0.4 apart, the limit is 0.3"]),
        ({"gap": [math.nan, 0.0]}, {}, 12, ["step 1: the losses are nan apart"]),
        ({"loss_tritorch": [2.0, math.inf]}, {}, 12, ["the loss of tritorch is not finite"]),
        ({"loss_torch": [math.nan, 1.0]}, {}, 12, ["the loss of torch.nn is not finite"]),
        ({}, {"accuracy_torch": 0.9901}, 12, []),
        ({}, {"accuracy_torch": 0.985}, 12, ["accuracies are 2 of 360 test digits apart"]),
        ({}, {"accuracy_torch": 0.97, "accuracy_tritorch": 0.97}, 12, ["less than 98%"]),
        ({}, {"accuracy_torch": 0.97, "accuracy_tritorch": 0.97}, 11, []),
    ],
)
def test_reasons_to_refuse(curves, last, epochs, said):
    failures = training._failures(
        Settings(epochs=epochs), replace(CURVES, **curves), replace(LAST, **last), 360, {}
    )
    assert len(failures) == len(said), failures
    assert all(part in failure for part, failure in zip(said, failures, strict=True))


def test_a_wrong_layer_is_different():
    run = train("--quick", "--no-replay", "--device", "cpu", before=RELU_OFF_BY_ONE_PERCENT)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "different" in run.stdout + run.stderr


def test_a_wrong_gradient_in_the_kernels_is_different():
    options = ("--quick", "--device", "cpu")
    run = train(*options, before=GRADIENT_OFF_BY_ONE_PERCENT, interpret="1")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "linear: gradient of weight" in run.stdout + run.stderr


def test_a_missing_gpu_is_said():
    if torch.cuda.is_available():
        assert train("--help").returncode == 0
        return
    run = train("--quick", "--device", "cuda")
    assert run.returncode == 3
    assert "GPU" in run.stdout + run.stderr
