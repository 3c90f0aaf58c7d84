"""Triton-accelerated layers that replace torch.nn's, with a plain-PyTorch reference path beside every op."""

import importlib
from typing import Any

__version__ = "0.1.0"
