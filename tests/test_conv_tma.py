"""What convolutions on Hopper compute: results, gradients, residuals, few channels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.hopper_convolutions import CASES, FORWARD, PORTABLE, WEIGHT, Case, gradients, last, tiles
from tests.tiles import reaching_kernel
from tritorch import launch, ops
from tritorch.ops import conv_dispatch, conv_tma, conv_tma_taps, matmul_tma
from tritorch.ops.geometry import Geometry, Weight
from tritorch.ops.strided import Layout
from tritorch.registry import specs
from tritorch.testing import cases, interpreter, products
from tritorch.testing.detectors import detecting

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, monkeypatch):
    case = CASES[name]
    if case.persistent:
        monkeypatch.setattr(matmul_tma.configs, "MULTIPROCESSORS", 1)
        # tiles are stored in halves
        monkeypatch.setattr("tritorch.kernels.conv_tma_configs.SHARED_MEMORY", 0)
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
    monkeypatch.setattr(conv_dispatch, "_MIN_PIXELS", 0)
    if case.persistent:
        monkeypatch.setattr(matmul_tma.configs, "MULTIPROCESSORS", 1)
        monkeypatch.setattr("tritorch.kernels.conv_tma_configs.SHARED_MEMORY", 0)
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


@pytest.mark.parametrize(("fewest", "kernel"), [(60, FORWARD), (61, PORTABLE)])
def test_filters_of_float32_are_copied_for_many_pixels_alone(fewest, kernel, monkeypatch):
    case = CASES["3x3"]._replace(dtype=torch.float32)
    _, w, _, grad = case.make()
    monkeypatch.setattr(conv_dispatch, "_MIN_PIXELS", fewest)
    with products.allowing_tf32(), tiles(case) as names:
        y = ops.conv_transpose2d(grad, w, padding=1)
    assert names[0] == kernel
    exact = F.conv_transpose2d(grad.double(), w.double(), padding=1)
    # the interpreter keeps all bits unless asked
    assert (y.double() - exact).abs().max() <= 2**-20 * exact.abs().max()


# sums in one piece, whose tiles end past every axis but that of the channels read
ENDS = CASES["3x3"]._replace(input=(4, 16, 3, 5), weight=(24, 16, 3, 3))


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


@pytest.mark.parametrize("stride", [1, 2, (1, 2)], ids=str)
@pytest.mark.parametrize("pixels", [(1, 4, 4), (1, 2, 4)], ids=str)
def test_a_tile_of_pixels_in_a_table_is_taken_where_it_fits(stride, pixels):
    """Two sizes of an image ask one question where only one of them has pairs of pixels."""
    image = (4, 16, 8, 8) if stride == 1 else (16, 16, 7, 7)
    case = Case(image, (16, 16, 3, 3), stride=stride, tile=(16, 16, 16))
    config = conv_tma.configs._tile(*case.tile, 4, 2)
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


def _plan(case, transposed):
    x, w, _, grad = (Layout.of(each) for each in case.make())
    given = (case.stride, case.padding, case.dilation)
    each_axis = [(one, one) if isinstance(one, int) else one for one in given]
    operands = (grad, w, x) if transposed else (x, w, grad)
    with tiles(case):
        geometry = Geometry(*each_axis, case.groups)
        return conv_tma.plan_convolve(*operands, geometry, transposed, 132)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("edges")])
def test_taps_that_read_nothing_are_left_out(name, transposed):
    plan = _plan(CASES[name], transposed)
    assert plan.constants["SKIPS"]
    assert (plan.splits > 1) == (name == "edges-split" and not transposed)
    assert plan.constants["PAIRS"] == (name == "edges-stride-2")


def test_all_taps_are_read_where_few_read_nothing_or_a_tile_may_have_too_few(monkeypatch):
    assert not _plan(CASES["relu"], False).constants["SKIPS"]
    # the last column has at least a slice for each split, while there are as many slices
    split = CASES["edges-split"]._replace(input=(16, 48, 1, 3), weight=(16, 48, 1, 3))
    for slices, expected in ((3, (3, True)), (1, (9, False))):
        monkeypatch.setattr(conv_tma, "_MIN_SLICES", slices)
        plan = _plan(split, False)
        assert (plan.splits, plan.constants["SKIPS"]) == expected


GEOMETRIES = list(
    itertools.product((1, 2, 3, 7), (1, 2, 3, 4), (1, 2, 3), (0, 1, 4), (1, 2, 3), (1, 2, 4))
)


@pytest.mark.parametrize("transposed", [False, True])
def test_taps_left_are_those_that_read_the_image(transposed):
    """Of each tile of pixels along an axis, on the host and in the kernel: the first and the last
    tap that read any of it, and those between them; one where none does.
    """
    out, counted = torch.empty(2, dtype=torch.int32), 0
    for size, taps, stride, padding, dilation, block in GEOMETRIES:
        if transposed:
            written = (size - 1) * stride + dilation * (taps - 1) + 1 - 2 * padding
        else:
            written = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        # what has no pixel, and pixels without a tap
        if written < 1 or (transposed and (math.gcd(stride, dilation) > 1 or stride > taps)):
            continue
        image, other = (Layout((1, 1, 1, length), (), 2) for length in (size, written))
        given = Weight(1, 1, (1, taps), ()), Geometry((1, stride), (0, padding), (1, dilation), 1)
        runs = conv_tma_taps.taps_of_tiles(1, image, other, *given, transposed, block)
        found = [one for *one, tiles in runs for _ in range(tiles)]
        exact = list(_reads(taps, stride, padding, dilation, block, written, transposed))
        assert len(found) == len(exact)
        for (left, number), reads in zip(found, exact, strict=True):
            some = [n for n, (low, high) in enumerate(reads) if high >= 0 and low < size]
            assert (left, number) == (max(len(some), 1), len(reads))
            if counted % 3 == 0:
                step = -dilation if transposed else dilation
                reaching_kernel[(1,)](out, *reads[0], size, step, number, transposed)
                before, count = out.tolist()
                assert count == left
                assert before == some[0] if some else 0 <= before < number
            counted += 1
    assert counted > 1000


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_away_from_the_edges_are_counted_together(transposed):
    row, pixels = Layout((1, 1, 1, 2**23), (), 2), Geometry((1, 1), (0, 2), (1, 1), 1)
    given = 1, row, row, Weight(1, 1, (1, 5), ()), pixels, transposed, 1
    (*starts, (*whole, tiles), last, end) = conv_tma_taps.taps_of_tiles(*given)
    assert [*starts, last, end] == [(3, 5, 1), (4, 5, 1), (4, 5, 1), (3, 5, 1)]
    assert (whole, tiles) == ([5, 5], 2**23 - 4)


def _reads(taps, stride, padding, dilation, block, written, transposed):
    """Of each tile, by trying every tap: the first and the last pixel that it reads."""
    for residue in range(stride if transposed else 1):
        pixels = math.ceil(written / stride) if transposed else written
        for tile in range(0, pixels, block):
            ends = tile, tile + block - 1
            if transposed:
                at = [residue + stride * one + padding for one in ends]
                reached = [tap for tap in range(taps) if (at[0] - tap * dilation) % stride == 0]
                yield [[(one - tap * dilation) // stride for one in at] for tap in reached]
            else:
                at = [one * stride - padding for one in ends]
                yield [[one + tap * dilation for one in at] for tap in range(taps)]


STEMS = {
    "7x7": Case((16, 3, 4, 8), (16, 3, 7, 7), 2, 3, weight_tile=(16, 16, 16, 4)),
    "3x3-odd": Case((16, 3, 3, 9), (16, 3, 3, 3), 2, 1, activation="relu"),
    "even": Case((16, 4, 5, 8), (16, 4, 4, 5), 2, (2, 0)),
}


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
        # the preactivation is rounded too
        assert (one.double() - other).abs().max() <= 4e-3 * other.abs().max()


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


@pytest.mark.parametrize(("groups", "stages"), [(1, 8), (8, 3)])
def test_tiles_of_all_groups_are_counted(groups, stages):
    """Those of one group would be a wave, whose programs have a multiprocessor each."""
    sizes = (32, 64 * groups, 14, 14), (64 * groups, 64, 3, 3)
    x, w = (Layout.of(torch.empty(s, dtype=torch.bfloat16).to(memory_format=last)) for s in sizes)
    plan = conv_tma.plan_convolve(x, w, x, Geometry((1, 1), (1, 1), (1, 1), groups), False, 132)
    assert plan.config.num_stages == stages
