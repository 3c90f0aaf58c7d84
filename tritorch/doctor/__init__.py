"""What this machine can do: each question asked by itself, so that no answer keeps another away."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "fail", "none"]

# what another process may take, which imports torch and Triton on a machine that may be busy
_SECONDS = 300.0
_OPTIONAL = {
    "matplotlib": "charts in reports: pip install matplotlib",
    "pytest": "the test suite and the fixture tritorch_check: pip install pytest",
    "hypothesis": "the test suite: pip install hypothesis",
}


@dataclass(frozen=True)
class Answer:
    """`state`: "ok", "warn" (works, but), "fail", or "none" for what is not there and need not be.

    `advice`: what to do about it.
    """

    name: str
    state: State
    text: str
    advice: str = ""


@dataclass
class Diagnosis:
    """The answers, what works on this machine, and what to do next."""

    answers: list[Answer] = field(default_factory=list)
    works: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing failed and nothing warned."""
        return all(answer.state in ("ok", "none") for answer in self.answers)

    def to_json(self) -> dict[str, Any]:
        return {
            "answers": [vars(answer) for answer in self.answers],
            "works": self.works,
            "next": self.next,
        }


def diagnose(tell: Callable[[str], None] = lambda what: None) -> Diagnosis:
    """Asks everything.  Raises nothing: what a question raises is its answer."""
    found = Diagnosis()
    for name, ask in _QUESTIONS:
        tell(name)
        try:
            found.answers += list(ask())
        except Exception as error:
            found.answers.append(
                Answer(name, "fail", f"could not be found out: {type(error).__name__}: {error}")
            )
    _conclude(found)
    return found


def versions() -> Iterator[Answer]:
    """Python, torch, Triton and numpy, each and beside each other."""
    python = platform.python_version()
    old = sys.version_info < (3, 10)
    yield Answer(
        "python", "fail" if old else "ok", f"{python}, {platform.system()} {platform.machine()}",
        "tritorch needs Python 3.10" if old else "",
    )  # fmt: skip
    for package in ("tritorch", "torch", "triton", "numpy"):
        version = _version(package)
        if version is not None:
            yield Answer(package, "ok", version)
        elif package == "triton":
            text = "not installed: the reference path alone works"
            yield Answer(package, "fail", text, "pip install triton (Linux)")
        elif package == "numpy":
            yield Answer(package, "warn", "not installed", "pip install numpy")
    yield from pairs(
        _version("torch"), _version("triton"), _version("numpy"), _required("torch", "triton")
    )


def pairs(
    torch: str | None, triton: str | None, numpy: str | None, wanted: str | None
) -> Iterator[Answer]:
    """Versions that do not go together; `wanted`: the Triton that this torch asks for."""
    if triton is None:
        return
    if _numbers(triton) < (3, 6):
        text = f"triton {triton} is older than what the kernels are written for"
        yield Answer("versions", "fail", text, "pip install 'triton>=3.6'")
    if numpy is not None and _numbers(triton) < (3, 7) and _numbers(numpy) >= (2, 4):
        text = f"numpy {numpy} with triton {triton} breaks loops of interpreted kernels by itself"
        advice = "pip install 'numpy<2.4', or triton>=3.7; inside tritorch it is mended"
        yield Answer("versions", "warn", text, advice)
    if wanted is not None and wanted != triton:
        text = f"torch {torch} was made for triton {wanted}, there is {triton}"
        advice = f"pip install triton=={wanted}, where torch.compile matters"
        yield Answer("versions", "warn", text, advice)


def interpreter() -> Iterator[Answer]:
    """Whether kernels run on the CPU, and give what a GPU would."""
    if _version("triton") is None:
        yield Answer("interpreter", "none", "needs Triton")
        return
    failures = _asked("interpreted", TRITON_INTERPRET="1")["failures"]
    if failures:
        yield Answer("interpreter", "fail", "; ".join(failures)[:600], "another triton: 3.6 or 3.9")
    else:
        yield Answer("interpreter", "ok", "self-test passed, kernels agree with torch")


def compilers() -> Iterator[Answer]:
    """Whether kernels compile for GPUs that are not there."""
    if _version("triton") is None:
        yield Answer("compile", "none", "needs Triton")
        return
    found = _asked("compiled", TRITON_INTERPRET="0")
    for target, failure in found["targets"].items():
        if failure:
            yield Answer(f"compile {target}", "fail", failure[:600])
    good = [target for target, failure in found["targets"].items() if not failure]
    if good:
        yield Answer("compile", "ok", f"{' '.join(good)} (ptxas {found['ptxas']})")


def gpu() -> Iterator[Answer]:
    """The GPU, its driver, and whether a kernel gives the right numbers on it."""
    found = _asked("on_gpu", TRITON_INTERPRET="0")
    if not found["gpus"]:
        driver = _driver()
        if driver is None:
            yield Answer("gpu", "none", "no GPU")
        else:
            text = f"the driver is there ({driver}), torch {found['torch']} finds no GPU"
            yield Answer("gpu", "warn", text, "install a torch that is made for this GPU")
        return
    for name in found["gpus"]:
        yield Answer("gpu", "ok", name)
    yield Answer("driver", "ok", f"{_driver() or 'unknown'}, torch for {found['made_for']}")
    if found["failure"]:
        yield Answer("kernel on the gpu", "fail", found["failure"][:600], found["advice"])
    else:
        yield Answer("kernel on the gpu", "ok", "agrees with torch")
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        text = "no C compiler: Triton builds each launcher with one"
        yield Answer("compiler", "warn", text, "install gcc")


def caches() -> Iterator[Answer]:
    """Whether what Triton compiles, and what `tritorch tune` measures, can be kept."""
    from tritorch import tuned

    home = os.environ.get("TRITON_HOME", str(Path.home()))
    folder = Path(os.environ.get("TRITON_CACHE_DIR", str(Path(home) / ".triton" / "cache")))
    for name, place, variable in (
        ("triton cache", folder, "TRITON_CACHE_DIR to a folder"),
        ("tuned tables", tuned.path("any").parent, "TRITORCH_TUNED to a file"),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR to a folder"),
    ):
        problem = _unwritable(place)
        if problem:
            yield Answer(name, "warn", f"{place}: {problem}", f"set {variable} to write in")
            continue
        free = shutil.disk_usage(_existing(place)).free / 2**30
        state: State = "ok" if free > 1 else "warn"
        yield Answer(name, state, f"{place}, {free:.0f} GiB free")


def settings() -> Iterator[Answer]:
    """Variables of the environment that change what kernels do."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("TRITON_", "TRITORCH_"))}
    if not found:
        return
    text = " ".join(f"{name}={value}" for name, value in found.items())
    interprets = found.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    advice = "interpreted kernels are slow, also on a GPU, and do not compile" if interprets else ""
    yield Answer("environment", "warn" if interprets else "ok", text, advice)


def optional() -> Iterator[Answer]:
    """Packages that tritorch does without."""
    for package, use in _OPTIONAL.items():
        version = _version(package)
        if version is None:
            yield Answer(package, "none", "not installed", use)
        else:
            yield Answer(package, "ok", version)


_QUESTIONS: tuple[tuple[str, Callable[[], Iterator[Answer]]], ...] = (
    ("versions", versions),
    ("interpreter", interpreter),
    ("compile", compilers),
    ("gpu", gpu),
    ("caches", caches),
    ("environment", settings),
    ("packages", optional),
)


def _conclude(found: Diagnosis) -> None:
    good = {answer.name for answer in found.answers if answer.state == "ok"}
    if "torch" in good:
        found.works += ["convert", "train"]
    if "interpreter" in good:
        found.works.append("check")
    if "compile" in good:
        found.works.append("inspect")
    if "kernel on the gpu" in good:
        found.works += ["bench", "tune"]
    found.next += [a.advice for a in found.answers if a.advice and a.state in ("fail", "warn")]
    if "kernel on the gpu" in good:
        found.next.append("tritorch train, then make gpu in a checkout")
    elif "interpreter" in good:
        found.next.append("tritorch train, which needs no GPU")


def _version(package: str) -> str | None:
    if package == "tritorch":
        from tritorch import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _required(package: str, other: str) -> str | None:
    """The one version of `other` that `package` asks for on this platform, if it does."""
    try:
        requirements = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return None
    for one in requirements:
        if (match := re.match(rf"{other}==([\d.]+)\s*(;|$)", one)) is not None:
            return match[1]
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _driver() -> str | None:
    """The driver's version as nvidia-smi or the kernel tells it."""
    if (command := shutil.which("nvidia-smi")) is not None:
        asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    for file in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(file).is_file():
            return Path(file).read_text().strip()
    return None


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def _unwritable(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"0")
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    return ""


def _asked(question: str, **variables: str) -> dict[str, Any]:
    """What `doctor.probes` answers in a process of its own, which may die."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError("torch is not installed")
    command = [sys.executable, "-m", "tritorch.doctor.probes", question]
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_SECONDS, env=environment
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(last)
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
