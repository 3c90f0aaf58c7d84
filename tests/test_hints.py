"""What kernels promise the compiler of their numbers holds: a broken promise is a fault on a GPU.

The interpreter takes no notice of `tl.multiple_of` and its like.
"""

import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import cases, promises

pytestmark = pytest.mark.interpret

LAYOUTS = (None, "sliced", "misaligned", "channels_last")
NORMS = ("batch_norm", "layer_norm", "group_norm")


@pytest.fixture
def promised():
    """What the launches so far have promised."""
    with promises.watching() as found:
        yield found


def calls():
    """Calls of the ops whose kernels promise something, their tensors in several layouts."""
    found = []
    for spec in specs():
        layouts = LAYOUTS if spec.name in NORMS else ()
        if spec.name == "sgd_step":
            layouts = (None, "misaligned")
        for dtype in (torch.float32, torch.float16):
            for sample in spec.samples(Maker(dtype, "meta")):
                if spec.name in NORMS and not sample.layouts:
                    continue
                for layout in layouts:
                    name = f"{spec.name}-{dtype}-{sample.name}-{layout}".replace("torch.", "")
                    found.append(pytest.param(spec, dtype, sample.name, layout, id=name))
    return found


@pytest.mark.parametrize(("spec", "dtype", "name", "layout"), calls())
def test_promises_hold(spec, dtype, name, layout, device, promised):
    given = dict(cases.sample_of(spec, name, Maker(dtype, device, name)).arguments)
    for argument in ("input", "grads"):
        if layout is not None and argument in given:
            given[argument] = cases.map_tensors(
                given[argument], lambda tensor: cases.relayout(tensor, layout)
            )
    cases.run(spec.op, spec, given, grad_outputs=cases.random_gradient(name))
    assert not promised.broken


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_promises_of_channels_between_others(channels, dtype, device, promised):
    """Whole vectors of channels, whose rows start on half of one."""
    from tritorch import ops

    images = torch.randn(2, channels + 4, 3, 5).to(device, dtype)
    images = images.contiguous(memory_format=torch.channels_last)[:, :channels].requires_grad_()
    one = torch.ones(channels, dtype=dtype, device=device)
    ops.batch_norm(images, 0 * one, one, one, one, training=True).sum().backward()
    assert promised.heard
    assert not promised.broken
