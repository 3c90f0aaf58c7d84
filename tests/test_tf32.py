"""Products of float32 follow torch's flag of their own family, in both directions."""

import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import launch
from tritorch.registry import Maker, specs
from tritorch.testing import cases

pytestmark = pytest.mark.interpret

FLAGS = {
    "matmul": torch.backends.cuda.matmul,
    "linear": torch.backends.cuda.matmul,
    "conv2d_batch_norm": torch.backends.cudnn.conv,
    **{
        f"conv{transposed}{axes}d": torch.backends.cudnn.conv
        for transposed in ("", "_transpose")
        for axes in (1, 2, 3)
    },
}


@pytest.fixture
def precisions(monkeypatch):
    """INPUT_PRECISION of every launch that has one."""
    found, run = [], launch.Prepared.__call__

    def watched(self, *tensors, **floats):
        if "INPUT_PRECISION" in self.constants:
            found.append(self.constants["INPUT_PRECISION"])
        run(self, *tensors, **floats)

    monkeypatch.setattr(launch.Prepared, "__call__", watched)
    return found


@pytest.mark.parametrize("own", ["tf32", "ieee"])
@pytest.mark.parametrize("name", FLAGS)
def test_only_the_flag_of_the_family_decides(name, own, device, precisions):
    # conftest.py puts both back after each test
    for flags in FLAGS.values():
        flags.fp32_precision = "ieee" if own == "tf32" else "tf32"
    FLAGS[name].fp32_precision = own
    spec = next(spec for spec in specs() if spec.name == name)
    sample = next(s.name for s in spec.samples(Maker(torch.float32, "meta")) if s.layouts)
    make = Maker(torch.float32, device, name)
    given = dict(cases.sample_of(spec, sample, make).arguments)
    cases.run(spec.op, spec, given, grad_outputs=cases.random_gradient(name))
    # the result, the gradient of each factor
    assert precisions == [own] * 3


def test_every_product_is_tested():
    assert set(FLAGS) == {spec.name for spec in specs() if spec.autocast == "lower"}
