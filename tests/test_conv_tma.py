"""Convolutions on Hopper: which ones take descriptors, what they compute, what they compile to."""

import contextlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tritorch import backend, descriptors, hardware, launch, ops
from tritorch.bench import machine_code
from tritorch.ops import conv_tma, implicit_gemm, matmul_tma
from tritorch.ops.geometry import Geometry
from tritorch.ops.strided import Layout
from tritorch.registry import specs
from tritorch.testing import cases, dry, interpreter, products
from tritorch.testing.detectors import detecting

last = torch.channels_last
FORWARD, WEIGHT, PORTABLE = "conv2d_tma_kernel", "conv2d_grad_weight_tma_kernel", "conv2d_kernel"


class Case(NamedTuple):
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    # channels written, pixels, channels read; of a filter's gradient channels, channels, pixels and
    # taps
    tile: tuple[int, ...] = (16, 16, 16)
    weight_tile: tuple[int, ...] = (16, 16, 16, 1)
    dtype: torch.dtype = torch.float16
    persistent: bool = False

    def make(self, device="cpu"):
        """Image, filters, bias and the gradient of the output."""
        generator = torch.Generator().manual_seed(3)

        def made(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            order = last if len(shape) == 4 else torch.contiguous_format
            return values.to(device, self.dtype).contiguous(memory_format=order)

        x, w = made(*self.input), made(*self.weight)
        y = self.reference(x, w, None)
        return x, w, made(self.weight[0]), made(*y.shape)

    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    def reference(self, x, w, bias):
        y = F.conv2d(x, w, bias, *self.geometry())
        return y.relu() if self.activation == "relu" else y

    def run(self, x, w, bias):
        return ops.conv2d(x, w, bias, *self.geometry(), activation=self.activation)


@contextlib.contextmanager
def tiles(case):
    kernels, weights = conv_tma.kernels, conv_tma.weight_kernels
    with (
        hardware.pretend(90),
        launch.override("conv2d_tma_config", kernels._tile(*case.tile, 4, 2, case.persistent)),
        launch.override("conv2d_grad_weight_tma_config", weights._tile(*case.weight_tile, 4, 2)),
        backend.use("triton"),
        backend.strict(),
        launch.recorded() as names,
    ):
        yield names


def gradients(run, operands, grad):
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    y = run(*leaves)
    return (y, *torch.autograd.grad(y, leaves, grad))


CASES = {
    # every axis has a tile that ends past it, rows of one tile and channels of the next
    "3x3": Case((4, 24, 3, 5), (24, 24, 3, 3)),
    "bfloat16": Case((2, 16, 4, 4), (16, 16, 3, 3), dtype=torch.bfloat16),
    "relu": Case((2, 16, 4, 4), (32, 16, 3, 3), activation="relu"),
    "pairs": Case((2, 16, 6, 8), (16, 16, 3, 3), stride=2),
    "odd-stride-2": Case((16, 16, 3, 5), (16, 16, 3, 3), stride=2, weight_tile=(16, 16, 16, 3)),
    "dilation": Case((16, 16, 3, 4), (16, 16, 3, 3), padding=2, dilation=2),
    "groups": Case((2, 32, 4, 4), (32, 16, 3, 3), groups=2),
    "groups-pairs": Case((4, 32, 4, 4), (32, 16, 3, 3), stride=2, groups=2),
    "three-taps": Case((16, 16, 4, 3), (16, 16, 3, 3), weight_tile=(16, 16, 16, 3)),
    "columns": Case((1, 16, 3, 16), (16, 16, 3, 3), weight_tile=(16, 16, 16, 3)),
    "split": Case((1, 144, 4, 4), (16, 144, 3, 1), padding=(1, 0)),
    # programs have several tiles, and the two that there are not the same number
    "persistent": Case((5, 32, 4, 4), (32, 32, 3, 1), padding=(1, 0), persistent=True),
    "persistent-pairs": Case(
        (4, 32, 4, 8), (32, 16, 3, 2), stride=2, padding=(1, 0), groups=2, persistent=True
    ),
    "1x1-stride-2": Case((16, 16, 3, 3), (16, 16, 1, 1), stride=2, padding=0),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, monkeypatch):
    case = CASES[name]
    if case.persistent:
        monkeypatch.setattr(matmul_tma.kernels, "MULTIPROCESSORS", 1)
        # tiles are stored in halves
        monkeypatch.setattr("tritorch.kernels.conv_tma.SHARED_MEMORY", 0)
    *operands, grad = case.make()
    with tiles(case) as names, detecting() as detector:
        found = gradients(case.run, operands, grad)
    assert detector.findings == []
    assert FORWARD in names
    assert WEIGHT in names
    # a strided filter leaves pixels without any tap
    assert (PORTABLE in names) == (name == "1x1-stride-2")
    exact = gradients(case.reference, [o.double() for o in operands], grad.double())
    for one, other in zip(found, exact, strict=True):
        # sums are kept in float32: what is lost is the rounding of the result
        error = (one.double() - other).abs().max()
        assert error <= torch.finfo(case.dtype).eps * other.abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize("programs", [1, 5, 13])
@pytest.mark.parametrize("name", ["3x3", "odd-stride-2", "dilation", "groups", "columns"])
def test_programs_with_even_shares_of_the_gradient_of_a_filter(name, programs, monkeypatch):
    """They begin and end anywhere in sums of different lengths, for which there are more of them
    than sums or fewer.
    """
    case, chosen = CASES[name], []

    def shares(config, tiles, steps, groups, weights):
        # at least a step for each
        chosen.append(even_shares(tiles, steps, min(programs, tiles * sum(steps))))
        return chosen[-1]

    monkeypatch.setattr(conv_tma.weight_kernels, "shares", shares)
    *operands, grad = case.make()
    with tiles(case), detecting() as detector:
        _, _, found, _ = gradients(case.run, operands, grad)
    assert detector.findings == []
    assert len(chosen) == 1
    _, _, exact, _ = gradients(case.reference, [o.double() for o in operands], grad.double())
    error = (found.double() - exact).abs().max()
    assert error <= torch.finfo(case.dtype).eps * exact.abs().max()


def even_shares(tiles, steps, programs):
    return programs, conv_tma.weight_kernels.most_programs(tiles, steps, programs), True


@pytest.mark.interpret
@pytest.mark.parametrize("programs", range(1, 21))
def test_how_many_programs_share_a_sum(programs):
    lengths = [4, 4, 6, 6]
    of_steps = [number for number, length in enumerate(lengths) for _ in range(length)]
    share = [(at * 20 // programs, (at + 1) * 20 // programs) for at in range(programs)]
    sharing = [number for begin, end in share for number in set(of_steps[begin:end])]
    most = max(sharing.count(number) for number in range(4))
    assert even_shares(2, [4, 6], programs) == (programs, most, True)


@pytest.mark.interpret
def test_which_gradients_of_filters_are_shared_evenly(monkeypatch):
    """Where sums differ in length, or are a wave of programs and a bit; not where they fill one."""
    weights = conv_tma.weight_kernels
    config = weights.CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2][0]
    of_taps = [each * 4 for each in (36, 42, 36, 42, 49, 42, 36, 42, 36)]
    filters = 512 * 512 * 9
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.SHARES", True)
    assert weights.shares(config, 8, of_taps, 1, filters) == (132, 3, True)
    assert weights.shares(config, 12, [49 * 4] * 11, 1, filters) == (132, 1, False)
    # two groups have half of the multiprocessors each
    assert weights.shares(config, 8, of_taps, 2, filters)[0] == 66
    # the kernel must be able to count the steps of all programs
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.GAIN", float("inf"))
    for times, even in ((1000, True), (2000, False)):
        assert weights.shares(config, 8, [each * times for each in of_taps], 1, filters)[2] == even


@pytest.mark.interpret
@pytest.mark.parametrize(
    "name",
    [
        "3x3",
        "pairs",
        "odd-stride-2",
        "dilation",
        "groups-pairs",
        "split",
        "persistent",
        "persistent-pairs",
    ],
)
def test_float32_as_tf32(name, monkeypatch):
    """Right within TF32's rounding and not within float32's.  The gradient of the image reads
    another axis of the filters than the result does: of a copy.  That of the filters is a sum over
    pixels, which do not lie along memory, and portable.
    """
    case = CASES[name]._replace(dtype=torch.float32)
    monkeypatch.setattr(implicit_gemm, "_MIN_PIXELS", 0)
    if case.persistent:
        monkeypatch.setattr(matmul_tma.kernels, "MULTIPROCESSORS", 1)
        monkeypatch.setattr("tritorch.kernels.conv_tma.SHARED_MEMORY", 0)
    x, w, bias, grad = case.make()
    given = {"input": x, "weight": w, "bias": bias}
    given |= dict(zip(("stride", "padding", "dilation", "groups"), case.geometry(), strict=True))
    spec = next(spec for spec in specs() if spec.name == "conv2d")
    with (
        products.allowing_tf32(),
        tiles(case) as names,
        interpreter.corrected(tf32=True),
        detecting() as detector,
    ):
        within, beyond = (
            dict(cases.verdicts(spec, given, grad.to, unit_in=unit)) for unit in (2**-11, 0.0)
        )
    assert detector.findings == []
    assert [names.count(kernel) for kernel in (FORWARD, PORTABLE, WEIGHT)] == [4, 0, 0]
    assert names.count("conv2d_grad_weight_kernel") == 2
    assert [what for what, verdict in within.items() if not verdict.accepted] == []
    wrong = {what for what, verdict in beyond.items() if not verdict.accepted}
    assert {"output 0", "gradient of input"} <= wrong


@pytest.mark.interpret
@pytest.mark.parametrize(("fewest", "kernel"), [(60, FORWARD), (61, PORTABLE)])
def test_filters_of_float32_are_copied_for_many_pixels_alone(fewest, kernel, monkeypatch):
    case = CASES["3x3"]._replace(dtype=torch.float32)
    _, w, _, grad = case.make()
    monkeypatch.setattr(implicit_gemm, "_MIN_PIXELS", fewest)
    with products.allowing_tf32(), tiles(case) as names:
        y = ops.conv_transpose2d(grad, w, padding=1)
    assert names[0] == kernel
    exact = F.conv_transpose2d(grad.double(), w.double(), padding=1)
    # the interpreter keeps all bits unless asked
    assert (y.double() - exact).abs().max() <= 2**-20 * exact.abs().max()


# sums in one piece, whose tiles end past every axis but that of the channels read
ENDS = CASES["3x3"]._replace(input=(4, 16, 3, 5), weight=(24, 16, 3, 3))


@pytest.mark.interpret
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", ["ends", "bfloat16", "pairs", "groups", "split", "persistent"])
def test_a_residual(name, activation):
    """What is persistent takes it too, where its tiles are stored whole."""
    case = {"ends": ENDS, **CASES}[name]
    *operands, grad = case.make()
    # of the size of the sums, which an activation that computes would not let differ by more
    operands[1] /= case.weight[1] ** 0.5 * 3
    residual = grad.flip(0).contiguous(memory_format=last)

    def ours(x, w, bias, residual):
        return ops.conv2d(x, w, bias, *case.geometry(), activation, residual=residual)

    def exact(x, w, bias, residual):
        y = F.conv2d(x, w, bias, *case.geometry()) + residual
        return y if activation is None else getattr(F, activation)(y)

    with tiles(case) as names, detecting() as detector:
        found = gradients(ours, [*operands, residual], grad)
    assert detector.findings == []
    assert names[0] == FORWARD
    assert (names[1] == "split_sum_kernel") == (name == "split")
    assert PORTABLE not in names
    expected = gradients(exact, [o.double() for o in (*operands, residual)], grad.double())
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other).abs().max()
        # what is kept for the gradient is rounded too
        assert error <= 3 * torch.finfo(case.dtype).eps * other.abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda residual: residual.contiguous(), ["reorder_kernel", FORWARD]),
        (lambda residual: torch.cat((residual, residual), 3)[..., ::2], [FORWARD]),
        (lambda residual: residual[:, :, :1, :1].expand_as(residual), [PORTABLE]),
        (lambda residual: torch.cat((residual, residual[:, :1]), 1)[:, :-1], [PORTABLE]),
    ],
    ids=["contiguous", "gaps", "expanded", "off-16-bytes"],
)
def test_residuals_in_other_orders(change, expected):
    """Copied where products outweigh it, described as it lies, or left to the portable kernel."""
    case = ENDS
    x, w, bias, residual = case.make()
    residual = change(residual)
    with tiles(case) as names, detecting() as detector:
        found = ops.conv2d(x, w, bias, *case.geometry(), "relu", residual=residual)
    assert detector.findings == []
    assert names == expected
    exact = (F.conv2d(x.double(), w.double(), bias.double(), padding=1) + residual.double()).relu()
    error = (found.double() - exact).abs().max()
    assert error <= torch.finfo(case.dtype).eps * exact.abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize("order", [last, torch.contiguous_format])
def test_few_channels_with_a_residual(order):
    case = STEMS["7x7"]
    x, w, bias, residual = case.make()
    x, w, residual = (t.contiguous(memory_format=order) for t in (x, w, residual))
    with tiles(case) as names, detecting() as detector:
        found = ops.conv2d(x, w, bias, *case.geometry(), "relu", residual=residual)
    assert detector.findings == []
    # the residual, and the result
    assert names.count("reorder_kernel") == (2 if order == torch.contiguous_format else 0)
    assert {"pack_pixels_kernel", FORWARD} <= set(names)
    exact = F.conv2d(x.double(), w.double(), bias.double(), *case.geometry()) + residual.double()
    error = (found.double() - exact.relu()).abs().max()
    assert error <= torch.finfo(case.dtype).eps * exact.abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize("stride", [1, 2, (1, 2)], ids=str)
@pytest.mark.parametrize("pixels", [(1, 4, 4), (1, 2, 4)], ids=str)
def test_a_tile_of_pixels_in_a_table_is_taken_where_it_fits(stride, pixels):
    """Two sizes of an image ask one question where only one of them has pairs of pixels."""
    image = (4, 16, 8, 8) if stride == 1 else (16, 16, 7, 7)
    case = Case(image, (16, 16, 3, 3), stride=stride, tile=(16, 16, 16))
    config = conv_tma.kernels._tile(*case.tile, 4, 2)
    config.kwargs |= dict(zip(("BLOCK_N", "BLOCK_P", "BLOCK_Q"), pixels, strict=True))
    x, w, _, _ = case.make()
    with tiles(case) as names, launch.override("conv2d_tma_config", config):
        found = case.run(x, w, None)
        blocks = _pixels_of_a_tile(x, w, found, stride)
    assert FORWARD in names
    assert (blocks == pixels) == (stride == 1 and pixels == (1, 4, 4))
    exact = case.reference(x.double(), w.double(), None)
    error = (found.double() - exact).abs().max()
    assert error <= torch.finfo(case.dtype).eps * exact.abs().max()


def _pixels_of_a_tile(x, w, y, stride):
    strides = (stride, stride) if isinstance(stride, int) else stride
    geometry = Geometry(strides, (1, 1), (1, 1), 1)
    plan = conv_tma.plan_convolve(*map(Layout.of, (x, w, y)), geometry, False, 132)
    return tuple(plan.constants[f"BLOCK_{axis}"] for axis in "NPQ")


STEMS = {
    "7x7": Case((16, 3, 4, 8), (16, 3, 7, 7), 2, 3, weight_tile=(16, 16, 16, 4)),
    "3x3-odd": Case((16, 3, 3, 9), (16, 3, 3, 3), 2, 1, activation="relu"),
    "even": Case((16, 4, 5, 8), (16, 4, 4, 5), 2, (2, 0)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("order", [last, torch.contiguous_format])
@pytest.mark.parametrize("name", STEMS)
def test_few_channels(name, order):
    """Packed pixels, of which none outside the image is anything but zero."""
    case = STEMS[name]
    x, *operands, grad = case.make()
    x = x.contiguous(memory_format=order)
    with tiles(case) as names, detecting() as detector:
        found = gradients(lambda *leaves: case.run(x, *leaves), operands, grad)
    assert detector.findings == []
    assert names.count("pack_pixels_kernel") == 2
    assert PORTABLE not in names
    exact = gradients(
        lambda *leaves: case.reference(x.double(), *leaves),
        [o.double() for o in operands],
        grad.double(),
    )
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).abs().max()
        assert error <= torch.finfo(case.dtype).eps * other.abs().max()


@pytest.mark.interpret
def test_values_before_the_activation():
    """Those that the gradient of an activation needs are stored by the same launch."""
    case = CASES["pairs"]._replace(stride=1, input=(1, 16, 4, 4), activation="silu")
    x, w, bias, grad = case.make()
    with tiles(case) as names:
        y, *found = gradients(case.run, (x, w, bias), grad)
    assert names.count(FORWARD) == 2

    def reference(*operands):
        return F.silu(F.conv2d(*operands, padding=1))

    exact = gradients(reference, [o.double() for o in (x, w, bias)], grad.double())
    for one, other in zip((y, *found), exact, strict=True):
        # the values before it are rounded too
        assert (one.double() - other).abs().max() <= 4e-3 * other.abs().max()


@pytest.mark.interpret
def test_second_gradients_and_their_repetition():
    case = CASES["bfloat16"]._replace(input=(1, 16, 4, 4))
    *operands, grad = case.make()

    def twice(run, operands, grad):
        leaves = [o.detach().clone().requires_grad_() for o in (*operands, grad)]
        y = run(*leaves[:-1])
        first = torch.autograd.grad(y, leaves[:2], leaves[-1], create_graph=True)
        return torch.autograd.grad(first, leaves[:2] + leaves[-1:], operands[:2])

    with tiles(case) as names:
        found, again = (twice(case.run, operands, grad) for _ in range(2))
    assert {FORWARD, WEIGHT} <= set(names)
    assert PORTABLE not in names
    exact = twice(case.reference, [o.double() for o in operands], grad.double())
    for one, same, other in zip(found, again, exact, strict=True):
        assert torch.equal(one, same)
        # sums of two rounded terms
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max()


@pytest.mark.interpret
def test_an_expanded_batch_and_filters_with_gaps():
    """Strides that no descriptor takes: the portable kernels do."""
    case = CASES["3x3"]._replace(input=(1, 16, 3, 4), weight=(16, 16, 3, 3), activation="relu")
    x, w, _, _ = case.make()
    x = x.expand(4, -1, -1, -1)
    w = torch.cat([w, w], 2).contiguous(memory_format=last)[:, :, ::2]
    with tiles(case) as names:
        y = case.run(x, w, None)
    assert names == [PORTABLE]
    other = case.reference(x.double(), w.double(), None)
    assert (y.double() - other).abs().max() <= torch.finfo(case.dtype).eps * other.abs().max()


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
    "-single-pixels": (empty(256, 256, 7, 7), {"padding": 1, "stride": 2}),
}


# bytes per element, and which of the entries of that size
ENTRIES = [*((2, entry) for entry in range(6)), *((4, entry) for entry in range(5))]
DTYPES = {2: torch.bfloat16, 4: torch.float32}
PRODUCT = {2: ".f32.bf16.bf16", 4: ".f32.tf32.tf32"}


@pytest.mark.compile
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_overlap_their_products(itemsize, entry, variant, monkeypatch):
    """From shared memory to the tensor cores without a stop: nothing is loaded by the threads, and
    no product is waited for before the next.
    """
    monkeypatch.setattr(implicit_gemm, "_MIN_PIXELS", 0)
    x, options = VARIANTS[variant]
    config, dtype = conv_tma.kernels.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
    w = empty(256, 256, 3, 3, dtype=dtype)
    with launch.override("conv2d_tma_config", config), products.allowing_tf32():
        kernels = compiled("sm_90", x.to(dtype), w, (True, False), **options)
    kernels = [kernel for kernel in kernels if kernel.kernel == FORWARD]
    check(kernels, 2)
    together = conv_tma.kernels.residents(config, itemsize)
    for kernel in kernels:
        assert PRODUCT[itemsize] in kernel.compiled.asm["ptx"]
        used = dry.resources(kernel)
        assert (used.shared + 1024) * together <= 228 * 1024
        assert used.registers * 32 * kernel.num_warps * together <= 65536


@pytest.mark.compile
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_residual(itemsize, entry, activation):
    """Or another takes their place; the loop over the taps is what it is without."""
    config, dtype = conv_tma.kernels.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
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


@pytest.mark.compile
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_bias_beside_gelu(itemsize, entry):
    config, dtype = conv_tma.kernels.CONV2D_TMA_CONFIGS[itemsize][entry], DTYPES[itemsize]
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


@pytest.mark.compile
@pytest.mark.parametrize("gain", [0.0, float("inf")], ids=["apart", "even"])
@pytest.mark.parametrize("entry", range(8))
def test_configurations_of_the_gradient_overlap_their_products(entry, gain, monkeypatch):
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.GAIN", gain)
    config = conv_tma.weight_kernels.CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2][entry]
    # a row of an image, or images
    batch, size = (1, 32) if config.kwargs["BLOCK_PIXELS"] == 16 else (64, 14)
    residents = conv_tma.weight_kernels.residents(config)
    x, taps = empty(batch, 256, size, size), 4 if config.kwargs["TAPS"] == 4 else 3
    with launch.override("conv2d_grad_weight_tma_config", config):
        kernels = compiled("sm_90", x, empty(256, 256, 3, taps), (False, True), padding=1)
    kernels = [kernel for kernel in kernels if kernel.kernel == WEIGHT]
    check(kernels, 1)
    assert kernels[0].constexprs["EVEN"] == (gain > 0 and conv_tma.weight_kernels.SHARES)
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


@pytest.mark.compile
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


def launched(target, *operands, **options):
    return {kernel.kernel for kernel in compiled(target, *operands, **options)}


@pytest.mark.compile
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


@pytest.mark.compile
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
        for each in conv_tma.kernels.CONV2D_TMA_CONFIGS[2]
        if each.kwargs["PERSISTENT"] and each.kwargs["BLOCK_K"] == 128
    ][:1]
    with launch.override("conv2d_tma_config", config):
        plan = conv_tma.plan_convolve(*layouts, geometry, True, count)
    (programs, _), tiles = plan.grid, plan.sizes[7]
    assert programs < tiles
    num_k = channels // 128
    for program in range(programs):
        residues = [tile // num_k % 4 for tile in range(program, tiles, programs)]
        counts = [residues.count(residue) for residue in range(4)]
        assert max(counts) - min(counts) <= num_k, (program, counts)


@pytest.mark.interpret
def test_few_channels_of_a_network_in_torchs_own_order():
    case = STEMS["7x7"]
    x, *operands, grad = (t.contiguous() for t in case.make())
    with tiles(case) as names, detecting() as detector:
        found = gradients(lambda *leaves: case.run(x, *leaves), operands, grad)
    assert detector.findings == []
    # the result, and the gradient of it
    assert names.count("reorder_kernel") == names.count("pack_pixels_kernel") == 2
    assert PORTABLE not in names
    assert found[0].is_contiguous()
    exact = gradients(
        lambda *leaves: case.reference(x.double(), *leaves),
        [o.double() for o in operands],
        grad.double(),
    )
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).abs().max()
        assert error <= torch.finfo(case.dtype).eps * other.abs().max()
