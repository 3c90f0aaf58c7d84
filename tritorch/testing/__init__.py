"""Tools to test kernels: `check`, detectors, corrected interpreter, dry driver, tolerance rule.

Names that are not defined here are torch.testing's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch.testing

if TYPE_CHECKING:
    from tritorch.testing.checking import check as check
    from tritorch.testing.detectors import detecting as detecting
    from tritorch.testing.findings import Finding as Finding
    from tritorch.testing.hosting import hosted as hosted
    from tritorch.testing.interpreter import corrected as corrected
    from tritorch.testing.report import Report as Report
    from tritorch.testing.tolerances import compare as compare

# imported when first asked for: most programs ask for one of them
_PLACES = {
    "check": "checking",
    "detecting": "detectors",
    "Finding": "findings",
    "hosted": "hosting",
    "corrected": "interpreter",
    "Report": "report",
    "compare": "tolerances",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"tritorch.testing.{_PLACES[name]}"), name)
    return getattr(torch.testing, name)
