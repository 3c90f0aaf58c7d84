"""What kernels read and write: nothing outside their tensors, all of what they make, once."""

import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import cases, detectors

pytestmark = pytest.mark.interpret

# float16 has other configurations
DTYPES = {torch.float32: "f32", torch.float16: "f16"}


def samples():
    return [
        pytest.param(spec, dtype, sample.name, id=f"{spec.name}-{DTYPES[dtype]}-{sample.name}")
        for spec in specs()
        for dtype in DTYPES
        for sample in spec.samples(Maker(dtype, "meta"))
    ]


@pytest.mark.parametrize(("spec", "dtype", "name"), samples())
def test_every_access_is_in_place(spec, dtype, name, device):
    seed = f"{spec.name}/{name}"
    given = dict(cases.sample_of(spec, name, Maker(dtype, device, seed)).arguments)
    with detectors.detecting() as detector:
        cases.run(spec.op, spec, given, grad_outputs=cases.random_gradient(seed + "/gradient"))
    assert not detector.findings, "\n".join(map(str, detector.findings))
