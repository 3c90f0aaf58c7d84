"""Pooling where torch's behaviour is easily missed, along one, two and three axes."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.pools import AXES, SHAPES, pair, results
from tritorch import backend, launch, ops

pytestmark = pytest.mark.interpret

INF, NAN = float("inf"), float("nan")


def in_a_row(values, axes, device):
    """One image of one channel, whose last axis are the values."""
    return torch.tensor(values, device=device).view(1, 1, *(1,) * (axes - 1), -1)


def check_equal(functions, x, *given, **options):
    ours, theirs = (results(function, x, *given, **options) for function in functions)
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return ours


ROWS = [
    # steps of their own, also where a span is less than a vector
    ((2, 3, 4, 16), {"kernel_size": 2}),
    ((1, 2, 5, 6), {"kernel_size": 2}),
    ((3, 2, 7, 24), {"kernel_size": 4}),
    ((2, 2, 6, 8), {"kernel_size": (3, 1), "stride": (2, 2)}),
    # columns of the steps before and after
    ((2, 3, 9, 32), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 5, 8), {"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1)}),
    ((1, 2, 5, 12), {"kernel_size": 3, "stride": (1, 4), "padding": 1}),
    ((2, 3, 4, 6, 8), {"kernel_size": 2}),
    ((1, 2, 5, 4, 8), {"kernel_size": (2, 1, 3), "stride": 2, "padding": (1, 0, 1)}),
    # more than one program
    ((2, 5, 32, 64), {"kernel_size": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_pool", {"return_indices": True}),
        ("avg_pool", {}),
        ("avg_pool", {"count_include_pad": False}),
        ("avg_pool", {"divisor_override": 3}),
    ],
    ids=["max", "avg", "avg-exclusive", "avg-override"],
)
@pytest.mark.parametrize(("shape", "window"), ROWS, ids=str)
def test_rows_have_the_bits_of_channels(name, options, shape, window, dtype, device):
    """Dense rows go through kernels of their own, the same images by channels do not."""
    axes = len(shape) - 2
    function = getattr(ops, f"{name}{axes}d")
    x = torch.randn(shape, device=device, dtype=dtype)
    x[x > 1.5] = NAN
    x[x < -1] = -INF
    channels_last = torch.channels_last if axes == 2 else torch.channels_last_3d
    last = x.to(memory_format=channels_last)
    found = []
    for images in (x, last):
        with launch.recorded() as kernels:
            found.append(results(function, images, **window, **options))
        assert {"rows" in kernel for kernel in kernels} == {images is x}
    assert_close(*found, rtol=0, atol=0, equal_nan=True, check_stride=False)


@pytest.mark.parametrize("shape", [(2, 3, 4, 16), (1, 2, 3, 6)])
def test_padded_dilated_rows_are_torchs(shape, device):
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}
    x = torch.randn(shape, device=device)
    x[:, :, :, :4] = -INF
    check_equal(pair("max_pool", 2), x, **given, dilation=(1, 1))
    check_equal(pair("max_pool", 2), x, **given, dilation=(1, 2), ceil_mode=True)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_windows_of_minus_infinity_have_their_first_pixel(dilation, stride, device):
    """Of the image: what lies in the padding before it has no index and takes no gradient."""
    given = {"kernel_size": 3, "stride": stride, "padding": 1, "dilation": dilation}
    x = torch.full((1, 2, 8, 9), -INF, device=device)
    check_equal((ops.max_pool2d, F.max_pool2d), x, **given, return_indices=True)


@AXES
def test_first_of_ties_wins(axes, device):
    x = torch.ones(SHAPES[axes], device=device)
    functions = pair("max_pool", axes)
    _, indices, _ = check_equal(functions, x, 2, return_indices=True)
    assert indices.flatten()[0] == 0
    check_equal(functions, x, 3, stride=2, padding=1, return_indices=True)


@AXES
@pytest.mark.parametrize(
    ("values", "index"),
    [([1.0, NAN, NAN, 3.0], 2), ([NAN, 1.0, 2.0, 3.0], 0), ([INF, NAN, -INF, INF], 1)],
)
def test_last_nan_wins(axes, values, index, device):
    x = in_a_row(values, axes, device)
    window = (1,) * (axes - 1) + (4,)
    value, indices, _ = check_equal(pair("max_pool", axes), x, window, return_indices=True)
    assert value.isnan().all()
    assert indices.item() == index


@AXES
def test_padding_is_never_chosen(axes, device):
    """It acts as -infinity, so that negative values win over it, and -infinity itself does."""
    for value in (-3.0, -INF):
        x = torch.full(SHAPES[axes], value, device=device)
        given = {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True}
        values, indices, _ = check_equal(pair("max_pool", axes), x, **given)
        assert (values == value).all()
        assert (indices >= 0).all()
        assert (indices < x[0, 0].numel()).all()


@AXES
@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_last_window_starts_inside_the_image(name, axes, device):
    """`ceil_mode` adds no window that would start in the padding behind it."""
    functions = pair(name, axes)
    for size in (3, 4, 5, 6):
        x = torch.randn(2, 2, *(3,) * (axes - 1), size, device=device)
        for padding in (0, 1):
            given = {"kernel_size": 2, "stride": 3, "padding": padding, "ceil_mode": True}
            ours, theirs = (results(function, x, **given) for function in functions)
            assert_close(ours, theirs)


@pytest.mark.parametrize("counts", [True, False])
@AXES
def test_mean_counts_the_window_that_is_there(axes, counts, device):
    """The padding counts or does not, what `ceil_mode` adds beyond it never does."""
    x = torch.ones(1, 1, *(4,) * axes, device=device)
    given = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    ours, theirs = (
        results(function, x, **given, count_include_pad=counts)
        for function in pair("avg_pool", axes)
    )
    assert_close(ours, theirs)
    # along each axis the windows hold 2, 3 and 1 pixels, of 3, 3 and 2 with the padding
    means = torch.tensor([2 / 3, 1.0, 1 / 2] if counts else [1.0, 1.0, 1.0], device=device)
    expected = means
    for _ in range(axes - 1):
        expected = expected[..., None] * means
    assert_close(ours[0][0, 0], expected)


@pytest.mark.parametrize("axes", [2, 3])
def test_override_divides_every_sum(axes, device):
    x = torch.randn(SHAPES[axes], device=device)
    for divisor in (7, -3):
        given = {"kernel_size": 2, "padding": 1, "divisor_override": divisor}
        ours, theirs = (results(function, x, **given) for function in pair("avg_pool", axes))
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
@AXES
def test_empty_stride_is_the_window(name, axes, device):
    x = torch.randn(SHAPES[axes], device=device)
    for stride in (None, ()):
        ours, theirs = (results(function, x, 2, stride) for function in pair(name, axes))
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
@AXES
def test_maxima_of_other_dtypes_are_torchs(axes, dtype, device):
    """Of integers torch has some on a CPU, of booleans none: an error of its class."""
    x = torch.arange(120).remainder(7).view(2, 3, *{1: (20,), 2: (4, 5), 3: (1, 4, 5)}[axes])
    x = x.to(device, dtype)
    window = (1, 2, 2)[-axes:]
    functions = pair("max_pool", axes)
    with backend.strict(False):
        try:
            expected = functions[1](x, window, return_indices=True)
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                functions[0](x, window, return_indices=True)
        else:
            assert_close(functions[0](x, window, return_indices=True), expected)


def saved_bytes(function):
    """Bytes that autograd keeps of a call."""
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept)


@pytest.mark.parametrize("name", ["max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"])
def test_a_byte_of_each_maximum_is_kept(name, device):
    shape = SHAPES[2] if "2d" in name else SHAPES[int(name[-2])]
    x = torch.randn(shape, device=device, requires_grad=True)
    outputs = []
    size = saved_bytes(lambda: outputs.append(getattr(ops, name)(x, 2)))
    assert size == outputs[0].numel()


@pytest.mark.parametrize("name", ["avg_pool", "adaptive_avg_pool"])
@AXES
def test_nothing_is_kept_for_a_mean(name, axes, device):
    x = torch.randn(SHAPES[axes], device=device, requires_grad=True)
    for size in (1, 2):
        assert saved_bytes(lambda size=size: pair(name, axes)[0](x, size)) == 0


def channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()])


@pytest.mark.parametrize("axes", [2, 3])
def test_peer_defect_9_channels_last_gradient_is_in_place(axes, device):
    x = torch.randn(SHAPES[axes], device=device)
    functions = pair("max_pool", axes)
    given = {"kernel_size": 3, "stride": 2, "padding": 1}
    expected = results(functions[1], x, **given)
    actual = results(functions[0], channels_last(x), **given)
    assert_close(actual, expected, rtol=0, atol=0)
    memory_format = torch.channels_last if axes == 2 else torch.channels_last_3d
    assert all(result.is_contiguous(memory_format=memory_format) for result in actual)


def test_peer_defect_10_nan_is_not_dropped(device):
    x = torch.tensor([NAN, 1.0, 2.0, 3.0], device=device).view(1, 1, 2, 2)
    for function in (ops.max_pool2d, ops.adaptive_max_pool2d):
        values, indices = function(x, 2 if function is ops.max_pool2d else 1, return_indices=True)
        assert values.isnan().all()
        assert indices.item() == 0


def test_peer_defect_10_minus_infinity_has_an_index(device):
    x = torch.full((1, 1, 4, 4), -INF, device=device)
    for function in (ops.max_pool2d, ops.adaptive_max_pool2d):
        values, indices = function(x, 2, return_indices=True)
        assert (values == -INF).all()
        assert indices.flatten().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "adaptive_avg_pool"])
@AXES
def test_peer_defect_10_unbatched_images_are_taken(name, axes, device):
    x = torch.randn(SHAPES[axes][1:], device=device)
    ours, theirs = (results(function, x, 2) for function in pair(name, axes))
    assert_close(ours, theirs)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", ["max_pool", "avg_pool", "adaptive_avg_pool"])
def test_peer_defect_10_channels_last_is_kept(name, axes, device):
    x = channels_last(torch.randn(SHAPES[axes], device=device))
    memory_format = torch.channels_last if axes == 2 else torch.channels_last_3d
    ours, theirs = pair(name, axes)
    output = ours(x, 2)
    assert_close(output, theirs(x, 2))
    assert output.is_contiguous(memory_format=memory_format)
    if name == "max_pool":
        _, indices = ours(x, 2, return_indices=True)
        assert indices.is_contiguous(memory_format=memory_format)


@AXES
def test_peer_defect_10_indices_are_flat_and_of_64_bits(axes, device):
    x = torch.randn(SHAPES[axes], device=device)
    values, indices = pair("max_pool", axes)[0](x, 2, return_indices=True)
    assert indices.dtype == torch.int64
    gathered = x.flatten(2).gather(2, indices.flatten(2)).view_as(values)
    assert_close(gathered, values, rtol=0, atol=0)


@AXES
def test_peer_defect_17_lanes_outside_add_nothing(axes, device):
    """A window that reaches beyond the image has exactly the sum of what is inside."""
    x = torch.full((1, 3, *(5,) * axes), 2.0, device=device)
    given = {"kernel_size": 4, "stride": 3, "padding": 2, "count_include_pad": False}
    output = pair("avg_pool", axes)[0](x, **given)
    assert_close(output, torch.full_like(output, 2.0), rtol=0, atol=0)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"])
def test_volumes_under_autocast_have_torchs_dtype(name, device):
    """On a CPU float32, which torch makes of 16 bits there, as on no GPU."""
    results = []
    for module in (ops, F):
        x = torch.linspace(-1, 1, 32, device=device).view(1, 2, 2, 2, 4).bfloat16()
        x.requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = getattr(module, name)(x, 2)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    assert_close(*results)
