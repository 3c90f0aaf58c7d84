"""Where a result comes from: hardware, versions, settings, commit; and the file it is kept in.

`python -m tritorch.bench.environment` prints the environment, with `--gpu` only the folder name
under which this machine's results are kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tritorch
from tritorch.bench import clocks

__all__ = ["PEERS", "SCHEMA", "environment", "gpu_slug", "write_result", "write_whole"]

# raised when a reader of older files would misread a newer one
SCHEMA = 1

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

# other people's kernels, by their modules
PEERS = ("flag_gems", "attorch", "liger_kernel")
# bench/environment.py of a checkout; resolved, because a checkout may show it by a link
_ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Json]:
    """Everything that a result depends on, ready for JSON.

    `gpu`, `capability` (such as "9.0"), `multiprocessors`, `gpu_memory` and `l2_cache` (bytes) are
    None without a GPU, and what `clocks.settings` asks of the machine (driver, power limit, highest
    clock, ECC, MIG) where it does not answer; `triton` is None where it is not installed. `commit`
    and `dirty` (tracked files differ from it) describe the checkout that this file is in. Both are
    None outside one; a copy of the tree that lacks its history can be told its commit in the
    variable TRITORCH_COMMIT. `code` is a hash of what ran, committed or not. `date` is UTC, ISO
    8601, seconds. `tf32` holds torch's two switches, `triton_env` the TRITON_* variables. `peers`
    is there if others' kernels are.
    """
    commit, dirty = _commit()
    # `allow_tf32` raises once a program has set a newer switch; torch gives those no types
    backends: Any = torch.backends
    return {
        **_gpu(),
        **clocks.settings(),
        "cuda": torch.version.cuda,
        "cudnn": backends.cudnn.version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        **_peers(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "dirty": dirty,
        "code": _code(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tf32": {
            "matmul": backends.cuda.matmul.fp32_precision == "tf32",
            "conv": backends.cudnn.conv.fp32_precision == "tf32",
        },
        "triton_env": {k: v for k, v in sorted(os.environ.items()) if k.startswith("TRITON_")},
    }


def _peers() -> dict[str, Json]:
    """Versions of those that this Python has; None for a copy that was not installed."""
    found = {n: _version(n) for n in PEERS if importlib.util.find_spec(n) is not None}
    return {"peers": found} if found else {}


def gpu_slug() -> str:
    """The GPU's name as a folder name ("nvidia-h100-80gb-hbm3"), "cpu" where there is none."""
    name = _gpu()["gpu"]
    return "cpu" if name is None else re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def write_result(
    path: str | os.PathLike[str],
    kind: str,
    rows: Sequence[Json],
    *,
    overwrite: bool = False,
    **more: Json,
) -> None:
    """Write one result file: {"schema", "kind", "environment", "rows"} and `more`, as JSON.

    `kind` says what the rows are ("train", "tests", "bench"). The file appears whole or not at all,
    and its folder is made. Raises FileExistsError where another result has the name already and
    `overwrite` is false (the same result, taken at another time, is left as it is), and ValueError
    for a NaN or an infinity, which JSON cannot hold.
    """
    where = environment()
    result = {"schema": SCHEMA, "kind": kind, "environment": where, "rows": rows, **more}
    write_whole(path, result, overwrite=overwrite)


def write_whole(
    path: str | os.PathLike[str], result: Mapping[str, Json], *, overwrite: bool = False
) -> None:
    """The same of a result that says itself where it comes from."""
    path = Path(path)
    text = _text(result)
    if not overwrite and path.exists():
        if _undated(path.read_text(encoding="utf-8")) == _undated(text):
            return
        raise FileExistsError(f"{path} holds another result: name a new file, or overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the rename stays within one file system
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp's file is its owner's alone
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _text(result: Mapping[str, Json]) -> str:
    """JSON with one row a line, which is what a comparison of two versions shows."""

    def dump(value: Json) -> str:
        if isinstance(value, list | tuple) and value:
            rows = (json.dumps(row, allow_nan=False) for row in value)
            return "[\n  " + ",\n  ".join(rows) + "\n ]"
        return json.dumps(value, indent=1, allow_nan=False)

    fields = (f" {json.dumps(name)}: {dump(value)}" for name, value in result.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _gpu() -> dict[str, Json]:
    if not torch.cuda.is_available():
        names = ("gpu", "capability", "multiprocessors", "gpu_memory", "l2_cache")
        return dict.fromkeys(names)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "gpu_memory": device.total_memory,
        "l2_cache": getattr(device, "L2_cache_size", None),
    }


def _version(package: str) -> str | None:
    # the metadata, because importing Triton fixes whether this process interprets kernels
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    top = _git("rev-parse", "--show-toplevel")
    # an installed tritorch may lie inside a repository that is not its own
    if top is None or Path(top).resolve() != _ROOT:
        return os.environ.get("TRITORCH_COMMIT"), None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else status != ""


def _code() -> str:
    """A hash of the package's source and of the tables of configurations that it ships."""
    package, found = Path(tritorch.__file__).resolve().parent, hashlib.sha256()
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py") or Path(folder) == package / "data" / "tuned"
    ]
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(package)} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _undated(text: str) -> Json:
    result: dict[str, dict[str, Json]] = json.loads(text)
    result.get("environment", {}).pop("date", None)
    return result


if __name__ == "__main__":
    print(gpu_slug() if "--gpu" in sys.argv[1:] else json.dumps(environment(), indent=1))
