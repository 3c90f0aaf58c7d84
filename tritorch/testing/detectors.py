"""Watches interpreted kernels, and says which line, argument, program and lane is at fault.

`with detecting() as detector:` runs the launches inside as `interpreter.corrected()` does, and
checks every access of memory against the arguments, every 32-bit offset against 64 bits, every
product's tile against what GPUs take, and every element against the other programs that touch it.
Values are computed as ever, and an access out of bounds is reported and left out.

Of the tools that look at Triton kernels without a GPU, triton-viz is the nearest.  It replaces
values by symbols and asks a solver whether any address can leave its tensor: so it covers all
programs and all trips of a loop at once where this module sees those that run, and draws what it
sees.  It serves less here: it computes no values, so that nothing can be compared with a reference
and no address that depends on data is known; atomics, products and block pointers have no symbols;
it looks at bounds alone; and it needs a solver, a web server and a drawing library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from tritorch.testing import interpreter, places, watch
from tritorch.testing.detector import Detector, Launch, Order, Poison, ProgramOrderError
from tritorch.testing.findings import Finding
from tritorch.testing.places import Place
from tritorch.testing.shadow import virtual_tensor

__all__ = [
    "Detector",
    "Launch",
    "Poison",
    "ProgramOrderError",
    "detecting",
    "masked_lane_findings",
    "virtual_tensor",
]


class detecting:
    """Detects while the block runs: `with detecting() as detector: fn(x)`, then its `findings`.

    order: in which the programs of a launch run: as Triton's interpreter has them, backwards, or
    shuffled by a seed.  extent: whether a pointer may reach the elements of its argument's view, or
    all of its storage.  virtual: launches of more than 1024 programs run the first two and the last
    two on each axis alone, for arguments of `virtual_tensor` that are too large to go through.
    masked_poison: see `Poison`.  tf32: as `interpreter.corrected` has it.

    Nests: the innermost block sees the launches.  Raises RuntimeError where kernels are not
    interpreted, and where the installed Triton lacks a private part that is needed.
    """

    def __init__(
        self,
        *,
        order: Order = "forward",
        extent: Literal["view", "storage"] = "view",
        virtual: bool = False,
        masked_poison: Poison | None = None,
        tf32: bool | None = None,
    ) -> None:
        if order not in ("forward", "reverse") and not isinstance(order, int):
            raise ValueError(
                f"detecting: order expects 'forward', 'reverse' or a seed, received {order!r}"
            )
        if extent not in ("view", "storage"):
            raise ValueError(f"detecting: extent expects 'view' or 'storage', received {extent!r}")
        self._detector = Detector(order, extent == "storage", virtual, masked_poison)
        self._corrected = interpreter.corrected(tf32=tf32)

    def __enter__(self) -> Detector:
        self._corrected.__enter__()
        try:
            watch.enter(self._detector)
        except BaseException:
            self._corrected.__exit__(None, None, None)
            raise
        return self._detector

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watch.leave()
        self._corrected.__exit__(kind, error, trace)


def masked_lane_findings(
    run: Callable[[], Sequence[Tensor]],
    *,
    sites: Collection[tuple[str, int]] | None = None,
) -> list[Finding]:
    """The loads without `other` whose masked lanes change a result, one 'masked lane' for each.

    `run` repeats one computation and gives its results: it is called under `detecting` with NaN in
    those lanes, then with large numbers of both signs, and if there are several such loads, with
    those in one load at a time.  `sites`: the (file, line) of the loads, `undefined_loads` of an
    earlier detector; without any there is nothing to run.
    """
    if sites is not None and not sites:
        return []
    with detecting() as detector:
        expected = [_bits(result) for result in run()]
    loads = detector.undefined_loads
    found: dict[tuple[str, int], Finding] = {}
    for high in (True, False) if loads else ():
        changes = _changes(run, expected, Poison(high))
        if changes is None:
            continue
        each = {
            site: _changes(run, expected, Poison(high, site)) for site in loads if len(loads) > 1
        }
        guilty = {site: change for site, change in each.items() if change is not None}
        # a single one is known, and where none alone does it, all together do
        for site, change in (guilty or dict.fromkeys(loads, changes)).items():
            load = loads[site]
            large = "a large number" if high else "a large negative number"
            found.setdefault(
                site,
                Finding(
                    "masked lane",
                    f"{load.count} lanes that are masked off without `other` change the result: "
                    f"{change} when they hold {large} instead of NaN",
                    kernel=load.kernel,
                    argument=load.argument,
                    file=site[0],
                    line=site[1],
                    source=places.statement(Place(*site)),
                    program=load.program,
                    lanes=load.lanes,
                    count=load.count,
                ),
            )
    return list(found.values())


def _bits(result: Tensor) -> Tensor:
    # a dimension of one element is contiguous whatever its stride, which a view minds
    copied = result.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copied.reshape(-1).view(torch.uint8)


def _changes(
    run: Callable[[], Sequence[Tensor]], expected: list[Tensor], poison: Poison
) -> str | None:
    """How the results differ from the expected ones; None if they do not."""
    with detecting(masked_poison=poison):
        results = run()
    for i, (result, before) in enumerate(zip(results, expected, strict=True)):
        changed = (_bits(result) != before).reshape(max(result.numel(), 1), -1).any(1)
        if changed.any():
            return f"{int(changed.sum())} of {result.numel()} elements of result {i}"
    return None
