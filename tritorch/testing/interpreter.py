"""Triton's interpreter, corrected: so that what passes on a CPU passes on a GPU.

The interpreter computes bfloat16 as integers, keeps NaN where a GPU drops it, gives masked lanes a
harmless zero and takes tiles that no compiler takes.  `corrected()` mends this for the launches
inside it and leaves Triton untouched outside; the corrections are in `corrections.py`.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

from tritorch.testing import corrections

_depth: int = 0


def interpreting() -> bool:
    """Whether kernels are interpreted: TRITON_INTERPRET=1 was set when Triton was imported."""
    cdiv = getattr(sys.modules.get("triton.language"), "cdiv", None)
    if cdiv is None:
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return type(cdiv).__name__ == "InterpretedFunction"


class corrected:
    """Corrects the interpreter for the launches inside: `with corrected(): kernel[grid](...)`.

    Nests, and restores every attribute of Triton when the outermost block ends.

    tf32: True makes `tl.dot` read float32 operands as TF32 where its `input_precision` is "tf32",
    as a tensor core does: the low 13 bits of the significand are dropped.  False keeps them, and
    None (the default) does as the enclosing block does.  An outermost block keeps them: the exact
    product is the closest to the truth, and a test of TF32 can ask for its loss.

    Raises RuntimeError where kernels are not interpreted, and where the installed Triton lacks a
    private part that the corrections need.
    """

    def __init__(self, *, tf32: bool | None = None) -> None:
        self._tf32 = tf32

    def __enter__(self) -> None:
        global _depth
        if _depth == 0:
            if not interpreting():
                raise RuntimeError(
                    "interpreter.corrected: the kernels of this process are not interpreted; "
                    "set TRITON_INTERPRET=1 in the environment before Python starts"
                )
            corrections.patch()
        _depth += 1
        self._outer = corrections.tf32
        if self._tf32 is not None:
            corrections.tf32 = self._tf32

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _depth
        corrections.tf32 = self._outer
        _depth -= 1
        if _depth == 0:
            corrections.restore()
