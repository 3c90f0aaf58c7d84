"""Whether steps are the kernels', and runs of Adam and AdamW, ours and torch's, compared."""

import pytest
import torch
from torch import nn

from tritorch import backend, optim

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
KINDS = pytest.mark.parametrize("kind", ["Adam", "AdamW"])


@pytest.fixture
def kernels(rung):
    """Whether this rung runs the kernels: then no call may leave them."""
    backend.reset()
    yield rung != "reference"
    assert backend.explain() == {}


@pytest.fixture
def fallbacks(rung):
    """Returns the reasons for which steps left the kernels; none are counted where none run."""
    backend.reset()
    yield (
        lambda: (
            [reason for reasons in backend.explain().values() for reason in reasons]
            if rung != "reference"
            else None
        )
    )
    backend.reset()


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """Parameters, an optimizer, and gradients that depend on the step alone."""

    def __init__(
        self,
        module,
        kind,
        device,
        shapes=((3, 4), (1030,)),
        dtype=torch.float32,
        like=None,
        **given,
    ):
        # what a narrower type holds, for a run in a wider one
        self.values = lambda shape, seed: normal(shape, seed).to(like or dtype).to(device, dtype)
        self.params = [nn.Parameter(self.values(shape, i)) for i, shape in enumerate(shapes)]
        self.optimizer = getattr(module, kind)(self.params, **{"lr": 0.1} | given)
        self.steps = 0

    def set_grads(self, but=()):
        self.steps += 1
        for i, param in enumerate(self.params):
            grad = self.values(param.shape, 100 * self.steps + i)
            param.grad = None if i in but else grad

    def step(self, times=1, but=()):
        for _ in range(times):
            self.set_grads(but)
            self.optimizer.step()
        return self

    def tensors(self):
        """Parameters and averages by name."""
        found = {f"parameter {i}": param for i, param in enumerate(self.params)}
        for i, param in enumerate(self.params):
            state = self.optimizer.state.get(param, {})
            found |= {f"{name} {i}": tensor for name, tensor in state.items()}
        return found


def both(kind, device, **given):
    return Run(optim, kind, device, **given), Run(torch.optim, kind, device, **given)


def assert_close(ours, torchs, **options):
    found, expected = ours.tensors(), torchs.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.dtype, tensor.device) == (other.dtype, other.device), name
        # a step, in one launch and in several roundings
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=2e-6, msg=name, **options)
