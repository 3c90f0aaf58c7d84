"""Statistics that a convolution tells batch normalisation: what they are, and what that costs."""

import contextlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tritorch import backend, hardware, launch, ops
from tritorch.ops import batch_norm_stats, conv_dispatch, conv_tma, matmul_tma
from tritorch.ops.geometry import Geometry
from tritorch.testing import dry, products
from tritorch.testing.detectors import detecting

last = torch.channels_last
CONVOLVE, MULTIPLY, STATS = "conv2d_tma_kernel", "matmul_tma_kernel", "batch_norm_stats_kernel"


class Case(NamedTuple):
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int | tuple[int, int] = 0
    groups: int = 1
    # of the convolution, or of the product and its form
    tile: tuple[int, int, int] = (16, 16, 16)
    form: str | None = None
    persistent: bool = False
    halves: int = 1
    dtype: torch.dtype = torch.float16
    # what every value of the image is moved by
    offset: float = 0.0
    order: torch.memory_format = last

    def make(self):
        generator = torch.Generator().manual_seed(5)

        def made(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = (made(*self.input) + self.offset).to(self.dtype).contiguous(memory_format=self.order)
        w = made(*self.weight) / self.weight[1] ** 0.5
        # of one sign, or an offset would be lost
        w = (w.abs() if self.offset else w).to(self.dtype).contiguous(memory_format=last)
        return x, w

    def given(self):
        names = ("stride", "padding", "groups")
        return {name: getattr(self, name) for name in names}

    @contextlib.contextmanager
    def running(self):
        """Through these tiles, in strict mode; the kernels launched."""
        convolve, multiply = conv_tma.configs, matmul_tma.configs
        form = self.form or "tile"
        with (
            hardware.pretend(90),
            launch.override("conv2d_tma_config", convolve._tile(*self.tile, 4, 2, self.persistent)),
            launch.override(
                "matmul_tma_config", multiply._tile(form, *self.tile, 4, 2, self.halves)
            ),
            backend.use("triton"),
            backend.strict(),
            launch.recorded() as names,
            pytest.MonkeyPatch.context() as patched,
        ):
            if self.form:
                patched.setattr(matmul_tma, "_MIN_PRODUCTS", 0)
            if self.persistent or self.form == "persistent":
                # programs have several tiles, which a convolution stores in halves
                patched.setattr(matmul_tma.configs, "MULTIPROCESSORS", 1)
                patched.setattr("tritorch.kernels.conv_tma_configs.SHARED_MEMORY", 0)
                patched.setattr(multiply, "residents", lambda *_: 2)
            yield names


CASES = {
    # several images in a tile; every axis has one that ends past it, the channels too
    "3x3": Case((7, 24, 3, 5), (24, 24, 3, 3), padding=1),
    "bfloat16": Case((2, 16, 4, 4), (32, 16, 3, 3), padding=1, dtype=torch.bfloat16),
    "offset": Case((15, 16, 3, 5), (24, 16, 3, 3), offset=30.0),
    "pairs": Case((3, 16, 6, 8), (16, 16, 3, 3), stride=2, padding=1),
    "odd-stride-2": Case((20, 16, 3, 5), (16, 16, 3, 3), stride=2, padding=1),
    "groups": Case((3, 32, 4, 3), (32, 16, 3, 3), padding=1, groups=2),
    "persistent": Case((5, 32, 4, 3), (40, 32, 3, 1), padding=(1, 0), persistent=True),
    "stem": Case((18, 3, 5, 9), (24, 3, 7, 7), stride=2, padding=3),
    "contiguous": Case((2, 16, 4, 5), (32, 16, 3, 3), padding=1, order=torch.contiguous_format),
    "1x1": Case((3, 24, 3, 5), (40, 24, 1, 1), tile=(32, 16, 16), form="tile"),
    "1x1-halves": Case(
        (3, 16, 4, 5), (40, 16, 1, 1), tile=(16, 32, 16), form="tile", halves=2, offset=100.0
    ),
    "1x1-persistent": Case((3, 40, 4, 5), (40, 40, 1, 1), tile=(16, 16, 16), form="persistent"),
    "1x1-stationary": Case((3, 16, 4, 5), (40, 16, 1, 1), tile=(16, 16, 16), form="stationary"),
    "1x1-stride-2": Case(
        (5, 24, 4, 6), (24, 24, 1, 1), stride=2, tile=(16, 16, 16), form="persistent"
    ),
    "float32": Case((7, 24, 3, 5), (24, 24, 3, 3), padding=1, dtype=torch.float32),
    "float32-persistent": Case(
        (5, 32, 4, 3), (40, 32, 3, 1), padding=(1, 0), persistent=True, dtype=torch.float32
    ),
    "float32-1x1": Case(
        (3, 24, 3, 5), (40, 24, 1, 1), tile=(16, 16, 16), form="persistent", dtype=torch.float32
    ),
}


def geometry(case):
    padding = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 2
    return Geometry((case.stride,) * 2, padding, (1, 1), case.groups)


def moments_of(values):
    """Mean and biased variance of each channel in float64."""
    var, mean = torch.var_mean(values.double(), (0, 2, 3), correction=0)
    return mean, var


def assert_float32(found, mean, var):
    """Mean and variance; the latter of deviations from means that are float32 too."""
    deviation = var.sqrt()
    limits = 2**-22 * (mean.abs() + deviation), 2**-20 * var + 2**-21 * mean.abs() * deviation
    for one, exact, limit in zip(found, (mean, var), limits, strict=True):
        assert ((one.double() - exact).abs() <= limit).all()


def merged(moments):
    """The same of all parts."""
    means, squares, counts = moments.double().unbind(1)
    mean = (counts * means).sum(0) / counts.sum(0)
    return mean, (squares + counts * (means - mean) ** 2).sum(0) / counts.sum(0)


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_the_stored_values(name):
    """Of every pixel once and of nothing past the image, to float32's accuracy."""
    case = CASES[name]
    x, w = case.make()
    with products.allowing_tf32(), case.running() as names, detecting() as detector:
        expected = ops.conv2d(x, w, None, **case.given())
        y = torch.full_like(expected, torch.nan)
        moments = conv_dispatch.convolve_with_moments(x, w, y, geometry(case))
    assert detector.findings == []
    assert names.count(MULTIPLY if case.form else CONVOLVE) == 2
    assert torch.equal(y, expected)
    assert moments.shape[1:] == (3, y.shape[1])
    counts = moments[:, 2]
    assert (counts.sum(0) == y.numel() // y.shape[1]).all()
    assert (counts > 0).all()
    assert_float32(merged(moments), *moments_of(y))


def arguments(case):
    torch.manual_seed(1)
    channels = case.weight[0]
    names = ("running_mean", "running_var", "norm_weight", "norm_bias")
    return {name: torch.rand(channels).add_(0.5) for name in names}


def composition(x, w, running_mean, running_var, norm_weight, norm_bias, case, **given):
    y = ops.conv2d(x, w, None, **case.given())
    return ops.batch_norm(y, running_mean, running_var, norm_weight, norm_bias, **given)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["3x3", "stem", "1x1", "1x1-stride-2"])
def test_it_is_the_composition_of_both(name):
    """Output, gradients and running statistics; of the four kernels one is not launched."""
    case, results = CASES[name], []
    x, w = case.make()
    for op in (ops.conv2d_batch_norm, composition):
        given = arguments(case)
        learned = [x.clone(), w.clone(), given["norm_weight"], given["norm_bias"]]
        leaves = [leaf.requires_grad_() for leaf in learned]
        more = {"training": True, "momentum": 0.3, "activation": "silu"}
        more |= {"case": case} if op is composition else case.given()
        with case.running() as names:
            y = op(*leaves[:2], given["running_mean"], given["running_var"], *leaves[2:], **more)
            grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            gradients = torch.autograd.grad(y, leaves, grad)
        assert (STATS in names) == (op is composition)
        results.append((y, *gradients, given["running_mean"], given["running_var"]))
    for one, two in zip(*results, strict=True):
        # the statistics are summed in another order, which may round a result otherwise
        limit = torch.finfo(one.dtype).eps * (8 if one.dtype == torch.float32 else 1)
        assert (one.double() - two.double()).abs().max() <= limit * two.abs().max()


@pytest.mark.interpret
def test_running_statistics_move_once():
    case = CASES["3x3"]
    x, w = case.make()
    given = arguments(case)
    kept = {name: value.clone() for name, value in given.items()}
    before = given["running_mean"]._version
    with case.running():
        y = ops.conv2d(x, w, None, **case.given())
        ops.conv2d_batch_norm(x, w, **given, **case.given(), training=True, momentum=0.25)
    assert given["running_mean"]._version == before + 1
    mean, var = moments_of(y)
    count = y.numel() // y.shape[1]
    for name, value in (("running_mean", mean), ("running_var", var * count / (count - 1))):
        expected = 0.75 * kept[name].double() + 0.25 * value
        assert ((given[name].double() - expected).abs() <= 2**-22 * (expected.abs() + 1)).all()


SMALL = CASES["1x1"]._replace(input=(2, 16, 2, 2), weight=(16, 16, 1, 1))
SECOND = {
    "1x1": (SMALL, "xwsbr", "silu"),
    "3x3": (CASES["3x3"], "xwsb", None),
    "frozen-filters": (SMALL, "xs", None),
    "images": (SMALL, "wb", "silu"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", SECOND)
def test_second_gradients(name):
    """Through the convolution inside of the node, whichever of its operands want any."""
    case, wanted, activation = SECOND[name]
    x, w = case.make()
    given = arguments(case)
    vectors = given["norm_weight"], given["norm_bias"]
    residual = torch.randn_like(F.conv2d(x.double(), w.double(), **case.given()))
    values = dict(zip("xwsbr", (x, w, *vectors, residual), strict=True))

    def twice(op, dtype):
        wide = dtype if dtype == torch.float64 else torch.float32
        made = {key: value.to(wide if key in "sb" else dtype) for key, value in values.items()}
        leaves = [made[key].requires_grad_() for key in wanted]
        if "r" not in wanted:
            made["r"] = None
        y = op(**made)
        grad = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        first = torch.autograd.grad(y, leaves, grad, create_graph=True)
        # in the sum over all of it the gradients of shift and residual would have none
        total = sum(one.square().sum() for one in first)
        return torch.autograd.grad(total, leaves, allow_unused=True)

    def fused(x, w, s, b, r):
        more = {"training": True, "activation": activation, "residual": r}
        return ops.conv2d_batch_norm(x, w, None, None, s, b, **case.given(), **more)

    def reference(x, w, s, b, r):
        y = F.batch_norm(F.conv2d(x, w, **case.given()), None, None, s, b, True)
        y = y if r is None else y + r
        return y if activation is None else F.silu(y)

    with case.running() as names:
        found = twice(fused, torch.float16)
    assert STATS not in names
    for one, two in zip(found, twice(reference, torch.float64), strict=True):
        if one is None or two is None:
            assert one is None or not one.any()
            assert two is None or not two.any()
            continue
        # of several rounded factors
        assert (one.double() - two).abs().max() <= 2**-6 * two.abs().max()


@pytest.mark.interpret
def test_it_is_one_node():
    """Nothing of the graph is kept between the two."""
    case = CASES["1x1"]
    x, w = (value.requires_grad_() for value in case.make())
    given = arguments(case)
    with case.running():
        y = ops.conv2d_batch_norm(x, w, **given, training=True, **case.given())
    nodes = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert [node.variable is leaf for node, leaf in zip(nodes, (x, w), strict=True)] == [True] * 2


@pytest.mark.interpret
@pytest.mark.parametrize("why", ["float32", "split", "portable", "depthwise", "evaluation"])
def test_others_are_followed_by_the_ordinary_kernels(why):
    """What no tile is written by alone, or what no statistics are wanted of."""
    case = {
        "float32": CASES["3x3"]._replace(dtype=torch.float32),
        "split": Case((1, 144, 4, 4), (16, 144, 3, 1), padding=(1, 0)),
        "portable": CASES["3x3"],
        "depthwise": Case((1, 8, 3, 3), (8, 1, 3, 3), padding=1, groups=8),
        "evaluation": CASES["3x3"],
    }[why]
    x, w = case.make()
    training, capability = why != "evaluation", 80 if why == "portable" else 90
    results = []
    for op in (ops.conv2d_batch_norm, composition):
        given = arguments(case)
        more = {"case": case} if op is composition else case.given()
        with case.running() as names, hardware.pretend(capability):
            y = op(x, w, **given, training=training, **more)
        results.append((y, given["running_mean"], given["running_var"], tuple(names)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    assert (STATS in results[0][-1]) == training


@pytest.mark.interpret
@pytest.mark.parametrize("parts", [513, 700, 16500])
def test_many_parts_are_merged_in_groups(parts, device):
    torch.manual_seed(0)
    moments = torch.rand(parts, 3, 20).to(device)
    moments[:, 0] += 100
    moments[:, 2] = torch.randint(1, 128, (parts, 1))
    with backend.use("triton"), launch.recorded() as names:
        mean, var = batch_norm_stats.batch_norm_gather_stats(moments, None, None, 0.1)
    assert names == ["batch_norm_gather_stats_kernel"] * 2
    assert mean.dtype == var.dtype == torch.float32
    assert_float32((mean, var), *merged(moments))


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=last)


def compiled(x, w, **given):
    """What writes moments on an H100."""
    channels = torch.empty(w.shape[0])
    with backend.use("triton"), backend.strict(), dry.compiling_for("sm_90") as recorder:
        ops.conv2d_batch_norm(x, w, channels, channels, training=True, **given)
    assert STATS not in [kernel.kernel for kernel in recorder.kernels]
    return next(kernel for kernel in recorder.kernels if "moments_ptr" in kernel.pointers)


def check(kernel, residents):
    assert dry.problems(kernel, "sm_90") == []
    used = dry.resources(kernel)
    assert min(used.count("HGMMA"), used.count("UTMALDG"), used.count("UTMASTG")) > 0
    assert used.count("LDL", "STL") == 0
    assert (used.shared + 1024) * residents <= 228 * 1024
    assert used.registers * 32 * kernel.num_warps * residents <= 65536
    return used


# every entry in every direction
VARIANTS = {
    "": (empty(64, 256, 14, 14), {"padding": 1}),
    "-pairs": (empty(64, 256, 28, 28), {"padding": 1, "stride": 2}),
    # enough of them that no sum is split
    "-single-pixels": (empty(2048, 256, 7, 7), {"padding": 1, "stride": 2}),
}


DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.mark.compile
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("itemsize", "entry"),
    [*((2, entry) for entry in range(10)), *((4, entry) for entry in range(7))],
)
def test_convolutions_write_moments_beside_their_products(itemsize, entry, variant):
    """Without a spill, without a product that is waited for before the next, and with as many
    programs on a multiprocessor as without moments.
    """
    x, given = VARIANTS[variant]
    config = conv_tma.configs.CONV2D_TMA_CONFIGS[itemsize][entry]
    x, w = (t.to(DTYPES[itemsize]) for t in (x, empty(256, 256, 3, 3)))
    with launch.override("conv2d_tma_config", config), products.allowing_tf32():
        kernel = compiled(x, w, **given)
    assert kernel.kernel == CONVOLVE
    assert kernel.constexprs["PERSISTENT"] == config.kwargs["PERSISTENT"]
    assert not check(kernel, conv_tma.configs.residents(config, itemsize)).serialized


@pytest.mark.compile
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("itemsize", "entry"),
    [*((2, entry) for entry in range(23)), *((4, entry) for entry in range(17))],
)
def test_products_write_moments_beside_the_next(itemsize, entry, stride):
    """The same; instead of an entry that has no room for them the kernel runs another one."""
    config = matmul_tma.configs.MATMUL_TMA_CONFIGS[itemsize][entry]
    stationary = config.kwargs["FORM"] == "stationary"
    k = config.kwargs["BLOCK_K"] if stationary else 512
    x, w = (t.to(DTYPES[itemsize]) for t in (empty(256, k, 14, 14), empty(512, k, 1, 1)))
    with launch.override("matmul_tma_config", config), products.allowing_tf32():
        kernel = compiled(x, w, stride=stride)
    assert kernel.kernel == MULTIPLY
    own = matmul_tma.configs.for_moments(config, itemsize)
    assert kernel.constexprs["FORM"] == config.kwargs["FORM"]
    assert kernel.constexprs["BLOCK_M"] == own.kwargs["BLOCK_M"]
    used = check(kernel, matmul_tma.configs.residents(own, itemsize))
    # one slice has nothing to overlap with
    assert stationary or not used.serialized
