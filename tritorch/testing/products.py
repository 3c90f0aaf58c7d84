"""Torch's flags for the precision of float32's products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# torch gives the newer flags no types
_backends: Any = torch.backends
_FLAGS = (_backends.cuda.matmul, _backends.cudnn.conv)


@contextlib.contextmanager
def allowing_tf32() -> Iterator[None]:
    """Inside the block products of float32 may be TF32's, of matrices and of convolutions."""
    before = [flags.fp32_precision for flags in _FLAGS]
    try:
        for flags in _FLAGS:
            flags.fp32_precision = "tf32"
        yield
    finally:
        for flags, precision in zip(_FLAGS, before, strict=True):
            flags.fp32_precision = precision
