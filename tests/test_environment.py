"""Result files say where they come from, and none is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from tritorch.bench import environment as module
from tritorch.bench.environment import SCHEMA, environment, gpu_slug, write_result

pytestmark = pytest.mark.reference


def test_environment_agrees_with_the_process(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = datetime.now(timezone.utc).replace(microsecond=0)
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["tf32"]["conv"] is False
    assert found["triton_env"]["TRITON_CACHE_DIR"] == "somewhere"
    assert before <= datetime.fromisoformat(found["date"]) <= datetime.now(timezone.utc)
    assert json.loads(json.dumps(found)) == found


def test_environment_names_the_gpu_or_none():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    assert environment()["gpu"] == name


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Radeon (TM) X/2 ", "radeon-tm-x-2")],
)
def test_slug_is_a_folder_name(monkeypatch, name, slug):
    monkeypatch.setattr(module, "_gpu", lambda: {"gpu": name})
    assert gpu_slug() == slug


def test_slug_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_slug() == "cpu"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one committed file, taken for the one that tritorch is in."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TRITORCH_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(module, "_ROOT", tmp_path.resolve())
    return tmp_path


def test_commit_and_dirty_flag_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").write_text("a result, say")
    assert (environment()["commit"], environment()["dirty"]) == (head, False)
    (checkout / "file").write_text("2")
    assert (environment()["commit"], environment()["dirty"]) == (head, True)


def test_code_is_what_the_package_holds(tmp_path, monkeypatch):
    """With or without a commit, tracked or not; a result beside it is none."""
    package = tmp_path / "package"
    (package / "data" / "tuned").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    # a checkout shows folders by links
    (package / "bench").symlink_to(tmp_path / "bench")
    monkeypatch.setattr(module.tritorch, "__file__", str(package / "__init__.py"))
    seen = [environment()["code"]]
    for name in ("__init__.py", "bench/rows.py", "data/tuned/gpu.json"):
        for text in ("1", "2"):
            (package / name).write_text(text)
            seen.append(environment()["code"])
    assert len(set(seen)) == len(seen)
    (package / "bench" / "result.json").write_text("{}")
    (package / "bench" / "rows.py").write_text("2")
    assert environment()["code"] == seen[-1]


def test_commit_is_not_that_of_a_surrounding_repository(checkout, monkeypatch):
    installed = checkout / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(module, "_ROOT", installed.resolve())
    assert (environment()["commit"], environment()["dirty"]) == (None, None)


def test_commit_of_a_copy_can_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROOT", tmp_path.resolve())
    monkeypatch.setenv("TRITORCH_COMMIT", "abc123")
    assert (environment()["commit"], environment()["dirty"]) == ("abc123", None)


def test_environment_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TRITORCH_COMMIT", raising=False)
    assert (environment()["commit"], environment()["dirty"]) == (None, None)


def test_result_reads_back(tmp_path):
    path = tmp_path / "gpu" / "result.json"
    write_result(path, "bench", [{"op": "conv2d", "us": 1.5}], seed=3)
    result = json.loads(path.read_text())
    assert list(result) == ["schema", "kind", "environment", "rows", "seed"]
    assert (result["schema"], result["kind"], result["seed"]) == (SCHEMA, "bench", 3)
    assert result["rows"] == [{"op": "conv2d", "us": 1.5}]
    assert result["environment"]["torch"] == torch.__version__
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_result_never_replaces_another(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, "bench", [1])
    first = path.read_text()
    with pytest.raises(FileExistsError, match=r"result\.json holds another result"):
        write_result(path, "bench", [2])
    assert path.read_text() == first
    write_result(path, "bench", [2], overwrite=True)
    assert json.loads(path.read_text())["rows"] == [2]


def test_same_result_of_another_time_is_kept(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, "bench", [1])
    dated = json.loads(path.read_text())
    dated["environment"]["date"] = "2000-01-01T00:00:00+00:00"
    path.write_text(json.dumps(dated))
    write_result(path, "bench", [1])
    assert json.loads(path.read_text()) == dated


def test_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_result(path, "bench", [1])
    first = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_result(path, "bench", [2], overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_result_refuses_what_json_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result(tmp_path / "result.json", "bench", [value])
    assert list(tmp_path.iterdir()) == []
