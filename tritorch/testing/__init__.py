"""Tools to test kernels: corrected interpreter, dry driver, tolerance rule, generated cases.

Names that are not defined here are torch.testing's.
"""

from typing import Any

import torch.testing


def __getattr__(name: str) -> Any:
    return getattr(torch.testing, name)
