"""The wheel holds what is used and nothing else, and tritorch imports from wherever it lies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tritorch

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent
# folders of the repository and where they are installed
INSTALLED = {"tritorch": "tritorch", "kernels": "tritorch/kernels", "bench": "tritorch/bench"}
DATA = {
    "tritorch/py.typed",
    "tritorch/bench/README.md",
    "tritorch/data/README.md",
    "tritorch/data/digits.npz",
    "tritorch/kernels/README.md",
}


@pytest.fixture(scope="module", params=["links", "lost-links"])
def checkout(request, tmp_path_factory):
    """A copy of the checkout: as git makes it, and where git cannot make symbolic links."""
    copy = tmp_path_factory.mktemp("checkout")
    # a result in the copy, whether or not the checkout has any
    (copy / "bench" / "results" / "gpu").mkdir(parents=True)
    (copy / "bench" / "results" / "gpu" / "1.json").write_text("{}")
    for name in INSTALLED:
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    for file in (
        "LICENSE",
        "MANIFEST.in",
        "NOTICE",
        "README.md",
        "pyproject.toml",
        "pytest_tritorch.py",
        "setup.py",
    ):
        shutil.copy(ROOT / file, copy)
    if request.param == "lost-links":
        for name in ("kernels", "bench"):
            link = copy / "tritorch" / name
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder), str(checkout)]
    subprocess.run(command, check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def expected_files() -> set[str]:
    """Every module of the checkout under its installed name, and the data beside them."""
    files = {*DATA, "pytest_tritorch.py"}
    for folder, installed in INSTALLED.items():
        for path in (ROOT / folder).rglob("*.py"):
            file = path.relative_to(ROOT / folder).as_posix()
            if folder != "tritorch" or not file.startswith(("kernels/", "bench/")):
                files.add(f"{installed}/{file}")
    tuned = list((ROOT / "tritorch" / "data" / "tuned").glob("*.json"))
    assert tuned
    return files | {path.relative_to(ROOT).as_posix() for path in tuned}


def run(script: str, path: Path, cwd: Path) -> list[str]:
    """The lines that a fresh interpreter prints, which sees `path` and starts in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


WHERE = """
import importlib.util
import tritorch, tritorch.bench.environment, tritorch.nn
from tritorch.data import load_digits
print(tritorch.__file__)
print(tritorch.bench.environment.__file__)
print(importlib.util.find_spec("tritorch.kernels.matmul").origin)
print(len(load_digits()))
"""


def test_wheel_holds_every_module_once_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = [name for name in names if not re.match(r"tritorch-[^/]+\.dist-info/", name)]
    assert sorted(files) == sorted(expected_files())


def test_wheel_describes_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = f"tritorch-{tritorch.__version__}.dist-info"
        metadata = archive.read(f"{name}/METADATA").decode()
        entry_points = archive.read(f"{name}/entry_points.txt").decode()
        licences = [file for file in archive.namelist() if file.startswith(f"{name}/licenses/")]
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert '\nRequires-Dist: triton>=3.6; platform_system == "Linux"\n' in metadata
    assert metadata.rstrip().endswith((ROOT / "README.md").read_text().rstrip())
    assert entry_points.splitlines() == [
        "[console_scripts]",
        "tritorch = tritorch.cli:main",
        "",
        "[pytest11]",
        "pytest_tritorch = pytest_tritorch",
    ]
    assert [Path(file).name for file in licences] == ["LICENSE", "NOTICE"]


def test_tritorch_imports_from_the_unpacked_wheel(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    assert run(WHERE, target, elsewhere) == [
        str(target / "tritorch" / "__init__.py"),
        str(target / "tritorch" / "bench" / "environment.py"),
        str(target / "tritorch" / "kernels" / "matmul.py"),
        "1797",
    ]


PLUGIN = """
import sys

def test_nothing_is_imported_for_nothing(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("pytest_tritorch")
    assert pytestconfig.getoption("--tritorch-level") == "quick"
    assert not {"tritorch", "torch", "triton", "numpy"} & sys.modules.keys()
"""


def test_pytest_finds_the_fixture_and_pays_nothing_for_it(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    (elsewhere / "test_mine.py").write_text(PLUGIN)
    # other plugins may import what they like
    others = [f"no:{name}" for name in ("hypothesispytest", "xdist", "anyio")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", "."]
    done = subprocess.run(
        [*command, *(word for name in others for word in ("-p", name)), "test_mine.py"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_tritorch_imports_from_a_bare_checkout(checkout, tmp_path):
    lines = run(WHERE, checkout, tmp_path)
    assert [Path(line).resolve() for line in lines[:3]] == [
        checkout / "tritorch" / "__init__.py",
        checkout / "bench" / "environment.py",
        checkout / "kernels" / "matmul.py",
    ]
    assert lines[3:] == ["1797"]
