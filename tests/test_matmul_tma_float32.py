"""Matrix products of float32 on Hopper: TF32 where it is allowed, of factors turned for it."""

import contextlib

import pytest
import torch

from tests.hopper_products import KERNEL, along, assert_close, made, tiles, watched
from tests.hopper_products import hopper as hopper
from tritorch import backend, ops
from tritorch.ops import matmul_function
from tritorch.registry import Maker, specs
from tritorch.testing import cases, dry, interpreter, products


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
@pytest.mark.parametrize(
    ("form", "size", "epilogue"),
    [
        ("tile", (40, 24, 40), "plain"),
        ("persistent", (40, 24, 40), "plain"),
        ("stationary", (40, 24, 24), "plain"),
        ("tile", (8, 48, 40), "plain"),
        ("tile", (8, 48, 528), "all"),
        ("persistent", (40, 24, 40), "all"),
        ("stream-k", (40, 24, 40), "all"),
    ],
    ids=["tile", "persistent", "stationary", "few-rows", "split", "epilogue", "stream-k"],
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
