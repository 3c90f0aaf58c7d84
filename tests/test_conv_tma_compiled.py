"""Convolutions on Hopper as they are compiled: what their machine code does, and which are not."""

import pytest
import torch

from tests.hopper_convolutions import FORWARD, PORTABLE, WEIGHT, last
from tritorch import backend, descriptors, launch, ops
from tritorch.bench import machine_code
from tritorch.ops import conv_dispatch, conv_tma, conv_weight_tma
from tritorch.ops.geometry import Geometry
from tritorch.ops.strided import Layout
from tritorch.testing import dry, products

pytestmark = pytest.mark.compile


def compiled(target, x, w, wanted=(True, True), **options):
    """What a convolution and the gradients that are wanted launch on a GPU of this kind."""
    x, w = (
        operand.contiguous(memory_format=last).requires_grad_(is_wanted)
        for operand, is_wanted in zip((x, w), wanted, strict=True)
    )
    with backend.use("triton"), backend.strict(), dry.compiling_for(target) as recorder:
        y = ops.conv2d(x, w, **options)
        y.backward(torch.empty_like(y, memory_format=last))
    return recorder.kernels


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


# every entry in every direction
VARIANTS = {
    "": (empty(64, 256, 14, 14), {"padding": 1}),
    "-pairs": (empty(64, 256, 28, 28), {"padding": 1, "stride": 2}),
    "-single-pixels": (empty(256, 256, 7, 7), {"stride": 2}),
    "-edges": (empty(256, 256, 7, 7), {"padding": 1}),
}


# bytes per element, and which of the entries of that size
ENTRIES = [*((2, entry) for entry in range(10)), *((4, entry) for entry in range(7))]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
PRODUCT = {2: ".f32.bf16.bf16", 4: ".f32.tf32.tf32"}


def test_every_configuration_is_compiled_below():
    table = conv_tma.configs.CONV2D_TMA_CONFIGS
    assert [(size, entry) for size in table for entry in range(len(table[size]))] == ENTRIES


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_overlap_their_products(itemsize, entry, variant, monkeypatch):
    """From shared memory to the tensor cores without a stop: nothing is loaded by the threads, and
    no product is waited for before the next.
    """
    monkeypatch.setattr(conv_dispatch, "_MIN_PIXELS", 0)
    x, options = VARIANTS[variant]
    config, dtype = conv_tma.configs.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
    w = empty(256, 256, 3, 3, dtype=dtype)
    with launch.override("conv2d_tma_config", config), products.allowing_tf32():
        kernels = compiled("sm_90", x.to(dtype), w, (True, False), **options)
    kernels = [kernel for kernel in kernels if kernel.kernel == FORWARD]
    check(kernels, 2)
    together = conv_tma.configs.residents(config, itemsize)
    for kernel in kernels:
        assert PRODUCT[itemsize] in kernel.compiled.asm["ptx"]
        used = dry.resources(kernel)
        assert (used.shared + 1024) * together <= 228 * 1024
        assert used.registers * 32 * kernel.num_warps * together <= 65536


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_residual(itemsize, entry, activation):
    """Or another takes their place; the loop over the taps is what it is without."""
    config, dtype = conv_tma.configs.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
    k = 256 if config.kwargs["BLOCK_K"] == 128 else 64
    x, w, residual = (
        empty(*size, dtype=dtype).contiguous(memory_format=last)
        for size in ((256, 256, 14, 14), (k, 256, 3, 3), (256, k, 14, 14))
    )
    bias, found = empty(k, dtype=dtype), []
    for keeps in (False, True):
        with (
            launch.override("conv2d_tma_config", config),
            products.allowing_tf32(),
            backend.use("triton"),
            backend.strict(),
            dry.compiling_for("sm_90") as recorder,
        ):
            ops.conv2d(x.requires_grad_(keeps), w, bias, 1, 1, 1, 1, activation, residual=residual)
        found += recorder.kernels
    for kernel in found:
        assert dry.problems(kernel, "sm_90") == []
        # few filters beside erf are left to the portable kernel
        if k == 64 and activation == "gelu":
            assert kernel.kernel == PORTABLE
            continue
        assert kernel.kernel == FORWARD
        used = dry.resources(kernel)
        assert not used.serialized
        code = machine_code.read(used.code)
        turn = [code[n] for n in machine_code.hot_loop(code).path]
        assert {"shared load", "matrix load", "global load"}.isdisjoint(machine_code.kinds(turn))


@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_bias_beside_gelu(itemsize, entry):
    config, dtype = conv_tma.configs.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
    k = 256 if config.kwargs["BLOCK_K"] == 128 else 64
    x, w = (
        empty(*size, dtype=dtype).contiguous(memory_format=last)
        for size in ((64, 256, 14, 14), (k, 256, 3, 3))
    )
    with (
        launch.override("conv2d_tma_config", config),
        products.allowing_tf32(),
        backend.use("triton"),
        dry.compiling_for("sm_90") as recorder,
    ):
        ops.conv2d(x, w, empty(k, dtype=dtype), padding=1, activation="gelu")
    assert recorder.kernels
    assert [dry.problems(kernel, "sm_90") for kernel in recorder.kernels] == [[]]


@pytest.mark.parametrize("gain", [0.0, float("inf")], ids=["apart", "stream-k"])
@pytest.mark.parametrize("entry", range(8))
def test_configurations_of_the_gradient_overlap_their_products(entry, gain, monkeypatch):
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.GAIN", gain)
    config = conv_weight_tma.kernels.CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2][entry]
    # a row of an image, or images
    batch, size = (1, 32) if config.kwargs["BLOCK_PIXELS"] == 16 else (64, 14)
    residents = conv_weight_tma.kernels.residents(config)
    x, taps = empty(batch, 256, size, size), 4 if config.kwargs["TAPS"] == 4 else 3
    with launch.override("conv2d_grad_weight_tma_config", config):
        kernels = compiled("sm_90", x, empty(256, 256, 3, taps), (False, True), padding=1)
    kernels = [kernel for kernel in kernels if kernel.kernel == WEIGHT]
    check(kernels, 1)
    assert kernels[0].constexprs["STREAM_K"] == (gain > 0)
    used = dry.resources(kernels[0])
    assert (used.shared + 1024) * residents <= 228 * 1024
    assert used.registers * 32 * config.num_warps * residents <= 65536


def check(kernels, number):
    assert len(kernels) == number
    for kernel in kernels:
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        assert used.count("HGMMA") > 0
        assert not used.serialized
        assert used.count("LDS", "LDSM") == 0
        assert used.count("UTMALDG") > 0
        assert used.count("UTMASTG") > 0


def test_a_loop_that_may_not_run_is_reported_as_serialized():
    """The check itself, on the kernel without what the compiler is told, which 3.7 sees itself."""
    import triton

    from tests.tiles import product_kernel

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)

    found = []
    for told in (False, True):
        with dry.compiling_for("sm_90") as recorder:
            x, y = empty(256, 256), empty(256, 128)
            run = launch.Prepared(product_kernel, (1,), (256, 3), TOLD=told, num_warps=8)
            run(
                x,
                descriptors.descriptor(x, x.shape, x.stride(), (128, 64)),
                descriptors.descriptor(y, y.shape, y.stride(), (128, 128)),
            )
        found.append(dry.resources(recorder.kernels[0]).serialized)
    assert found == [old, False]


def test_other_gpus_and_what_descriptors_do_not_take(monkeypatch):
    """Everything else has the portable kernels."""

    def launched(prepared, on, *tensors, floats=()):
        names.append(prepared.kernel.__name__)

    monkeypatch.setattr(launch.Prepared, "__call__", launched)

    def takes(target, x, w, **options):
        names.clear()
        # what launches nothing must not be repeated elsewhere
        with launch.recorded():
            compiled(target, x, w, **options)
        return FORWARD in names, WEIGHT in names

    names = []
    x, w = empty(64, 64, 28, 28), empty(192, 64, 3, 3)
    assert takes("sm_90", x, w, padding=1) == (True, True)
    # of few channels on both sides the portable gradient of the filter was faster
    assert takes("sm_90", x, empty(128, 64, 3, 3), padding=1) == (True, False)
    assert takes("sm_90", x.half(), w.half(), padding=1) == (True, True)
    for target in ("sm_80", "sm_100", "gfx942"):
        assert takes(target, x, w, padding=1) == (False, False), target
    # of float32 as TF32 all but the gradient of the filter, and no few channels
    with products.allowing_tf32():
        assert takes("sm_90", x.float(), w.float(), padding=1) == (True, False)
        assert names.count(FORWARD) == 2
        few = empty(64, 3, 28, 28, dtype=torch.float32)
        assert takes("sm_90", few, empty(64, 3, 7, 7).float(), stride=2) == (False, False)
        for target in ("sm_80", "sm_100", "gfx942"):
            assert takes(target, x.float(), w.float(), padding=1) == (False, False), target
    full = torch.backends.cudnn.conv
    before, full.fp32_precision = full.fp32_precision, "ieee"
    assert takes("sm_90", x.float(), w.float(), padding=1) == (False, False)
    full.fp32_precision = before
    for images, filters, options in (
        (empty(64, 60, 28, 28), empty(64, 60, 3, 3), {}),
        (empty(64, 16, 28, 28), empty(16, 16, 3, 3), {}),
        (empty(2, 64, 8, 8), w, {}),
        (empty(64, 256, 28, 28), empty(256, 8, 3, 3), {"groups": 32}),
    ):
        assert takes("sm_90", images, filters, padding=1, **options) == (False, False), options
    x = empty(64 * 64 * 28 * 28 + 4)[4:].view(64, 28, 28, 64).movedim(-1, 1)
    # of all three the gradient of the image alone, which does not read it
    assert takes("sm_90", x, w, padding=1) == (True, False)
    assert names.count(FORWARD) == names.count(PORTABLE) == 1
    # odd sizes have no parity views, and a batch of 24 does not fill a tile of single pixels
    assert takes("sm_90", empty(24, 64, 27, 27), empty(192, 64, 3, 3), stride=2) == (False, True)


@pytest.mark.parametrize("channels", [128, 256, 512])
@pytest.mark.parametrize("count", [132, 114, 78])
def test_every_persistent_program_has_tiles_of_all_residues(channels, count):
    """They differ in taps: four, two, two and one of a 3x3 filter with a stride of 2."""
    sizes = (256, channels, 14, 14), (channels, channels, 3, 3), (256, channels, 28, 28)
    last = torch.channels_last
    layouts = [Layout.of(empty(*size).contiguous(memory_format=last)) for size in sizes]
    geometry = Geometry((2, 2), (1, 1), (1, 1), 1)
    [config] = [
        each
        for each in conv_tma.configs.CONV2D_TMA_CONFIGS[2]
        if each.kwargs["PERSISTENT"] and each.kwargs["BLOCK_K"] == 128
    ][:1]
    with launch.override("conv2d_tma_config", config):
        plan = conv_tma.plan_convolve(*layouts, geometry, True, count)
    (programs, _), tiles = plan.grid, plan.sizes[9]
    assert programs < tiles
    num_k = channels // 128
    for program in range(programs):
        residues = [tile // num_k % 4 for tile in range(program, tiles, programs)]
        counts = [residues.count(residue) for residue in range(4)]
        assert max(counts) - min(counts) <= num_k, (program, counts)
