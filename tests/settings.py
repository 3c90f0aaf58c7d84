"""Torch's settings that a benchmark changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """They are what they were after the block."""
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.cudnn.conv)
    before = [flags.fp32_precision for flags in products]
    searched = backends.cudnn.benchmark
    try:
        yield
    finally:
        backends.cudnn.benchmark = searched
        for flags, precision in zip(products, before, strict=True):
            flags.fp32_precision = precision
