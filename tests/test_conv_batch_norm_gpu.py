"""Moments that convolutions write on a GPU, every configuration.

On other GPUs than Hopper's no kernel writes them.
"""

import pytest
import torch

from tests.test_conv_batch_norm import VARIANTS, assert_float32, empty, moments_of
from tritorch import backend, hardware, launch, ops
from tritorch.ops import batch_norm_stats, conv_dispatch, conv_tma, matmul_tma
from tritorch.ops.geometry import Geometry

pytestmark = pytest.mark.cuda

last = torch.channels_last


def on_a_gpu(x, w, **given):
    """Moments of what a GPU stores, which is what it stores without; twice the same."""
    x, w = (
        (torch.randn(one.shape, device="cuda") + offset).to(torch.bfloat16, memory_format=last)
        for one, offset in ((x, 4), (w, 0))
    )
    steps, padding = (given.get("stride", 1),) * 2, (given.get("padding", 0),) * 2
    with backend.use("triton"), backend.strict():
        y = ops.conv2d(x, w, None, **given)
        found = []
        for _ in range(2):
            again = torch.full_like(y, torch.nan)
            of = Geometry(steps, padding, (1, 1), 1)
            found.append(conv_dispatch.convolve_with_moments(x, w, again, of))
            assert torch.equal(again, y)
        if hardware.capability(x) != 90:
            assert found == [None, None]
            return
        assert torch.equal(*found)
        statistics = batch_norm_stats.batch_norm_gather_stats(found[0], None, None, 0.1)
    assert (found[0][:, 2].sum(0) == y.numel() // y.shape[1]).all()
    assert_float32(statistics, *moments_of(y))


# the last tiles of images, rows, columns and channels end past them
EDGES = {
    "-images": (empty(61, 224, 14, 14), {"padding": 1}),
    "-pixels": (empty(64, 224, 13, 13), {"padding": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS | EDGES)
@pytest.mark.parametrize("entry", range(10))
def test_convolutions_write_moments_on_a_gpu(entry, variant):
    x, given = (VARIANTS | EDGES)[variant]
    config = conv_tma.configs.CONV2D_TMA_CONFIGS[2][entry]
    with launch.override("conv2d_tma_config", config):
        on_a_gpu(x, empty(x.shape[1], x.shape[1], 3, 3), **given)


@pytest.mark.parametrize(("stride", "channels"), [(1, 512), (1, 264), (2, 512)])
@pytest.mark.parametrize("entry", range(23))
def test_products_write_moments_on_a_gpu(entry, stride, channels):
    config = matmul_tma.configs.MATMUL_TMA_CONFIGS[2][entry]
    k = config.kwargs["BLOCK_K"] if config.kwargs["FORM"] == "stationary" else 512
    with launch.override("matmul_tma_config", config):
        on_a_gpu(empty(251, k, 14, 14), empty(channels, k, 1, 1), stride=stride)
