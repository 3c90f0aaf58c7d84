"""Triton-accelerated layers that replace torch.nn's, beside a plain-PyTorch path of every op.

A program keeps its code and changes its imports: `import tritorch as torch`, `import tritorch.nn
as nn`, `import tritorch.nn.functional as F`, `import tritorch.optim as optim`.  What tritorch does
not define is torch's own object: `torch.tensor`, `nn.Sequential`, `from tritorch.utils.data import
DataLoader`.  The import statements must say tritorch: whatever `torch` stands for in a program,
`import torch.nn` imports torch.

What differs under that name: `__version__` is tritorch's; `ops` and `testing` are tritorch's
modules, which hold torch's names as well; `data` and `check` are tritorch's alone; `a @ b` is a
method of torch's tensors and stays torch's, and so do lazy layers and a layer's full path
(`tritorch.nn.modules.conv.Conv2d`).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# now, since importing the module of that name later would hide the function
from tritorch.convert import conversion_report as conversion_report
from tritorch.convert import convert as convert
from tritorch.convert import revert as revert
from tritorch.fallthrough import TorchFinder

if TYPE_CHECKING:
    from tritorch import backend as backend
    from tritorch import data as data
    from tritorch import nn as nn
    from tritorch import ops as ops
    from tritorch import optim as optim
    from tritorch import testing as testing
    from tritorch.fusion import fuse as fuse
    from tritorch.fusion import fusion_report as fusion_report
    from tritorch.testing.checking import check as check
    from tritorch.toplevel import conv1d as conv1d
    from tritorch.toplevel import conv2d as conv2d
    from tritorch.toplevel import conv3d as conv3d
    from tritorch.toplevel import conv_transpose1d as conv_transpose1d
    from tritorch.toplevel import conv_transpose2d as conv_transpose2d
    from tritorch.toplevel import conv_transpose3d as conv_transpose3d
    from tritorch.toplevel import dropout as dropout
    from tritorch.toplevel import log_softmax as log_softmax
    from tritorch.toplevel import matmul as matmul
    from tritorch.toplevel import relu as relu
    from tritorch.toplevel import relu_ as relu_
    from tritorch.toplevel import sigmoid as sigmoid
    from tritorch.toplevel import softmax as softmax
    from tritorch.toplevel import tanh as tanh

__version__ = "0.1.0"

# imported when first asked for: whoever only wants the version or a report need not bind ops
_MODULES = frozenset(("backend", "data", "nn", "ops", "optim", "testing"))
_FUNCTIONS = {
    "check": "tritorch.testing.checking",
    "fuse": "tritorch.fusion",
    "fusion_report": "tritorch.fusion",
    **dict.fromkeys(
        (
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
            "dropout",
            "log_softmax",
            "matmul",
            "relu",
            "relu_",
            "sigmoid",
            "softmax",
            "tanh",
        ),
        "tritorch.toplevel",
    ),
}

# a checkout without symbolic links: kernels/ and bench/ lie beside this package, not in it
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "README.md").is_file() and not Path(__path__[0], "kernels").is_dir():
    __path__.append(str(_root))

sys.meta_path.insert(0, TorchFinder())


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tritorch.{name}")
    if name in _FUNCTIONS:
        # later look-ups do not come here
        globals()[name] = value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        return value
    try:
        return getattr(torch, name)
    except AttributeError:
        raise AttributeError(f"neither tritorch nor torch has an attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_FUNCTIONS, *dir(torch)})
