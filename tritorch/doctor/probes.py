"""What `tritorch doctor` has found out by other processes: each prints its answer as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import torch

from tritorch import backend, ops
from tritorch.testing import dry
from tritorch.testing import interpreter as interpreting


def interpreted() -> dict[str, Any]:
    """What is wrong with the interpreter, in words."""
    failures = interpreting.self_test()
    failures += _disagreement("cpu")
    return {"failures": failures}


def compiled() -> dict[str, Any]:
    """Of each target why a kernel does not compile for it, "" where it does."""
    targets = {}
    for target in dry.TARGETS:
        try:
            with backend.use("triton"), dry.compiling_for(target) as recorder:
                ops.matmul(torch.empty(64, 64).half(), torch.empty(64, 64).half())
            dry.resources(recorder.launches[0])
            targets[target] = ""
        except Exception as error:
            targets[target] = f"{type(error).__name__}: {error}"
    return {"targets": targets, "ptxas": _ptxas()}


def on_gpu() -> dict[str, Any]:
    """The GPUs that torch finds, and what is wrong with a kernel on the first."""
    found: dict[str, Any] = {"gpus": [], "failure": "", "advice": "", "torch": torch.__version__}
    found["made_for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm"
    if not torch.cuda.is_available():
        return found
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found["gpus"].append(
            f"{device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} "
            "multiprocessors"
        )
    if torch.version.cuda and torch.cuda.get_device_capability()[0] < 8:
        found["advice"] = "the kernels are written for compute capability 8.0 and newer"
    try:
        found["failure"] = "; ".join(_disagreement("cuda"))
    except Exception as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    return found


def _disagreement(device: str) -> list[str]:
    """Integers, whose products no rounding touches."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, (33, 33), generator=generator).float() for _ in range(2))
    with backend.use("triton"), backend.strict():
        found = ops.matmul(a.to(device), b.to(device)).cpu()
    return [] if torch.equal(found, a @ b) else ["matmul differs from torch's"]


def _ptxas() -> str:
    import triton

    try:
        command = [triton.knobs.nvidia.ptxas.path, "--version"]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    except (OSError, AttributeError):
        return "unknown"
    found = re.search(r"release ([\d.]+)", text)
    return "unknown" if found is None else found[1]


PROBES = {probe.__name__: probe for probe in (interpreted, compiled, on_gpu)}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(PROBES[sys.argv[1]]()) + "\n")
