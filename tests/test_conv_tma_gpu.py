"""Every configuration of the convolutions on descriptors, run on a GPU that has them.

On other GPUs the same calls go to the portable kernels, which must give the same.
"""

import pytest
import torch
import torch.nn.functional as F

from tritorch import backend, hardware, launch, ops
from tritorch.ops import conv_tma, conv_weight_tma

pytestmark = pytest.mark.cuda

last = torch.channels_last
FORWARD, WEIGHT = "conv2d_tma_kernel", "conv2d_grad_weight_tma_kernel"


def made(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cuda")
    return values.bfloat16().contiguous(memory_format=last)


def compare(x, w, wanted, kernel, **options):
    """The convolution and the wanted gradients, with torch's of the same numbers as float64."""
    leaves = [operand.requires_grad_(of) for operand, of in zip((x, w), wanted, strict=True)]
    with backend.use("triton"), backend.strict(), launch.recorded() as names:
        y = ops.conv2d(*leaves, **options)
        grad = made(*y.shape, seed=2)
        y.backward(grad)
    assert (kernel in names) == (hardware.capability(x) == 90)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.conv2d(*exact, **options)
    expected.backward(grad.double())
    for found, other in (
        (y, expected),
        *((one.grad, two.grad) for one, two in zip(leaves, exact, strict=True)),
    ):
        if found is not None:
            assert (found.double() - other).abs().max() <= 2**-8 * other.abs().max()


VARIANTS = {
    "": ((64, 256, 14, 14), {"padding": 1}),
    "dilation": ((64, 256, 14, 14), {"padding": 2, "dilation": 2}),
    "pairs": ((64, 256, 28, 28), {"padding": 1, "stride": 2}),
    "single-pixels": ((256, 256, 7, 7), {"padding": 1, "stride": 2}),
    "edges": ((256, 256, 7, 7), {"padding": 1}),
    "far-taps": ((64, 256, 14, 14), {"padding": 9, "dilation": 9}),
    "groups": ((64, 512, 14, 14), {"padding": 1, "groups": 2}),
    # the last tiles of images, rows and columns end past the image
    "tails": ((35, 256, 13, 11), {"padding": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("entry", range(10))
def test_forward_and_the_gradient_of_the_image(entry, variant):
    shape, options = VARIANTS[variant]
    config = conv_tma.configs.CONV2D_TMA_CONFIGS[2][entry]
    filters = made(256 * options.get("groups", 1), 256, 3, 3, seed=1) / 48
    with launch.override("conv2d_tma_config", config):
        compare(made(*shape), filters, (True, False), FORWARD, **options)


@pytest.mark.parametrize("gain", [0.0, float("inf")], ids=["apart", "stream-k"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("entry", range(8))
def test_the_gradient_of_the_filter(entry, options, gain, monkeypatch):
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.GAIN", gain)
    kernels, chosen = conv_weight_tma.kernels, []
    shares = kernels.shares
    monkeypatch.setattr(
        kernels, "shares", lambda *given: chosen.append(shares(*given)) or chosen[-1]
    )
    config = conv_weight_tma.kernels.CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2][entry]
    pixels, taps = config.kwargs["BLOCK_PIXELS"], config.kwargs["TAPS"]
    # a row of an image, or images
    shape = (2, 512, 14, 32) if pixels == 16 and "stride" not in options else (100, 512, 9, 9)
    groups = options.get("groups", 1)
    filters = made(512, 512 // groups, 3, max(taps, 3), seed=1) / 64
    padding = (1, max(taps, 3) // 2)
    if shape[0] == 2:
        # an output as wide as the image
        padding = (1, (max(taps, 3) - 1) * options.get("dilation", 1) // 2)
    with launch.override("conv2d_grad_weight_tma_config", config):
        compare(made(*shape), filters, (False, True), WEIGHT, padding=padding, **options)
    assert {stream_k for _, _, stream_k in chosen} == ({gain > 0} if chosen else set())
    assert chosen or hardware.capability(filters) != 90


@pytest.mark.parametrize("order", [last, torch.contiguous_format])
def test_few_channels(order):
    """The view of packed pixels that overlap, which no other test asks a GPU for."""
    x = made(64, 3, 224, 224).contiguous(memory_format=order)
    filters = made(64, 3, 7, 7, seed=1) / 12
    compare(x, filters, (False, True), FORWARD, stride=2, padding=3)


def test_a_small_batch_is_split():
    compare(made(8, 512, 14, 14), made(512, 512, 3, 3) / 64, (True, True), FORWARD, padding=1)


STATISTICS = {
    "3x3": ((64, 256, 14, 14), (256, 256, 3, 3), {"padding": 1}),
    "pairs": ((64, 128, 28, 28), (256, 128, 3, 3), {"padding": 1, "stride": 2}),
    "64-channels": ((32, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
    "tails": ((35, 256, 13, 11), (264, 256, 3, 3), {"padding": 1}),
    "1x1": ((64, 256, 14, 14), (1024, 256, 1, 1), {}),
    "1x1-stride-2": ((64, 512, 14, 14), (1024, 512, 1, 1), {"stride": 2}),
    "1x1-64-channels": ((32, 64, 56, 56), (256, 64, 1, 1), {}),
    "stem": ((32, 3, 112, 112), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_the_convolution(name):
    """Beside those that batch normalisation takes itself of the same values."""
    shape, filters, options = STATISTICS[name]
    x, w = made(*shape), made(*filters, seed=1) / 16
    # far from zero, where squares would cancel
    x += 4
    results = []
    for joined in (True, False):
        running = torch.zeros(filters[0], device="cuda"), torch.ones(filters[0], device="cuda")
        leaves = [operand.detach().clone().requires_grad_() for operand in (x, w)]
        with backend.use("triton"), backend.strict(), launch.recorded() as names:
            if joined:
                y = ops.conv2d_batch_norm(*leaves, *running, training=True, **options)
            else:
                y = ops.conv2d(*leaves, None, **options)
                y = ops.batch_norm(y, *running, training=True)
            y.backward(made(*y.shape, seed=2))
        on_descriptors = hardware.capability(x) == 90
        assert ("batch_norm_stats_kernel" in names) == (not joined or not on_descriptors)
        results.append((*running, y.detach(), *(leaf.grad for leaf in leaves)))
    (mean, var, y, of_x, of_w), others = results
    for found, other in zip((mean, var), others[:2], strict=True):
        assert (found - other).abs().max() <= 2**-18 * other.abs().max()
    for found, other in zip((y, of_x, of_w), others[2:], strict=True):
        assert (found.double() - other.double()).abs().max() <= 2**-7 * other.abs().max()
