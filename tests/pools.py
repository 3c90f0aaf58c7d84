"""Images, and the pairs of functions that tests of pooling compare."""

import pytest
import torch
import torch.nn.functional as F

from tritorch import ops

AXES = pytest.mark.parametrize("axes", [1, 2, 3])
# a batch of two images of three channels
SHAPES = {1: (2, 3, 9), 2: (2, 3, 6, 5), 3: (2, 3, 3, 4, 5)}


def pair(name, axes):
    """Our function and torch's."""
    return getattr(ops, f"{name}{axes}d"), getattr(F, f"{name}{axes}d")


def results(function, x, *given, **options):
    """Outputs and the gradient of the first one, in which every window has another weight."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = function(x, *given, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad = torch.arange(1.0, 1 + outputs[0].numel(), device=x.device).view(outputs[0].shape)
    return *(output.detach() for output in outputs), torch.autograd.grad(outputs[0], x, grad)[0]
