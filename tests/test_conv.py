"""What torch's convolutions do besides summing products, and where kernels like ours went wrong."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tritorch.nn as nn
from tritorch import backend, launch, ops
from tritorch.ops import conv_dispatch, reorder
from tritorch.ops.geometry import Geometry
from tritorch.testing import products

pytestmark = pytest.mark.interpret

LAYERS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


def made(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def pair(layer, **arguments):
    """The layer of torch and ours, with the same parameters."""
    layers = []
    for module in (torch.nn, nn):
        torch.manual_seed(0)
        layers.append(getattr(module, layer)(**arguments).double())
    return layers


@pytest.mark.reference
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_even_filter_pads_the_end_by_one_more(axes, device):
    x, weight = made(1, 1, *(3,) * axes, device=device), torch.zeros(1, 1, *(2,) * axes).double()
    weight[(0, 0) + (1,) * axes] = 1
    y = getattr(ops, f"conv{axes}d")(x, weight.to(device), padding="same")
    # each pixel of the output is the next one of the input, and the last ones are padding
    assert_close(y, F.pad(x[(...,) + (slice(1, None),) * axes], (0, 1) * axes), rtol=0, atol=0)


@pytest.mark.reference
def test_padding_of_a_layer_stays_the_word_it_was():
    layer = nn.Conv2d(2, 2, (3, 2), padding="same", dilation=(1, 2))
    assert layer.padding == "same"
    assert layer._reversed_padding_repeated_twice == [1, 1, 1, 1]
    # the last axis first, an odd one more at its end
    other = nn.Conv2d(2, 2, (4, 1), padding="same")
    assert other._reversed_padding_repeated_twice == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="strided"):
        nn.Conv2d(2, 2, 3, padding="same", stride=2)


@pytest.mark.reference
@pytest.mark.parametrize(("mode", "padding"), [("reflect", 4), ("circular", 5)])
@pytest.mark.parametrize("layer", LAYERS[:3])
def test_padding_that_its_mode_does_not_take(layer, mode, padding, device):
    x = made(1, 2, *(4,) * int(layer[-2]), device=device)
    for one in pair(layer, in_channels=2, out_channels=1, kernel_size=2, padding=padding,
                    padding_mode=mode):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            one.to(device)(x)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_empty_batch_has_gradients_of_zero(layer, device):
    x = torch.empty(0, 2, *(4,) * int(layer[-2]), dtype=torch.float64, device=device)
    theirs, ours = (
        one.to(device) for one in pair(layer, in_channels=2, out_channels=3, kernel_size=3)
    )
    y = ours(x.requires_grad_())
    assert y.shape == theirs(x).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in ours.parameters():
        assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_infinite_weight_meets_the_padding(axes, device):
    x, weight = torch.ones(1, 1, *(3,) * axes), torch.ones(1, 1, *(3,) * axes)
    weight[(0, 0) + (0,) * axes] = float("inf")
    y, expected = (
        function(x.to(device), weight.to(device), padding=1)
        for function in (getattr(ops, f"conv{axes}d"), getattr(F, f"conv{axes}d"))
    )
    assert_close(y, expected, equal_nan=True)
    assert y.flatten()[0].isnan()
    assert y.flatten()[-1].isinf()


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
@pytest.mark.parametrize("formats", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_results_have_the_formats_of_their_tensors(name, axes, formats, device):
    """As torch's on a GPU; on a CPU they depend on the library that it calls."""
    order = torch.channels_last if axes == 2 else torch.channels_last_3d
    x, weight = made(2, 4, *(3,) * axes, device=device), made(4, 4, *(2,) * axes, device=device)
    x, weight = (
        t.contiguous(memory_format=order if last else torch.contiguous_format).requires_grad_()
        for t, last in zip((x, weight), formats, strict=True)
    )
    y = getattr(ops, f"{name}{axes}d")(x, weight)
    y.backward(torch.ones_like(y))
    found = [t.is_contiguous(memory_format=order) for t in (y, x.grad, weight.grad)]
    assert found == [any(formats), bool(formats[0]), bool(formats[1])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_a_bias_is_not_summed_in_half_precision(dtype, device):
    x, weight = torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 1, 1)
    bias = torch.zeros(1, dtype=dtype, device=device, requires_grad=True)
    ops.conv2d(x.to(device, dtype), weight.to(device, dtype), bias).sum().backward()
    # a sum kept in bfloat16 stops at 256
    assert bias.grad.item() == 1600


@pytest.mark.parametrize("layer", LAYERS)
def test_only_the_gradients_that_are_needed_are_computed(layer, device):
    one = pair(layer, in_channels=2, out_channels=2, kernel_size=2)[1].to(device)
    one.weight.requires_grad_(False)
    y = one(made(1, 2, *(3,) * int(layer[-2]), device=device))
    with launch.recorded() as launches:
        y.sum().backward()
    assert launches == ["channel_sum_kernel"]


@pytest.mark.reference
@pytest.mark.parametrize("layer", LAYERS)
def test_groups_must_divide_the_channels(layer):
    for channels in ((4, 6), (6, 4)):
        with pytest.raises(ValueError, match="divisible by groups"):
            getattr(nn, layer)(*channels, 3, groups=3)


@pytest.mark.reference
@pytest.mark.parametrize("layer", LAYERS[3:])
def test_output_size_chooses_among_the_sizes_that_a_stride_leaves_open(layer, device):
    axes = int(layer[-2])
    x = made(1, 2, *(3,) * axes, device=device)
    theirs, ours = (
        one.to(device)
        for one in pair(layer, in_channels=2, out_channels=1, kernel_size=2, stride=3, padding=1)
    )
    for size in ((6,) * axes, (8, 7, 6)[-axes:], (1, 1, *(7,) * axes)):
        assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, (9,) * axes)
    with pytest.raises(ValueError, match="output_size"):
        ours(x, (6,) * (axes + 3))


@pytest.mark.reference
def test_a_transposed_layer_pads_by_zeros_alone():
    with pytest.raises(ValueError, match="zeros"):
        nn.ConvTranspose2d(2, 2, 3, padding_mode="reflect")


def test_an_output_without_pixels_is_an_error(device):
    x, weight = made(1, 2, 3, 3, device=device), made(2, 3, 2, 3, device=device)
    with pytest.raises(RuntimeError, match=r"no pixels"):
        ops.conv_transpose2d(x, weight, padding=(2, 1))
    # on a GPU torch leaves it to cuDNN, which may return an empty image
    with pytest.raises(RuntimeError, match=r"too small"):
        F.conv_transpose2d(x.cpu(), weight.cpu(), padding=(2, 1))


def test_relu_of_a_convolution_passes_nan(device):
    x = torch.tensor([float("nan"), -1.0, 2.0], device=device).view(1, 1, 1, 3)
    y = ops.conv2d(x, torch.ones(1, 1, 1, 1, device=device), activation="relu")
    assert_close(y.flatten().cpu(), torch.tensor([float("nan"), 0.0, 2.0]), equal_nan=True)


@pytest.mark.parametrize("layer", ["Conv1d", "ConvTranspose1d"])
def test_a_signal_is_not_copied(layer, device):
    """Nor is one whose channels are contiguous, which torch makes contiguous."""
    x = made(2, 5, 3, device=device).transpose(1, 2).requires_grad_()
    saved = []
    theirs, ours = (
        one.to(device) for one in pair(layer, in_channels=3, out_channels=4, kernel_size=2)
    )

    def keep(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours(x)
    assert_close(y, theirs(x))
    assert y.stride() == theirs(x).stride()
    assert x.untyped_storage().data_ptr() in saved


@pytest.mark.parametrize("groups", [1, 3])
def test_few_channels_are_not_padded_in_memory(groups, device, monkeypatch):
    """The kernels read the image itself, though a product takes 16 of its channels at least."""
    x = made(2, 3, 9, 7, device=device)
    read, run = [], launch.Prepared.__call__

    def watched(self, *tensors, **floats):
        read.extend(t.data_ptr() for t in tensors if isinstance(t, torch.Tensor))
        assert all(t.numel() <= 2 * x.numel() for t in tensors if isinstance(t, torch.Tensor))
        run(self, *tensors, **floats)

    monkeypatch.setattr(launch.Prepared, "__call__", watched)
    ops.conv2d(x, made(6, 3 // groups, 3, 3, device=device), padding=1, groups=groups)
    assert x.data_ptr() in read


def test_peer_defect_11_gradient_of_a_filter_of_any_strides(device):
    """Written by the filter's strides into memory that has others."""
    x, weight = made(2, 4, 5, 5, device=device), made(6, 4, 3, 3, device=device)
    grads = []
    for format in (torch.contiguous_format, torch.channels_last):
        one = weight.clone(memory_format=format).requires_grad_()
        ops.conv2d(x, one, padding=1).square().sum().backward()
        grads.append(one.grad)
    assert_close(*grads)


@pytest.mark.reference
@pytest.mark.parametrize("layer", LAYERS)
def test_peer_defect_14_no_parameter_is_left_without_gradient(layer, device):
    one = pair(layer, in_channels=2, out_channels=2, kernel_size=2)[1].to(device)
    one(made(1, 2, *(3,) * int(layer[-2]), device=device)).sum().backward()
    assert all(parameter.grad is not None for parameter in one.parameters())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peer_defect_16_autocast_computes_in_the_dtype_it_was_given(layer, dtype, device):
    one = getattr(nn, layer)(2, 2, 2).to(device)
    x = made(1, 2, *(3,) * int(layer[-2]), dtype=torch.float32, device=device).requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y = one(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == one.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", ["conv", "conv_transpose"])
def test_peer_defect_17_what_lies_between_the_elements_is_not_read(name, axes, device):
    """A masked load without `other` brings what it finds there into the sum."""
    given = [made(1, 3, *(4,) * axes), made(3, 3, *(3,) * axes)]
    apart = []
    for tensor in given:
        memory = torch.full((*tensor.shape, 2), float("nan"), dtype=torch.float64, device=device)
        memory[..., 0] = tensor.to(device)
        apart.append(memory[..., 0].requires_grad_())
    y = getattr(ops, f"{name}{axes}d")(*apart, padding=1)
    expected = getattr(F, f"{name}{axes}d")(*given, padding=1)
    assert_close(y.cpu(), expected)
    grads = torch.autograd.grad(y.sum(), apart)
    assert all(grad.isfinite().all() for grad in grads)


def test_peer_defect_18_a_stem_of_three_channels_and_dilated_groups(device):
    """Shapes that a test of square, contiguous, undilated images does not meet."""
    for shape, filters, given in (
        ((1, 3, 9, 11), (5, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((2, 6, 7, 5), (4, 3, 2, 3), {"dilation": (2, 1), "groups": 2, "padding": (0, 2)}),
    ):
        x, weight = made(*shape, device=device), made(*filters, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        assert_close(ops.conv2d(x, weight, **given), F.conv2d(x, weight, **given))


@pytest.mark.parametrize("one", [np.int64(2), torch.tensor(2), (np.int64(2), 2), [2, 2]])
def test_whatever_is_an_integer_is_a_stride(one):
    x, w = torch.randn(1, 2, 7, 7), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(ops.conv2d(x, w, stride=one), F.conv2d(x, w, stride=2))


@pytest.mark.parametrize("one", [2.0, True, (2.0, 2), (True, 2), "2"])
def test_what_is_no_integer_is_no_stride_after_calls_that_had_an_equal_one(one):
    x, w = torch.randn(1, 2, 7, 7), torch.randn(3, 2, 3, 3)
    for same in (1, 2):
        ops.conv2d(x, w, stride=same)
    with pytest.raises(TypeError, match="conv2d: stride must be integers"):
        ops.conv2d(x, w, stride=one)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("axes", "dtype"), [(2, torch.float16), (3, torch.float16), (2, torch.float32)]
)
def test_many_products_of_images_in_another_order_go_through_copies(
    axes, dtype, activation, device, monkeypatch
):
    """The same numbers as of images in channels_last, in the order in which torch has them."""
    monkeypatch.setattr(reorder, "MIN_OF_FILTERS", reorder.MIN_PRODUCTS)
    kernel = (3, 5) if axes == 2 else (3, 2, 2)
    x = made(2, 16, *(4, 5, 3)[:axes], dtype=dtype, device=device)
    w = made(24, 16, *kernel, seed=1, dtype=dtype, device=device)
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    found = []
    for order in (torch.contiguous_format, last):
        leaves = [t.clone(memory_format=order).requires_grad_() for t in (x, w)]
        with products.allowing_tf32(), backend.strict(), launch.recorded() as names:
            y = getattr(ops, f"conv{axes}d")(*leaves, padding=1, activation=activation)
            y.backward(torch.ones_like(y))
        found.append((y, *(leaf.grad for leaf in leaves)))
        assert all(t.is_contiguous(memory_format=order) for t in found[-1])
        # in and out: of the output also what an activation was applied to
        copies = 0 if order == last else 6 + (activation == "gelu")
        assert names.count("reorder_kernel") == copies
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("sizes", "copies"), [((16, 64, 3), 4), ((48, 48, 5), 6)])
def test_gradients_of_filters_as_tf32_take_copies_for_more_products(sizes, copies, device):
    """115 products a number are enough for the images' passes, 600 for that of the filters too."""
    channels, outputs, size = sizes
    x = made(1, channels, 3, 3, dtype=torch.float32, device=device).requires_grad_()
    w = made(outputs, channels, size, size, seed=1, dtype=torch.float32, device=device)
    w.requires_grad_()
    for tf32 in (True, False):
        flags = products.allowing_tf32() if tf32 else contextlib.nullcontext()
        with flags, backend.strict(), launch.recorded() as names:
            y = ops.conv2d(x, w, padding=size // 2)
            y.backward(torch.ones_like(y))
        assert names.count("reorder_kernel") == (copies if tf32 else 0)


@pytest.mark.parametrize(
    ("channels", "taps", "dtype"),
    [
        (16, 1, torch.float16),
        (12, 5, torch.float16),
        # whose products are no tensor core's
        (16, 7, torch.float32),
    ],
)
def test_few_products_and_odd_channels_are_not_copied(channels, taps, dtype, device):
    x = made(2, channels, 9, dtype=dtype, device=device)
    w = made(16, channels, taps, seed=1, dtype=dtype, device=device)
    with launch.recorded() as names:
        y = ops.conv1d(x, w)
    assert "reorder_kernel" not in names
    assert_close(y.double(), F.conv1d(x.double(), w.double()), rtol=2e-3, atol=2e-3)


def test_images_whose_rows_are_apart_are_not_copied(device):
    whole = made(1, 16, 6, 8, dtype=torch.float16, device=device)
    w = made(32, 16, 5, 5, seed=1, dtype=torch.float16, device=device)
    for x, copies in ((whole, 2), (whole[..., :7], 0)):
        with launch.recorded() as names:
            y = ops.conv2d(x, w)
        assert names.count("reorder_kernel") == copies
    assert_close(y.double(), F.conv2d(x.double(), w.double()), rtol=2e-3, atol=2e-3)


def test_a_program_for_any_size_refuses_one_that_is_too_large():
    """What a plain call takes torch for."""
    x = torch.empty(1, dtype=torch.float16).expand(2**20, 8, 64, 64)
    w = torch.empty(8, 8, 1, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"at most 2\*\*30 pixels"):
        conv_dispatch.convolve(x, w, None, x, Geometry((1, 1), (0, 0), (1, 1), 1), transposed=False)
