"""Adaptive pooling: its windows, and the mean of a whole image with its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.pools import AXES, SHAPES, pair, results
from tritorch import launch, nn, ops
from tritorch.ops import spatial_mean
from tritorch.ops.strided import Layout

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("function", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
@pytest.mark.parametrize("size", range(1, 8))
def test_adaptive_windows_are_torchs(function, size, device):
    """Fewer, as many and more than pixels."""
    x = torch.randn(2, 2, 5, 6, device=device)
    given = {"return_indices": True} if "max" in function else {}
    ours, theirs = (
        results(getattr(module, function), x, (size, 8 - size), **given) for module in (ops, F)
    )
    assert_close(ours, theirs)


def test_adaptive_windows_of_long_sequences(device):
    """The number of the first pixel of a window passes 32 bits before it is divided."""
    from tritorch.kernels.pool import Config

    x = torch.randn(1, 1, 50001, device=device)
    # few programs, for the interpreter
    tile = Config({"BLOCK_PIXELS": 4096, "BLOCK_C": 1}, num_warps=4, num_stages=1)
    with launch.override("pool_config", tile):
        ours = results(ops.adaptive_avg_pool1d, x, 49999)
    # torch's own CUDA kernel computes that number in 32 bits
    theirs = results(F.adaptive_avg_pool1d, x.detach().cpu(), 49999)
    assert_close([t.cpu() for t in ours], theirs)


@pytest.mark.parametrize("function", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
@pytest.mark.parametrize("size", [(None, 3), (2, None), (None, None)])
def test_none_keeps_a_size(function, size, device):
    x = torch.randn(2, 3, 5, 6, device=device)
    ours, theirs = (results(getattr(module, function), x, size) for module in (ops, F))
    assert_close(ours, theirs)


@pytest.mark.parametrize("channels_last", [False, True])
@AXES
def test_gradient_of_a_global_mean_can_be_written(axes, channels_last, device):
    """It is as dense as torch's; of images in channels_last it keeps their order."""
    order = {2: torch.channels_last, 3: torch.channels_last_3d}.get(axes)
    order = order if channels_last and order else torch.contiguous_format
    x = torch.randn(SHAPES[axes], device=device).contiguous(memory_format=order).requires_grad_()
    ours, theirs = pair("adaptive_avg_pool", axes)
    grads = []
    for function in (ours, theirs):
        y = function(x, 1)
        # in an order of its own
        weights = torch.arange(y.numel(), device=device, dtype=y.dtype).view_as(
            y.mT.transpose(0, 1)
        )
        weights = weights.transpose(0, 1).mT
        (grad,) = torch.autograd.grad(y, x, weights)
        grads.append(grad.mul_(2))
    assert_close(*grads)
    assert grads[0].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_gradient_of_a_global_mean_is_written_once(dtype, device):
    grad = torch.randn(2, 3, 1, 1, device=device, dtype=dtype)
    x = torch.randn(2, 3, 5, 6, device=device, dtype=dtype, requires_grad=True)
    y = ops.adaptive_avg_pool2d(x, 1)
    with launch.recorded() as names:
        torch.autograd.grad(y, x, grad)
    assert names == ["spread_mean_kernel"]


@pytest.mark.parametrize(
    ("shape", "dtype", "order", "tile"),
    [
        # 256 programs of 512 channels, and one less
        ((128, 1024, 7, 7), torch.float16, torch.channels_last, (16, 512)),
        ((255, 512, 7, 7), torch.float16, torch.channels_last, (64, 64)),
        # 512 programs of 1024 channels, one less, and channels of which they would have half a tile
        ((256, 2048, 7, 7), torch.bfloat16, torch.channels_last, (8, 1024)),
        ((511, 1024, 7, 7), torch.bfloat16, torch.channels_last, (16, 512)),
        ((512, 1536, 7, 7), torch.bfloat16, torch.channels_last, (16, 512)),
        # the same number of programs, the last ones of which would have half a tile
        ((256, 768, 7, 7), torch.bfloat16, torch.channels_last, (64, 64)),
        ((256, 512, 7, 7), torch.bfloat16, torch.channels_last, (16, 512)),
        ((256, 512, 7, 7), torch.float32, torch.channels_last, (64, 64)),
        ((256, 512, 7, 7), torch.float64, torch.channels_last, (64, 64)),
        # rows of pixels that nothing but their number tells apart
        ((256, 512, 8, 8), torch.float16, torch.contiguous_format, (64, 32)),
        ((256, 512, 5, 13), torch.float16, torch.contiguous_format, (512, 8)),
    ],
)
def test_tile_of_a_global_mean(shape, dtype, order, tile):
    """Rows of 512 channels and more where 16 bits of many images are whole tiles of them."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=order)
    # as of a view, so that small images are not taken whole
    _, run = spatial_mean._plan(Layout.of(x), False)
    assert (run.config.kwargs["BLOCK_R"], run.config.kwargs["BLOCK_C"]) == tile


@pytest.mark.parametrize("entry", range(9))
def test_every_tile_gives_a_global_mean(entry, device):
    """Of more and of fewer channels and pixels than it has."""
    from tritorch.kernels.adaptive_pool import SPATIAL_MEAN_CONFIGS

    assert len(SPATIAL_MEAN_CONFIGS) == 9
    for shape in ((1, 1040, 3, 3), (2, 24, 7, 11)):
        x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        with launch.override("spatial_mean_config", SPATIAL_MEAN_CONFIGS[entry]):
            y = ops.adaptive_avg_pool2d(x, 1)
        assert_close(y, x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("images", [40000, 65536])
def test_gradient_of_a_global_mean_reaches_past_int32(images, device):
    """The first program of one of 2**31 numbers and more writes what it has to."""
    whole = spatial_mean._plan_spread((images, 32768, 1, 2), False)
    first = launch.Prepared(whole.kernel, (1,), whole.numbers, whole.config, **whole.constants)
    x = torch.arange(2048.0, device=device)
    y = torch.full((2048,), torch.nan, device=device)
    first(x, x, y)
    assert torch.equal(y, x[:1024].repeat_interleave(2) / 2)


def test_a_global_mean_compiles_with_its_gradient(device):
    x = torch.randn(2, 3, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(ops.adaptive_avg_pool2d, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (compiled, ops.adaptive_avg_pool2d):
        leaf = x.clone().requires_grad_()
        function(leaf, 1).square().sum().backward()
        grads.append(leaf.grad)
    assert_close(*grads, rtol=0, atol=0)
    assert grads[0].stride() == x.stride()


def test_a_hook_writes_into_the_gradient_of_a_global_mean(device):
    x = torch.randn(2, 3, 5, 6, device=device)
    grads = []
    for module in (nn, torch.nn):
        layer = module.ReLU()
        layer.register_full_backward_pre_hook(lambda layer, grads: (grads[0].mul_(2),))
        leaf = x.clone().requires_grad_()
        module.AdaptiveAvgPool2d(1)(layer(leaf)).sum().backward()
        grads.append(leaf.grad)
    assert_close(*grads)


@pytest.mark.parametrize("function", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_windows_of_any_image_compile(function, device):
    """Images of other sizes than the first make them open to torch.compile."""
    torch.compiler.reset()
    pool = getattr(ops, function)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    for height, width in ((5, 7), (6, 4), (8, 9), (2, 3)):
        x = torch.randn(1, 2, height, width, device=device)
        assert_close(*(results(one, x, (4, 6)) for one in (compiled, pool)))
