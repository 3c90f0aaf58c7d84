"""What kernels promise the compiler of their numbers holds: a broken promise is a fault on a GPU.

The interpreter takes no notice of `tl.multiple_of` and its like.
"""

import numpy as np
import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import cases

pytestmark = pytest.mark.interpret

LAYOUTS = (None, "sliced", "misaligned", "channels_last")


def in_groups(data, sizes):
    """Each axis of n split into n / size groups: the groups' axes, then those within a group."""
    shape = [
        n for pair in zip(data.shape, sizes, strict=True) for n in (pair[0] // pair[1], pair[1])
    ]
    axes = range(0, len(shape), 2)
    return data.reshape(shape).transpose(*axes, *(axis + 1 for axis in axes))


@pytest.fixture
def broken(monkeypatch, device):
    """Promises that do not hold, of the launches so far; `broken.heard` counts all."""
    if device == "cuda":
        pytest.skip("promises are watched in Triton's interpreter")
    from triton.runtime import interpreter

    class Broken(list):
        heard = 0

    found = Broken()

    def multiple_of(data, values, together):
        starts = data if data.size == 1 else data[tuple(slice(None, None, n) for n in together)]
        if (starts % max(values) != 0).any():
            found.append(f"not every one of {np.unique(starts)[:9]} is a multiple of {values}")

    def max_contiguous(data, values, together):
        groups = in_groups(data.astype(np.int64), values)
        for axis, size in enumerate(values):
            if size > 1 and (np.diff(groups, axis=data.ndim + axis) != 1).any():
                found.append(f"offsets do not lie together in {values}")

    def max_constancy(data, values, together):
        groups = in_groups(data, values)
        groups = groups.reshape(*groups.shape[: data.ndim], -1)
        if (groups != groups[..., :1]).any():
            found.append(f"numbers are not alike in {values}")

    promises = {
        "tt.divisibility": multiple_of,
        "tt.contiguity": max_contiguous,
        "tt.constancy": max_constancy,
    }

    def heard(handle, name, values):
        found.heard += 1
        together = handle.attr.get("tt.contiguity", [1] * len(values))
        promises[name](handle.data, values, together)
        handle.attr[name] = values

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", heard)
    return found


def calls():
    """Calls of the ops whose kernels promise something, their tensors in several layouts."""
    found = []
    for spec in specs():
        layouts = {"batch_norm": LAYOUTS, "sgd_step": (None, "misaligned")}.get(spec.name, ())
        for dtype in (torch.float32, torch.float16):
            for sample in spec.samples(Maker(dtype, "meta")):
                if spec.name == "batch_norm" and not sample.layouts:
                    continue
                for layout in layouts:
                    name = f"{spec.name}-{dtype}-{sample.name}-{layout}".replace("torch.", "")
                    found.append(pytest.param(spec, dtype, sample.name, layout, id=name))
    return found


@pytest.mark.parametrize(("spec", "dtype", "name", "layout"), calls())
def test_promises_hold(spec, dtype, name, layout, device, broken):
    given = dict(cases.sample_of(spec, name, Maker(dtype, device, name)).arguments)
    for argument in ("input", "grads"):
        if layout is not None and argument in given:
            given[argument] = cases.map_tensors(
                given[argument], lambda tensor: cases.relayout(tensor, layout)
            )
    cases.run(spec.op, spec, given, grad_outputs=cases.random_gradient(name))
    assert not broken, broken[0]


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_promises_of_channels_between_others(channels, dtype, device, broken):
    """Whole vectors of channels, whose rows start on half of one."""
    from tritorch import ops

    images = torch.randn(2, channels + 4, 3, 5).to(device, dtype)
    images = images.contiguous(memory_format=torch.channels_last)[:, :channels].requires_grad_()
    one = torch.ones(channels, dtype=dtype, device=device)
    ops.batch_norm(images, 0 * one, one, one, one, training=True).sum().backward()
    assert broken.heard
    assert not broken, broken[0]
