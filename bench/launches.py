"""Device resources of the kernels that a call launches, through any launcher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list[Any]]:
    """Collects Triton's compiled kernels of the launches inside the block, in order.

    Ours are launched past Triton's own machinery, except while a hook listens.
    """
    import triton
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    original = JITFunction.run
    hooks = triton.knobs.runtime.launch_enter_hook

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = original(self, *arguments, **options)
        if compiled is not None:
            found.append(compiled)
        return compiled

    JITFunction.run = run
    hooks.add(_listen)
    try:
        yield found
    finally:
        hooks.remove(_listen)
        JITFunction.run = original


def _listen(metadata: object) -> None:
    pass


def resources(call: Callable[[], object]) -> list[dict[str, Any]]:
    """For each kernel of a call: its name, registers, spills and warps, bytes of shared memory."""
    with compiled_kernels() as found:
        call()
    return [
        {
            "kernel": compiled.metadata.name,
            "registers": compiled.n_regs,
            "spills": compiled.n_spills,
            "shared_bytes": compiled.metadata.shared,
            "num_warps": compiled.metadata.num_warps,
        }
        for compiled in found
    ]
