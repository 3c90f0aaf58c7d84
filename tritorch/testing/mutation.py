"""Finds what wrote into an argument that a call must not change."""

from __future__ import annotations

import torch
from torch import Tensor

from tritorch.registry import Argument
from tritorch.testing import accesses, places
from tritorch.testing.calls import tensors_of
from tritorch.testing.findings import Finding
from tritorch.testing.shadow import is_plain


def finding(subject: str, name: str, now: Argument, before: Argument) -> Finding:
    """The finding for the argument `name`, which is not what it was before.

    With the line and the kernel that stored to it, where `detectors.detecting` has watched.
    """
    message = f"{subject} wrote into {name}"
    pairs = list(zip(tensors_of(now), tensors_of(before), strict=True))
    watched = [is_plain(tensor) for tensor, _ in pairs]
    if accesses.active is None or not all(watched):
        return Finding("mutation", message, argument=name)
    for tensor, then in pairs:
        changed = _changed(tensor.detach(), then)
        if changed is None or not changed.any():
            continue
        store = accesses.active.last_store(tensor, changed.numpy())
        if store is not None:
            place, kernel, argument = store
            return Finding(
                "mutation",
                f"{message}, which is `{argument}` of the kernel" if argument else message,
                kernel=kernel,
                argument=argument or name,
                file=place.file,
                line=place.line,
                source=places.statement(place),
            )
    return Finding("mutation", f"{message}: torch code did, no kernel", argument=name)


def _changed(now: Tensor, before: Tensor) -> Tensor | None:
    """The elements that have other bits; None where the tensor has become another."""
    if (now.shape, now.dtype) != (before.shape, before.dtype):
        return None
    bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (now, before))
    first, second = bits
    return (first != second).reshape(now.numel(), -1).any(1).reshape(now.shape)
