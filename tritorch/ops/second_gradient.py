"""Gradients of gradients, and theirs, where plain PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def through(
    plain: Callable[..., tuple[Tensor | None, ...]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of those `tensors` that are wanted, from those of the results of plain(*tensors).

    `plain` says in PyTorch what the backward of a `torch.autograd.Function` computes.  To be called
    in the backward of that backward: the results can be differentiated again if autograd records.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that a gradient ends here even if one of them was computed from another
        leaves = [
            tensor.view_as(tensor) if needed and tensor is not None else tensor
            for tensor, needed in zip(tensors, wanted, strict=True)
        ]
        results = plain(*leaves)
    pairs = [
        (result, grad)
        for result, grad in zip(results, grads, strict=True)
        if result is not None and grad is not None and result.requires_grad
    ]
    found: list[Tensor | None] = [None] * len(leaves)
    ends = {i: leaf for i, leaf in enumerate(leaves) if wanted[i] and leaf is not None}
    if pairs:
        values, given = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(
            values, tuple(ends.values()), given, create_graph=again, allow_unused=True
        )
        for i, gradient in zip(ends, gradients, strict=True):
            found[i] = gradient
    return found


def leaf(tensor: Tensor) -> Tensor:
    """The tensor as one that plain PyTorch can differentiate by."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
