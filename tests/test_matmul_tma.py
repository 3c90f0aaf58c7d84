"""Matrix products on Hopper: which take descriptors, what they compute, what they compile to."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from tritorch import backend, hardware, launch, ops, tuned
from tritorch.bench import machine_code
from tritorch.ops import implicit_gemm, matmul_function, matmul_tma
from tritorch.ops.strided import Layout
from tritorch.registry import Maker, specs
from tritorch.testing import cases, dry, interpreter, products
from tritorch.testing.detectors import detecting

kernels = matmul_tma.kernels
last = torch.channels_last
KERNEL, SUM, PARTS = "matmul_tma_kernel", "matmul_tma_sum_kernel", "matmul_tma_parts_kernel"


@contextlib.contextmanager
def taking(config):
    """Where tiles may be shared, a configuration of that form; elsewhere one of any other."""
    even = config.kwargs["FORM"] == "even"
    blocks = [config.kwargs[f"BLOCK_{axis}"] for axis in "MNK"]
    alike = [
        entry
        for table in kernels.MATMUL_TMA_CONFIGS.values()
        for entry in table
        if entry.kwargs["FORM"] == "tile"
        and [entry.kwargs[f"BLOCK_{axis}"] for axis in "MNK"] == blocks
    ]
    other = (*alike, kernels.MATMUL_TMA_CONFIGS[2][1])[0] if even else config
    with (
        launch.override("matmul_tma_even_config", config if even else None),
        launch.override("matmul_tma_config", other),
    ):
        yield


@contextlib.contextmanager
def tiles(form, *blocks, halves=2):
    """Everything on descriptors through this tile, in strict mode; the kernels launched."""
    config = kernels._tile(form, *blocks, 4, 2, halves)
    with (
        hardware.pretend(90),
        taking(config),
        backend.use("triton"),
        backend.strict(),
        launch.recorded() as names,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(matmul_tma, "_MIN_PRODUCTS", 0)
        # few programs, so that one has several tiles
        chosen = matmul_tma.processors
        patched.setattr(matmul_tma, "processors", lambda *given: min(1, chosen(*given)))
        patched.setattr(kernels, "sums_pay", lambda *_: True)
        if form == "even":
            patched.setattr(kernels, "MULTIPROCESSORS", 1)
            patched.setattr(matmul_tma.compiler, "SHARES", True)
            # no more than there are slices
            patched.setattr(matmul_tma, "_sharing", lambda *_: 3)
            patched.setattr(matmul_tma, "_COLUMNS", 8)
        yield names


@pytest.fixture(autouse=True)
def hopper(request, device):
    """On a GPU the kernels are chosen by what it is, and no interpreter pretends."""
    if device == "cuda" and request.node.get_closest_marker("interpret"):
        major, minor = torch.cuda.get_device_capability()
        if major != 9:
            pytest.skip(f"kernels for compute capability 9, this GPU has {major}.{minor}")


@contextlib.contextmanager
def watched(device):
    """Every access, where it can be seen."""
    if device == "cuda":
        yield
        return
    with detecting() as detector:
        yield
    assert detector.findings == []


def made(device, *shape, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return values.contiguous(memory_format=last) if len(shape) == 4 else values


def assert_close(found, exact, terms=1):
    """Sums are kept in float32: what is lost is the rounding of each of the terms."""
    assert found.isfinite().all()
    limit = terms * torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= limit


def along(matrix, columns):
    """The same values with the other axis along memory."""
    return matrix.mT.contiguous().mT if columns else matrix


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["tile", "persistent", "even"])
@pytest.mark.parametrize("layouts", ["NN", "NT", "TN", "TT"])
def test_operands_of_either_order(form, layouts, device):
    a, b = made(device, 2, 40, 40), made(device, 2, 40, 24)
    a, b = (along(x, order == "T") for x, order in zip((a, b), layouts, strict=True))
    with tiles(form, 32, 16, 32) as names, watched(device):
        y = ops.matmul(a, b)
    assert names == ([KERNEL, PARTS] if form == "even" else [KERNEL])
    assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
@pytest.mark.parametrize("programs", [1, 2, 5, 8, 13, 21, 40])
def test_programs_that_share_tiles(programs, device):
    """Of eight tiles of five slices: shares of several tiles, of one each, and of one slice."""
    a, b = made(device, 56, 80), made(device, 80, 24)
    with (
        tiles("even", 16, 16, 16, halves=1) as names,
        watched(device),
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(matmul_tma, "_sharing", lambda *_: programs)
        y = ops.matmul(a, b)
    assert names == [KERNEL, PARTS]
    assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
def test_tiles_are_shared_where_there_is_a_slice_for_each_program(device):
    for k, rows, shares in ((80, 56, True), (80, 24, False), (80, 8, False)):
        a, b = made(device, rows, k), made(device, k, 40)
        with tiles("even", 16, 16, 16) as names, pytest.MonkeyPatch.context() as patched:
            patched.setattr(matmul_tma, "_sharing", lambda *_: 31)
            y = ops.matmul(a, b)
        assert (PARTS in names) == shares
        assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
@pytest.mark.parametrize("halves", [1, 2])
def test_one_program_of_many_tiles(halves, device):
    """Of three slices each, of which a tile keeps its own place while the next one is loaded."""
    a, b = made(device, 104, 80, dtype=torch.bfloat16), made(device, 80, 56, dtype=torch.bfloat16)
    with tiles("persistent", 16, 16, 32, halves=halves) as names, pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, "residents", lambda *_: 2)
        y = ops.matmul(a, b)
    assert names == [KERNEL]
    assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
@pytest.mark.parametrize("k", [24, 32])
def test_one_tile_of_b_for_all_of_a(k, device):
    a, b = made(device, 104, k), made(device, k, 24)
    with tiles("stationary", 16, 16, 32) as names, pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "residents", lambda *_: 3)
        y = ops.matmul(a, b)
    assert names == [KERNEL]
    assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
def test_a_tile_of_b_is_kept_for_short_sums_alone(device):
    """Of a longer sum, or of a batch of its own, it is another tile with every step."""
    for a, b in (
        (made(device, 40, 64), made(device, 64, 24)),
        (made(device, 2, 40, 32), made(device, 2, 32, 24)),
    ):
        with tiles("stationary", 16, 16, 32) as names:
            y = ops.matmul(a, b)
        assert names == ["matmul_kernel"]
        assert_close(y, a.double() @ b.double())


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "size", [(40, 24, 40), (8, 48, 40), (8, 48, 528)], ids=["rows", "few-rows", "split"]
)
def test_linear_and_its_gradients(activation, size, device):
    """With bias and activation, and the values before it where the gradient needs them."""
    m, n, k = size
    operands = made(device, m, k), made(device, n, k) / k**0.5, made(device, n)
    with tiles("tile", 32, 16, 32) as names, watched(device):
        found = gradients(lambda *o: ops.linear(*o, activation), operands)
    assert names.count(KERNEL) == 3
    assert ("split_sum_kernel" in names) == (k == 528)
    function = getattr(F, activation)
    exact = gradients(lambda *o: function(F.linear(*o)), [o.double() for o in operands])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=4)


@pytest.mark.interpret
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("form", "halves", "size"),
    [
        ("tile", 1, (40, 24, 40)),
        ("tile", 2, (40, 24, 40)),
        ("persistent", 2, (40, 24, 40)),
        ("even", 2, (40, 24, 40)),
        ("stationary", 1, (40, 24, 24)),
        ("tile", 2, (8, 48, 40)),
        ("tile", 2, (8, 48, 528)),
    ],
    ids=["tile", "halves", "persistent", "even", "stationary", "few-rows", "split"],
)
def test_linear_with_a_residual(form, halves, size, activation, device):
    m, n, k = size
    operands = made(device, m, k), made(device, n, k) / k**0.5, made(device, n), made(device, m, n)
    with tiles(form, 32, 16, 32, halves=halves) as names, watched(device):
        found = gradients(with_residual(ops.linear, activation=activation), operands)
    # a gradient has longer sums than the one slice that is stationary
    assert names[0] == KERNEL
    assert names.count(KERNEL) == 3 or form == "stationary"
    assert ("split_sum_kernel" in names) == (k == 528)
    # the weight's gradient is a product with the bias's
    assert names.count(PARTS) == (2 if form == "even" else 0)
    exact = gradients(with_residual(F.linear, activation), [o.double() for o in operands])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=4)


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(40, 48, 72), (528, 40, 48)], ids=["tiles", "split"])
@pytest.mark.parametrize("columns", [False, True])
def test_gradients_of_weight_and_bias_in_one_product(size, columns, device):
    """Tiles past the first column, and rows past the last whole tile, add nothing to the sums."""
    m, n, k = size
    x, w, bias = made(device, m, k), made(device, n, k), made(device, n)
    grad = along(made(device, m, n, seed=1), columns)
    leaves = [each.requires_grad_() for each in (w, bias)]
    with tiles("tile", 32, 16, 32) as names, watched(device):
        y = ops.linear(x, *leaves)
        del names[:]
        found = torch.autograd.grad(y, leaves, grad)
    # partial sums of the weight, and those of the bias
    assert names == [KERNEL] + (["split_sum_kernel"] * 2 if m == 528 else [])
    grad = grad.double()
    for one, exact in zip(found, (grad.mT @ x.double(), grad.sum(0)), strict=True):
        assert_close(one, exact)


@pytest.mark.interpret
def test_a_gradient_of_few_rows_is_summed_apart(device):
    """Its product is the transposed one, whose first operand is another."""
    x, w, bias = made(device, 40, 48), made(device, 24, 48), made(device, 24)
    with tiles("tile", 32, 16, 32) as names:
        found = gradients(ops.linear, (x, w, bias))
    assert "channel_sum_kernel" in names
    exact = gradients(F.linear, [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)


@pytest.mark.interpret
def test_float32_is_summed_apart(device):
    """TF32 would truncate what is summed up."""
    x, w, bias = (made(device, *shape).float() for shape in ((40, 72), (48, 72), (48,)))
    grad = along(made(device, 40, 48, seed=1).float(), True)
    with products.allowing_tf32(), tiles("tile", 32, 16, 32) as names:
        y = ops.linear(along(x, True), w.requires_grad_(), bias.requires_grad_())
        del names[:]
        _, of_bias = torch.autograd.grad(y, (w, bias), grad)
    # of operands along the inner axis the product itself is TF32's
    assert {KERNEL, "channel_sum_kernel"} <= set(names)
    assert_close(of_bias, grad.double().sum(0))


@pytest.mark.interpret
def test_second_gradients_of_a_linear_layer(device):
    """Of both gradients at once, and of either alone."""
    operands = made(device, 40, 56), made(device, 48, 56) / 7, made(device, 48)
    grad = made(device, 40, 48, seed=1)
    seeds = [made(device, *each.shape, seed=2) for each in operands]

    def twice(run, wanted, operands, grad, seeds):
        leaves = [each.detach().clone().requires_grad_() for each in (*operands, grad)]
        first = torch.autograd.grad(run(*leaves[:3]), leaves[:3], leaves[3], create_graph=True)
        chosen = [first[index] for index in wanted], [seeds[index] for index in wanted]
        return torch.autograd.grad(chosen[0], leaves[:1] + leaves[3:], chosen[1], allow_unused=True)

    for wanted in ((1, 2), (1,), (2,)):
        with tiles("tile", 32, 16, 32):
            found = twice(ops.linear, wanted, operands, grad, seeds)
        exact = twice(
            F.linear,
            wanted,
            [each.double() for each in operands],
            grad.double(),
            [each.double() for each in seeds],
        )
        for one, other in zip(found, exact, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                assert_close(one, other, terms=2)


def with_residual(op, activation=None, **options):
    """Ours, or torch's with the rest of it behind."""
    function = getattr(F, activation or "", lambda y: y)

    def run(*operands):
        *given, residual = operands
        if op.__module__.startswith("tritorch"):
            return op(*given, activation=activation, residual=residual, **options)
        return function(op(*given, **options) + residual)

    return run


@pytest.mark.interpret
def test_residuals_that_a_descriptor_takes_and_others(device):
    """Rows on 16 bytes, whatever their distance; others are added by the portable kernel."""
    operands = made(device, 40, 32), made(device, 24, 32) / 6, made(device, 24)
    exact = F.linear(*(o.double() for o in operands))
    wide = made(device, 40, 64)
    for residual, kernel in (
        (wide[:, 8:32], KERNEL),
        (wide[:, 1:25], "matmul_kernel"),
        (wide.T.contiguous().T[:, :24], "matmul_kernel"),
        (wide[:1, :24].expand(40, 24), "matmul_kernel"),
        (made(device, 40, 28)[:, :24], "matmul_kernel"),
    ):
        with tiles("tile", 32, 16, 32) as names, watched(device):
            found = ops.linear(*operands, residual=residual)
        assert names == [kernel]
        assert_close(found, exact + residual.double())


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(("size", "stride"), [((4, 5), 1), ((6, 4), 2)], ids=["1", "2"])
def test_pointwise_convolution_with_a_residual(form, size, stride, device):
    x, w, bias = made(device, 3, 24, *size), made(device, 40, 24, 1, 1) / 5, made(device, 40)
    residual = made(device, *F.conv2d(x.double(), w.double(), None, stride).shape)
    operands = x, w, bias, residual
    with tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(with_residual(ops.conv2d, "relu", stride=stride), operands)
    assert names.count(KERNEL) == 3
    exact = gradients(
        with_residual(F.conv2d, "relu", stride=stride), [o.double() for o in operands]
    )
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, terms=2)
    assert found[0].is_contiguous(memory_format=last)


@pytest.mark.interpret
def test_a_split_pointwise_convolution_with_a_residual(device):
    x, w, residual = (
        made(device, 2, 528, 2, 2),
        made(device, 24, 528, 1, 1),
        made(device, 2, 24, 2, 2),
    )
    with tiles("tile", 32, 16, 32) as names, watched(device):
        found = ops.conv2d(x, w / 23, activation="relu", residual=residual)
    assert names == [KERNEL, "split_sum_kernel"]
    exact = (F.conv2d(x.double(), (w / 23).double()) + residual.double()).relu()
    assert_close(found, exact)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("form", "size", "epilogue"),
    [
        ("tile", (40, 24, 40), "plain"),
        ("persistent", (40, 24, 40), "plain"),
        ("stationary", (40, 24, 24), "plain"),
        ("tile", (8, 48, 40), "plain"),
        ("tile", (8, 48, 528), "all"),
        ("persistent", (40, 24, 40), "all"),
        ("even", (40, 24, 40), "all"),
    ],
    ids=["tile", "persistent", "stationary", "few-rows", "split", "epilogue", "even"],
)
def test_float32_as_tf32(form, size, epilogue, device):
    """Right within TF32's rounding and not within float32's; the gradients of a product whose
    factors lie along the inner axis are products of factors that do not.
    """
    m, n, k = size
    make = Maker(torch.float32, device, "tf32")
    given = {"input": make(m, k), "weight": make(n, k)}
    if epilogue == "all":
        given |= {"bias": make(n), "residual": make(m, n)}
    # the interpreter drops the bits that a tensor core does not read
    short = interpreter.corrected(tf32=True) if device == "cpu" else contextlib.nullcontext()
    grad = cases.random_gradient("tf32")
    blocks = 32, 16, 32 if form == "stationary" else 16
    with products.allowing_tf32(), short, tiles(form, *blocks) as names, watched(device):
        within, beyond = (
            dict(cases.verdicts(LINEAR, given, grad, unit_in=unit)) for unit in (2**-11, 0.0)
        )
    assert names.count(KERNEL) == 2
    assert names.count("matmul_kernel") == 4
    assert ("split_sum_kernel" in names) == (k == 528)
    assert [what for what, verdict in within.items() if not verdict.accepted] == []
    assert not beyond["output 0"].accepted


LINEAR = next(spec for spec in specs() if spec.name == "linear")


@pytest.mark.interpret
@pytest.mark.parametrize("layouts", ["NN", "NT", "TN", "TT"])
def test_tf32_of_factors_along_the_inner_axis_alone(layouts, device):
    """wgmma does not transpose float32; and without TF32 there is no wgmma of it at all."""
    a, b = made(device, 2, 40, 40, dtype=torch.float32), made(device, 2, 40, 24).float()
    a, b = (along(x, order == "T") for x, order in zip((a, b), layouts, strict=True))
    with tiles("tile", 32, 16, 16) as names:
        y = ops.matmul(a, b)
        with products.allowing_tf32():
            short = ops.matmul(a, b)
    assert names == ["matmul_kernel", KERNEL if layouts == "NT" else "matmul_kernel"]
    for found in (y, short):
        # the interpreter keeps all bits unless asked
        limit = 40 * (2**-10 if device == "cuda" and found is short else 2**-22)
        assert (found.double() - a.double() @ b.double()).abs().max() <= limit


@pytest.mark.interpret
@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrices", "batches"])
@pytest.mark.parametrize("layouts", ["NN", "TN", "TT"])
def test_factors_of_float32_are_turned_for_many_products(layouts, batch, device, monkeypatch):
    monkeypatch.setattr(matmul_function, "_MIN_PRODUCTS", 0)
    a, b = (made(device, *batch, *size, dtype=torch.float32) for size in ((40, 56), (56, 24)))
    a, b = (along(x, order == "T") for x, order in zip((a, b), layouts, strict=True))
    with tiles("tile", 32, 16, 16) as names, products.allowing_tf32(), watched(device):
        y = ops.matmul(a, b)
    copies = {"NN": 1, "TN": 2, "TT": 1}[layouts]
    assert names == ["reorder_kernel"] * copies + [KERNEL]
    limit = 56 * (2**-10 if device == "cuda" else 2**-22)
    assert (y.double() - a.double() @ b.double()).abs().max() <= limit


@pytest.mark.interpret
def test_a_factor_of_a_whole_batch_is_not_copied_for_each(device, monkeypatch):
    monkeypatch.setattr(matmul_function, "_MIN_PRODUCTS", 0)
    a, b = (made(device, *size, dtype=torch.float32) for size in ((2, 40, 56), (1, 56, 24)))
    with tiles("tile", 32, 16, 16) as names, products.allowing_tf32():
        y = ops.matmul(a, b)
    assert names == ["matmul_kernel"]
    limit = 56 * (2**-10 if device == "cuda" else 2**-22)
    assert (y.double() - a.double() @ b.double()).abs().max() <= limit


@pytest.mark.compile
def test_all_products_of_a_large_linear_layer_of_float32_are_wgmmas():
    """The gradient of the input takes a copy of the weight, that of the weight two."""
    for rows, turned in ((4096, 3), (512, 0)):
        x, w = (torch.empty(size, 1024, requires_grad=True) for size in (rows, 2048))
        with (
            products.allowing_tf32(),
            backend.use("triton"),
            backend.strict(),
            dry.compiling_for("sm_90") as recorder,
        ):
            y = ops.linear(x, w)
            y.backward(torch.empty_like(y))
        names = [found.kernel for found in recorder.launches]
        assert names.count("reorder_kernel") == turned
        assert names.count(KERNEL) == (3 if turned else 1)


def gradients(run, operands):
    leaves = [o.detach().clone().requires_grad_() for o in operands]
    y = run(*leaves)
    grad = made(y.device, *y.shape, seed=1).to(y.dtype)
    return (y, *torch.autograd.grad(y, leaves, grad))


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(
    ("size", "stride"), [((4, 5), 1), ((6, 4), 2), ((4, 5), 2)], ids=["1", "2", "2-odd"]
)
def test_pointwise_convolution_and_its_gradients(form, size, stride, device):
    x, w, bias = made(device, 3, 24, *size), made(device, 40, 24, 1, 1), made(device, 40)
    with tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(lambda *o: ops.conv2d(*o, stride), (x, w, bias))
    assert [name for name in names if name != "channel_sum_kernel"] == [KERNEL] * 3
    exact = gradients(lambda *o: F.conv2d(*o, stride), [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)
    assert found[0].is_contiguous(memory_format=last)
    assert found[1].is_contiguous(memory_format=last)


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["tile", "persistent"])
@pytest.mark.parametrize(
    ("size", "stride"), [((4, 5), 1), ((6, 4), 2), ((4, 5), 2)], ids=["1", "2", "2-odd"]
)
def test_pointwise_convolution_as_tf32(form, size, stride, device, monkeypatch):
    """The gradient of the image is a product with a copy of the filter, that of the filter a sum
    over pixels, which do not lie along memory.
    """
    monkeypatch.setattr(implicit_gemm, "_MIN_PIXELS", 0)
    x, w, bias = (
        made(device, *shape, dtype=torch.float32)
        for shape in ((3, 24, *size), (40, 24, 1, 1), (40,))
    )
    with products.allowing_tf32(), tiles(form, 32, 16, 16) as names, watched(device):
        found = gradients(lambda *o: ops.conv2d(*o, stride), (x, w, bias))
    assert names.count(KERNEL) == 2
    assert "conv2d_grad_weight_kernel" in names
    assert "conv2d_kernel" not in names
    exact = gradients(lambda *o: F.conv2d(*o, stride), [o.double() for o in (x, w, bias)])
    for one, other in zip(found, exact, strict=True):
        # the interpreter keeps all bits unless asked
        limit = 2**-9 if device == "cuda" else 2**-20
        assert (one.double() - other).abs().max() <= limit * other.abs().max()


@pytest.mark.interpret
def test_many_sums_of_a_filter_are_added_up_in_one_order(device):
    # more slices than all sums of nine have
    x, w = made(device, 5, 16, 16, 20), made(device, 72, 16, 1, 1)
    with tiles("tile", 64, 16, 16) as names:
        found, again = (gradients(ops.conv2d, (x, w)) for _ in range(2))
    assert names.count(SUM) == 2
    for one, same in zip(found, again, strict=True):
        assert torch.equal(one, same)
    exact = gradients(F.conv2d, (x.double(), w.double()))
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)


@pytest.mark.interpret
def test_second_gradients_of_a_pointwise_convolution(device):
    x, w, grad = made(device, 2, 16, 4, 3), made(device, 24, 16, 1, 1), made(device, 2, 24, 2, 2)

    def twice(run, *operands):
        leaves = [o.detach().clone().requires_grad_() for o in operands]
        y = run(*leaves[:2], None, 2)
        first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        return torch.autograd.grad(first, leaves, operands[:2])

    with tiles("tile", 16, 16, 16) as names:
        found = twice(ops.conv2d, x, w, grad)
    assert set(names) == {KERNEL}
    exact = twice(F.conv2d, x.double(), w.double(), grad.double())
    for one, other in zip(found, exact, strict=True):
        # sums of two rounded terms
        assert_close(one, other, terms=3)


@pytest.mark.interpret
def test_a_transposed_convolution_with_a_bias_has_it_everywhere(device):
    """Zeros between its pixels would be wrong."""
    x, w, bias = made(device, 2, 16, 2, 2), made(device, 16, 24, 1, 1), made(device, 24)
    options = {"stride": 2, "output_padding": 1}
    with tiles("tile", 16, 16, 16) as names:
        plain = ops.conv_transpose2d(x, w, None, **options)
        shifted = ops.conv_transpose2d(x, w, bias, **options)
    assert names[0] == KERNEL
    assert KERNEL not in names[1:]
    exact = F.conv_transpose2d(x.double(), w.double(), None, **options)
    assert_close(plain, exact)
    assert_close(shifted, exact + bias.double()[:, None, None])


def empty(*shape, dtype=torch.bfloat16):
    values = torch.empty(shape, dtype=dtype)
    return values.contiguous(memory_format=last) if len(shape) == 4 else values


# bytes per element, and which of the entries of that size
ENTRIES = [*((2, entry) for entry in range(24)), *((4, entry) for entry in range(19))]


def configuration(itemsize, entry):
    tables = kernels.MATMUL_TMA_CONFIGS, kernels.MATMUL_TMA_EVEN_CONFIGS
    return (*tables[0][itemsize], *tables[1][itemsize])[entry]


@pytest.mark.reference
def test_every_configuration_is_compiled_below():
    tables = kernels.MATMUL_TMA_CONFIGS, kernels.MATMUL_TMA_EVEN_CONFIGS
    for itemsize in (2, 4):
        number = sum(len(table[itemsize]) for table in tables)
        assert [entry for size, entry in ENTRIES if size == itemsize] == list(range(number))


@pytest.mark.compile
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_overlap_their_products(itemsize, entry):
    """From shared memory to the tensor cores without a stop: nothing is loaded by the threads, and
    no product is waited for before the next.
    """
    config, dtype = configuration(itemsize, entry), DTYPES[itemsize]
    stationary = config.kwargs["FORM"] == "stationary"
    k = config.kwargs["BLOCK_K"] if stationary else 512
    a, b = empty(9000, k, dtype=dtype), empty(k, 512, dtype=dtype)
    with taking(config), products.allowing_tf32():
        found = compiled(ops.matmul, a, along(b, True))
        if itemsize == 2:
            found += compiled(ops.matmul, along(a, True), b)
        # the epilogue that takes most registers
        bias = empty(512, dtype=dtype)
        found += compiled(ops.linear, a.requires_grad_(), along(b, True).mT, bias, "gelu")
    assert len(found) == (3 if itemsize == 2 else 2)
    for kernel in found:
        assert PRODUCT[itemsize] in kernel.compiled.asm["ptx"]
        assert kernel.kernel == KERNEL
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        # one slice has nothing to overlap with
        assert stationary or not used.serialized
        assert min(used.count("HGMMA"), used.count("UTMALDG"), used.count("UTMASTG")) > 0
        assert (used.shared + 1024) * kernels.residents(config, itemsize) <= 228 * 1024
    for kernel in found[:-1]:
        used = dry.resources(kernel)
        assert used.count("LDS", "LDSM", "LDG") == 0
        together = kernels.residents(config, itemsize)
        assert used.registers * 32 * kernel.num_warps * together <= 65536


DTYPES = {2: torch.bfloat16, 4: torch.float32}
PRODUCT = {2: ".f32.bf16.bf16", 4: ".f32.tf32.tf32"}


@pytest.mark.compile
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_residual(itemsize, entry):
    """Or another takes their place; the loop over the slices is what it is without."""
    config, dtype = configuration(itemsize, entry), DTYPES[itemsize]
    taken = kernels.for_residual(config, itemsize)
    stationary = config.kwargs["FORM"] == "stationary"
    k = config.kwargs["BLOCK_K"] if stationary else 512
    a, b, bias, residual = (
        empty(*shape, dtype=dtype) for shape in ((9000, k), (512, k), (512,), (9000, 512))
    )
    with taking(config), products.allowing_tf32():
        for activation in ("relu", "gelu"):
            found = compiled(ops.linear, a, b, bias, activation, residual=residual)
            # with the values before the activation
            a = a.detach().requires_grad_()
            found += compiled(ops.linear, a, b, bias, activation, residual=residual)
            assert len(found) > 1
            assert kernels.residents(taken, itemsize, True) >= 1
            for kernel in found:
                assert dry.problems(kernel, "sm_90") == []
                assert (kernel.num_stages, kernel.num_warps) == (taken.num_stages, taken.num_warps)
                used = dry.resources(kernel)
                together = kernels.residents(taken, itemsize, True)
                assert (used.shared + 1024) * together <= 228 * 1024
                # one slice has nothing to overlap with, and its loop is over whole tiles
                if not stationary:
                    assert not used.serialized
                    code = machine_code.read(used.code)
                    turn = [code[n] for n in machine_code.hot_loop(code).path]
                    assert {"shared load", "matrix load", "global load"}.isdisjoint(
                        machine_code.kinds(turn)
                    )


@pytest.mark.compile
@pytest.mark.parametrize("entry", range(22))
def test_configurations_sum_up_rows_from_shared_memory(entry, monkeypatch):
    """Where they do at all: by a second product with the same tile, which nothing waits for."""
    monkeypatch.setattr(kernels, "sums_pay", lambda *_: True)
    config = kernels.MATMUL_TMA_CONFIGS[2][entry]
    taken = kernels.for_sums(config)
    if taken is None:
        # short sums alone
        assert config.kwargs["FORM"] == "stationary"
        return
    a, b = empty(9000, 1024), empty(9000, 1024)
    with launch.override("matmul_tma_config", config):
        found = compiled(torch.ops.tritorch.matmul_summing, a.T, b)
        found += compiled(torch.ops.tritorch.matmul_summing, along(a, True).T, b)
    assert len(found) == 2
    for kernel in found:
        assert "sums_ptr" in kernel.pointers
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        assert not used.serialized
        residents = kernels.residents(taken, 2)
        assert (used.shared + 1024) * residents <= 228 * 1024
        assert used.registers * 32 * kernel.num_warps * residents <= 65536
        code = machine_code.read(used.code)
        products = 0
        for loop in machine_code.loops(code):
            kinds = machine_code.kinds([code[n] for n in loop.path])
            products += kinds.get("tensor core", 0) > 0
            assert {"shared load", "matrix load", "shared store", "global load"}.isdisjoint(kinds)
        # of the first column of tiles, and of all others
        assert products == 2


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_of_tiles_are_added_up_without_a_spill(dtype):
    config = kernels.MATMUL_TMA_EVEN_CONFIGS[dtype.itemsize][0]
    operands = [empty(*shape, dtype=dtype) for shape in ((9000, 512), (512, 512), (512,))]
    residual = empty(9000, 512, dtype=dtype)
    with (
        taking(config),
        products.allowing_tf32(),
        backend.use("triton"),
        backend.strict(),
        dry.compiling_for("sm_90") as recorder,
    ):
        ops.linear(*operands, "gelu", residual=residual)
        ops.linear(operands[0].requires_grad_(), *operands[1:], "gelu", residual=residual)
    found = [kernel for kernel in recorder.kernels if kernel.kernel == PARTS]
    # with newer compilers no tile is shared
    assert len(found) == (2 if matmul_tma.compiler.SHARES else 0)
    assert [problem for kernel in found for problem in dry.problems(kernel, "sm_90")] == []


def compiled(op, *operands, **options):
    """The matrix products that the op launches."""
    with backend.use("triton"), backend.strict(), dry.compiling_for("sm_90") as recorder:
        op(*operands, **options)
    return [kernel for kernel in recorder.kernels if kernel.kernel == KERNEL]


@pytest.mark.compile
def test_a_strided_gradient_writes_its_zeros_without_a_spill():
    x, w = empty(32, 256, 28, 28).requires_grad_(), empty(512, 256, 1, 1).requires_grad_()

    def run():
        y = ops.conv2d(x, w, stride=2)
        y.backward(torch.empty_like(y))

    found = compiled(run)
    assert [kernel.constexprs["FILLS"] for kernel in found] == [False, True, False]
    assert [kernel.constexprs["SUMS_BATCH"] for kernel in found] == [False, False, True]
    for kernel in found:
        assert dry.problems(kernel, "sm_90") == []
        assert not dry.resources(kernel).serialized


@pytest.mark.compile
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("entry", range(14))
def test_pointwise_gradients_as_tf32_have_room(entry, stride, monkeypatch):
    """With a copy of the filter, and with a stride zeros beside each pixel."""
    monkeypatch.setattr(implicit_gemm, "_MIN_PIXELS", 0)
    config = kernels.MATMUL_TMA_CONFIGS[4][entry]
    x, w = (empty(*s, dtype=torch.float32) for s in ((64, 256, 28, 28), (512, 256, 1, 1)))

    def run():
        y = ops.conv2d(x.requires_grad_(), w, stride=stride)
        y.backward(torch.empty_like(y))

    with launch.override("matmul_tma_config", config), products.allowing_tf32():
        found = compiled(run)
    # one where nothing tells result and gradient apart
    assert stride == 1 or [kernel.constexprs["FILLS"] for kernel in found] == [False, True]
    assert found
    for kernel in found:
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        assert not used.serialized
        assert used.count("LDS", "LDSM") == 0


@pytest.mark.compile
def test_what_descriptors_do_not_take(monkeypatch):
    """Everything else has the portable kernels."""
    names = []

    def launched(prepared, on, *tensors, floats=()):
        names.append(prepared.kernel.__name__)

    monkeypatch.setattr(launch.Prepared, "__call__", launched)

    def takes(op, *operands, target="sm_90"):
        names.clear()
        # what launches nothing must not be repeated elsewhere
        with launch.recorded(), backend.use("triton"), backend.strict(), dry.compiling_for(target):
            op(*operands)
        return names[0] == KERNEL

    a, b = empty(256, 512), empty(512, 384)
    for dtype in (torch.float16, torch.bfloat16):
        assert takes(ops.matmul, a.to(dtype), b.to(dtype))
    for target in ("sm_80", "sm_100", "gfx942"):
        assert not takes(ops.matmul, a, b, target=target), target
    assert not takes(ops.matmul, empty(64, 64), empty(64, 64))
    # float32 as TF32 alone, along the inner axis alone
    single, weight = empty(256, 512, dtype=torch.float32), empty(384, 512, dtype=torch.float32)
    assert not takes(ops.linear, single, weight)
    with products.allowing_tf32():
        assert takes(ops.linear, single, weight)
        assert takes(ops.matmul, single, weight.mT)
        assert not takes(ops.matmul, single, weight.view(512, 384))
        assert not takes(ops.matmul, single.view(512, 256).mT, weight.mT)
        assert not takes(ops.linear, single.view(-1)[: 250 * 510].view(250, 510), weight[:, :510])
        assert not takes(ops.matmul, single.double(), weight.double().mT)
        for target in ("sm_80", "sm_100", "gfx942"):
            assert not takes(ops.linear, single, weight, target=target), target
    # nor is a column by a row, of which either axis lies along memory
    column = empty(8192, 1, dtype=torch.float32)
    with products.allowing_tf32():
        assert not takes(ops.matmul, column, column.mT)
    # rows that do not begin on 16 bytes, an address that does not, no axis along memory, one row
    # that is all rows
    assert not takes(ops.matmul, empty(256, 500), empty(500, 384))
    assert not takes(ops.matmul, a, empty(512, 380))
    assert not takes(ops.matmul, empty(256 * 512 + 4)[4:].view(256, 512), b)
    assert not takes(ops.matmul, empty(256, 1024)[:, ::2], b)
    assert not takes(ops.matmul, empty(1, 512).expand(256, 512), b)
    # but a row within a longer one, and batches
    assert takes(ops.matmul, empty(256, 1024)[:, :512], b)
    assert takes(ops.matmul, empty(3, 256, 512), empty(3, 512, 384).mT.contiguous().mT)

    x, w = empty(64, 64, 28, 28), empty(128, 64, 1, 1)
    for options, taken in (
        ((), True),
        ((2,), True),
        ((3,), False),
        ((1, 1), False),
        ((1, 0, 1, 2), False),
    ):
        groups = options[3] if len(options) == 4 else 1
        filters = empty(128, 64 // groups, 1, 1)
        assert takes(ops.conv2d, x, filters, None, *options) == taken, options
    assert not takes(ops.conv2d, x.contiguous(), w)
    assert not takes(ops.conv2d, empty(64, 64, 27, 28), w, None, 2)
    assert not takes(ops.conv2d, x, empty(128, 64, 3, 3), None, 1, 1)


@pytest.mark.reference
@pytest.mark.parametrize(("k", "batch", "shared"), [(64, 1, True), (65, 1, True), (64, 4, False)])
def test_a_chosen_configuration_fits_its_product(k, batch, shared):
    """For any sizes: a tile of b is kept where one slice is the whole sum, and b one matrix."""
    for m in (1, 33, 3000, 900000):
        for n in (8, 64, 1000):
            config = kernels.matmul_tma_config(m, n, k, batch, shared, 2)
            if config.kwargs["FORM"] == "stationary":
                assert shared
                assert k <= config.kwargs["BLOCK_K"]


@pytest.mark.reference
def test_no_estimate_replaces_what_was_measured_or_is_forced(monkeypatch):
    """By programs that share tiles, where those were neither."""
    monkeypatch.setattr(matmul_tma.compiler, "SHARES", True)
    a, b = (Layout(shape, (shape[1], 1), 2) for shape in ((1024, 8192), (8192, 2560)))
    one, even = kernels.MATMUL_TMA_CONFIGS[2][1], kernels.MATMUL_TMA_EVEN_CONFIGS[2][1]
    sizes = 1024, 2560, 8192, 1, True, 2
    row, shares = ("matmul_tma_config", sizes), ("matmul_tma_even_config", sizes)

    def form(count=132):
        return matmul_tma.plan_matmul(a, b, count, None).config.kwargs["FORM"]

    assert [form(), form(131)] == ["even", "tile"]
    for table, expected in (
        ({}, "even"),
        ({row: one}, "tile"),
        ({shares: even}, "even"),
        ({row: one, shares: even}, "even"),
    ):
        with tuned.using(table):
            assert form() == expected
    with launch.override("matmul_tma_config", one):
        assert form() == "tile"
        with launch.override("matmul_tma_even_config", even):
            assert form() == "even"
    with launch.override("matmul_tma_even_config", None):
        assert form() == "tile"


@pytest.mark.reference
def test_sums_of_rows_pay_where_reading_them_again_takes_longer():
    def pays(rows, outputs, inputs):
        plain = kernels.matmul_tma_config(outputs, inputs, rows, 1, True, 2)
        return kernels.sums_pay(plain, kernels.for_sums(plain), outputs, inputs, rows)

    assert pays(4096, 4096, 1024)
    assert pays(8192, 4096, 4096)
    # one wave of tiles waits for those of the first column
    assert not pays(8192, 768, 3072)
