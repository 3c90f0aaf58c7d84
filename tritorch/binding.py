"""Binds kernel launches to PyTorch: the only file that names `torch.library`.

A launch becomes a low-level library op (`library_op`), so that torch.compile, export, the profiler
and the FLOP counter see one opaque node with known shapes.  Ops wrap those in a
`torch.autograd.Function`, whose forward and backward call them, and enter it by `apply`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from tritorch import launch as launching
from tritorch.repeats import nodes, seen

# what is plain no class need be asked
_PLAIN = frozenset((type(None), bool, int, float, str, tuple, torch.Size))

_LIBRARY = torch.library.Library("tritorch", "DEF")

# registered under the key of CPU tensors too: the interpreter and the dry driver launch on those
_KEYS = ("CUDA", "CPU")


def library_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the decorated launch function the library op `tritorch::<schema>` and returns a call of
    it, which takes the way through torch's dispatcher only where something listens there.

    `fake` makes the outputs without launching: the launch function allocates with the same helper,
    so that shapes and layouts are written once.  `flops` counts floating-point operations from the
    arguments' shapes, as `torch.utils.flop_counter` passes them.  `tags` tell torch.compile what
    the op does besides.
    """

    def bind(launch: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=tags)
        for key in _KEYS:
            _LIBRARY.impl(name, _untraced(launch), key)
        torch.library.register_fake(f"tritorch::{name}", fake, lib=_LIBRARY)
        op: Callable[..., Any] = getattr(torch.ops.tritorch, name).default
        if flops is not None:
            register_flop_formula(getattr(torch.ops.tritorch, name))(flops)

        calls = seen.Calls(launch)

        @functools.wraps(launch)
        def call(*arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return op(*arguments, **named)
            if launching.thread.is_whole:
                return launch(*arguments, **named)
            # the dispatcher takes longer than a launch
            key = None if named or seen.listens() else seen.key_of(arguments)
            return op(*arguments, **named) if key is None else calls(key, arguments)

        return call

    return bind


def _untraced(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile out of a launch that it reaches between two of its graphs: what a launch
    remembers by shapes would be compiled anew for each of them.
    """
    disabled = _disable_dynamo(launch)

    def run(*arguments: Any, **named: Any) -> Any:
        # what keeps the compiler out takes as long as a launch, and mostly none is at work
        return (disabled if seen.is_compiler_at_work() else launch)(*arguments, **named)

    return run


class NoContext:
    """Stands for autograd's context where nothing needs a gradient: it keeps nothing."""

    def __init__(self, arguments: int) -> None:
        self.needs_input_grad = (False,) * arguments

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_dirty(self, *tensors: Tensor) -> None:
        # autograd does this for a context of its own
        launching.count_write(*tensors)

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` of tensors that the caller of the op can write later.

    torch.compile checks no versions of what a Function saves and would hand the backward pass what
    was written since: there a copy is saved, which Inductor drops where nothing writes.
    """
    if torch.compiler.is_compiling():
        tensors = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
    ctx.save_for_backward(*tensors)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, without autograd's bookkeeping when no argument needs a
    gradient.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        for argument in arguments:
            if (
                type(argument) not in _PLAIN
                and isinstance(argument, Tensor)
                and argument.requires_grad
            ):
                composer = launching.thread.composer
                return (nodes.apply if composer is None else composer.apply)(function, arguments)
    if not (launching.thread.is_whole or seen.listens()):
        key = seen.key_of(arguments)
        if key is not None:
            return _forward_of(function)(key, arguments)
    return function.forward(NoContext(len(arguments)), *arguments)


@functools.cache
def _forward_of(function: type[torch.autograd.Function]) -> seen.Calls:
    """The forward pass of a Function of which nothing is kept."""
    return seen.Calls(lambda *given: function.forward(NoContext(len(given)), *given))


def autocast_to_lower(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts to the autocast dtype where autocast is on for the first tensor's device: matmul,
    linear, conv.
    """
    device = _autocast_device(tensors)
    if device is None:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(_cast(tensor, device, dtype) for tensor in tensors)


def autocast_to_float32(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts to float32 where autocast is on for the first tensor's device: losses."""
    device = _autocast_device(tensors)
    if device is None:
        return tensors
    return tuple(_cast(tensor, device, torch.float32) for tensor in tensors)


def _autocast_device(tensors: tuple[Tensor | None, ...]) -> str | None:
    for tensor in tensors:
        if tensor is not None:
            device = tensor.device.type
            # of meta tensors torch cannot be asked
            return device if device != "meta" and torch.is_autocast_enabled(device) else None
    return None


def _cast(tensor: Tensor | None, device: str, dtype: torch.dtype) -> Tensor | None:
    # torch's autocast leaves float64 and integers as they are
    if (
        tensor is None
        or tensor.device.type != device
        or tensor.dtype == dtype
        or not tensor.is_floating_point()
        or tensor.dtype == torch.float64
    ):
        return tensor
    composer = launching.thread.composer
    return (cast if composer is None else composer.cast)(tensor, device, dtype)


def cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """Of another dtype, once in a region of autocast where torch's own would be."""
    if _is_cached(tensor, dtype):
        if device not in _REGIONS:
            _REGIONS[device] = _Region(device)
        return _REGIONS[device].cast(tensor, dtype)
    return tensor.to(dtype)


def _is_cached(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's autocast would cast it once in a region, with a graph of its own."""
    return (
        # the compiler finds equal casts itself
        not torch.compiler.is_compiling()
        and tensor.dtype == torch.float32 != dtype
        and tensor.requires_grad
        and tensor.is_leaf
        and torch.is_grad_enabled()
        and torch.is_autocast_cache_enabled()
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


class _Region:
    """Casts of leaves in the present region of autocast.

    torch tells nobody when it leaves a region and forgets its own casts: one of those, of a mark
    that is ours, dies then.
    """

    def __init__(self, device: str) -> None:
        # of other dtypes than float32 autocast has no casts
        with _unheard():
            self._mark, self._nothing = (
                torch.zeros((1, size), dtype=torch.float32, device=device, requires_grad=True)
                for size in (1, 0)
            )
        self._present: weakref.ref[torch.UntypedStorage] | None = None
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}

    def cast(self, leaf: Tensor, dtype: torch.dtype) -> Tensor:
        if self._present is None:
            # an empty product, which launches nothing; hooks of the caller could keep a copy
            with _unheard(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                product: Any = torch.mm(self._mark, self._nothing).grad_fn
            # hooks are given another tensor of the same storage
            storage = product._saved_self.untyped_storage()
            self._present = weakref.ref(storage, self._forget)
        # a cast has a graph that ends in its leaf, so that the number is of no other
        version, cast = self._casts.get((id(leaf), dtype), (None, leaf))
        if version != leaf._version:
            cast = leaf.to(dtype)
            self._casts[id(leaf), dtype] = leaf._version, cast
        return cast

    def _forget(self, _: object) -> None:
        self._present = None
        self._casts.clear()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Inside the block no mode of the caller hears of our own tensors, or has them made otherwise:
    a checkpoint that keeps products would count one that its next pass does not make.
    """
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _itself(tensor: Tensor) -> Tensor:
    return tensor


_REGIONS: dict[str, _Region] = {}
