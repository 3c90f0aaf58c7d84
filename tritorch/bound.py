"""A compiled kernel, ready for launch after launch without what Triton does anew in each.

Triton's launcher asks for scratch memory that no kernel of ours has, and makes a tensor map of
every descriptor, though addresses come again: an allocator gives back what it was given.  Both are
left out where the launcher is the class of a Triton that is known here, `_KNOWN`; any other one is
called as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# releases of Triton whose launcher calls its C function with what `_straight` gives it
_KNOWN = ((3, 6),)
# tensor maps that one descriptor of one kernel has remembered, of 128 bytes each
_MOST_MAPS = 64


class Maps:
    """Makes arguments of the C function from tensors and descriptors, whose maps it remembers.

    `kinds`: what the compiler says of the descriptor at each place among the arguments.  `describe`
    makes the words of one from a descriptor and that.
    """

    def __init__(
        self, kinds: Mapping[int, Any], describe: Callable[[Any, Any], Sequence[Any]]
    ) -> None:
        self._known: dict[int, dict[tuple[Any, ...], Sequence[Any]]] = {at: {} for at in kinds}
        self._kinds, self._describe = kinds, describe

    def __call__(self, tensors: Sequence[Any]) -> list[Any]:
        arguments: list[Any] = []
        for at, tensor in enumerate(tensors):
            known = self._known.get(at)
            if known is None:
                arguments.append(tensor)
                continue
            # a map says nothing else of a tensor: it may outlive it, and serve the next one there
            key = tensor.base.data_ptr(), tensor.shape, tensor.strides
            words = known.get(key)
            if words is None:
                if len(known) >= _MOST_MAPS:
                    known.clear()
                words = known[key] = self._describe(tensor, self._kinds[at])
            arguments.extend(words)
        return arguments


class Bound(NamedTuple):
    """Called as run(grid x, y, z, stream, *head, *tensors, numbers, floats, *constants), with the
    tensors as `maps` makes them, if there are any.
    """

    run: Callable[..., None]
    head: tuple[Any, ...]
    maps: Maps | None
    constants: tuple[Any, ...]


def bind(kernel: Any, compiled: Any, given: Sequence[Any], options: Mapping[str, Any]) -> Bound:
    """Of what Triton compiled for the arguments `given`."""
    # the launcher takes a value for every parameter, also for those that were compiled in
    constants = tuple(
        options.get(parameter.name, parameter.default) for parameter in kernel.params[len(given) :]
    )
    launcher, metadata = compiled.run, compiled.packed_metadata
    straight = _straight(launcher)
    if straight is None:
        # no launch metadata, no hooks
        return Bound(launcher, (compiled.function, metadata, None, None, None), None, constants)
    run, maps = straight
    head = (
        compiled.function,
        launcher.launch_cooperative_grid,
        launcher.launch_pdl,
        # no scratch memory, of either kind
        None,
        None,
        metadata,
        None,
        None,
        None,
    )
    return Bound(run, head, maps, constants)


def _straight(launcher: Any) -> tuple[Callable[..., None], Maps | None] | None:
    """The C function under Triton's launcher and the maps for it; None if this is not that class,
    or if the kernel needs what it does.
    """
    kind = type(launcher)
    if not _is_known(kind.__module__, kind.__name__):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if not inspect.isfunction(launcher.launch):
        return launcher.launch, None
    try:
        inside = inspect.getclosurevars(launcher.launch).nonlocals
        run, places, kinds = (
            inside[name] for name in ("launcher", "tensordesc_indices", "tensordesc_meta")
        )
    except (TypeError, KeyError):
        return None
    # without a map the tensor itself is an argument, which must not be kept
    if inspect.isfunction(run) or len(places) != len(kinds) or None in kinds:
        return None
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return run, Maps(dict(zip(sorted(places), kinds, strict=True)), make_tensordesc_arg)


@functools.cache
def _is_known(module: str, name: str) -> bool:
    if (module, name) != ("triton.backends.nvidia.driver", "CudaLauncher"):
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN
