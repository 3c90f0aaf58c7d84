"""Normalisation beyond one call of one sample: what is rounded, moves, is aligned, and is kept."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tritorch
import tritorch.nn as nn
from tritorch import ops
from tritorch.ops import batch_norm_stages, strided
from tritorch.ops.activation import REFERENCES
from tritorch.ops.strided import Layout

pytestmark = pytest.mark.interpret


def arguments(device, channels=3, dtype=torch.float32):
    torch.manual_seed(0)
    names = ("running_mean", "running_var", "weight", "bias")
    return {name: torch.rand(channels, dtype=dtype).add_(0.5).to(device) for name in names}


def test_output_is_rounded_once(device):
    """The residual takes away what rounding to float16 would leave of the rest."""
    x = torch.tensor([[3e-4], [7e-4], [1.1e-3]], dtype=torch.float16, device=device)
    vector = torch.ones(1, device=device)
    y = ops.batch_norm(x, 0 * vector, vector, vector, vector, residual=-torch.ones_like(x), eps=0.0)
    torch.testing.assert_close(y.double(), x.double(), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("residual", [False, True])
def test_no_gradient_passes_where_the_output_underflows(residual, device):
    """ReLU's mask is that of the output as it is stored: 1e-9 is 0 in float16."""
    x = torch.ones(2, 1, dtype=torch.float16, device=device)
    zero, one = torch.zeros(1, device=device), torch.ones(1, device=device)
    bias = zero.clone().requires_grad_()
    y = ops.batch_norm(
        x, zero, one, 1e-9 * one, bias, activation="relu", residual=0 * x if residual else None
    )
    assert torch.equal(y, torch.zeros_like(x))
    (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert grad.item() == 0.0


def test_autograd_sees_that_running_statistics_move(device):
    given = arguments(device)
    x = torch.randn(4, 3, device=device)
    before = given["running_mean"]._version, given["running_var"]._version
    ops.batch_norm(x, **given, training=True)
    assert given["running_mean"]._version > before[0]
    assert given["running_var"]._version > before[1]


def test_a_training_step_between_leaves_the_gradient_of_evaluation(device):
    given = arguments(device)
    x = torch.randn(4, 3, device=device).requires_grad_()
    kept = {name: value.clone() for name, value in given.items()}
    y = ops.batch_norm(x, **given, activation="relu")
    ops.batch_norm(torch.randn(4, 3, device=device), **given, training=True)
    assert not torch.equal(given["running_mean"], kept["running_mean"])
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = ops.batch_norm(x, **kept, activation="relu")
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("kept", [8, 12, 20, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_vectors_are_aligned(kept, dtype):
    """The compiler is promised that every row of channels starts on a multiple of the vector."""
    images = torch.empty(2, kept + 4, 3, 5, dtype=dtype, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)[:, :kept]
    nest = strided.nest("batch_norm", images.select(1, 0))
    rows, channels = batch_norm_stages._vector([Layout.of(images)], nest)
    assert rows == 1
    assert channels * dtype.itemsize <= 16
    assert kept % channels == 0
    assert all(stride % channels == 0 for stride in (images.stride(0), *images.stride()[2:]))


def kept_bytes(call, *inputs):
    """Bytes of all tensors that autograd keeps, each memory once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        output = call(*(input.requires_grad_() for input in inputs))
    assert output.requires_grad
    return sum(tensor.numel() * tensor.itemsize for tensor in kept.values())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", REFERENCES)
def test_an_activation_keeps_no_more_than_torchs(activation, residual, device):
    """Without a residual nothing but the bias, where torch keeps a tensor; with one a tensor."""
    given = arguments(device)
    x, other = torch.randn(2, 2, 3, 8, 8, device=device)
    call = {"training": True, "activation": activation, "residual": other if residual else None}

    def ours(x, weight, bias, **more):
        return ops.batch_norm(x, given["running_mean"], given["running_var"], weight, bias, **more)

    def torchs(x, weight, bias):
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return REFERENCES[activation](y + other if residual else y)

    leaves = x, given["weight"], given["bias"]
    fused = kept_bytes(lambda *t: ours(*t, **call), *leaves)
    alone = kept_bytes(lambda *t: ours(*t, training=True), *leaves)
    image, vector = x.numel() * x.itemsize, given["bias"].numel() * x.itemsize
    assert alone == image + 3 * vector
    assert fused <= alone + vector + residual * image
    assert fused <= kept_bytes(torchs, *leaves) - (not residual) * image + vector


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_norms_keep_no_more_than_torchs(name, device):
    x, vector = torch.randn(2, 4, 8, device=device), torch.rand(2, 8, device=device)
    if name == "group_norm":
        x = x.mT.contiguous()
    shape = (8,) if name == "layer_norm" else 4
    leaves = [leaf.clone() for leaf in (x, *vector)]
    ours = kept_bytes(lambda x, w, b: getattr(ops, name)(x, shape, w, b), *leaves)
    assert ours <= kept_bytes(lambda x, w, b: getattr(F, name)(x, shape, w, b), *leaves)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, *REFERENCES])
def test_activations_and_both_their_gradients(activation, residual, training, device):
    """Of the batch and of fixed statistics, against plain PyTorch in float64."""
    torch.manual_seed(0)
    # torch's hardsigmoid divides by 6 in float32 and has no second gradient; on a GPU hardswish
    # multiplies by the float32 next to 1/6
    shortened = ("hardsigmoid", "hardswish") if device == "cuda" else ("hardsigmoid",)
    rtol = 1e-6 if activation in shortened else 1e-10
    given = arguments(device, dtype=torch.float64)
    x, other = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device) * 2
    leaves = [x, given["weight"], given["bias"], *([other] if residual else [])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn_like(x).requires_grad_()
    results = []
    for choice in ("auto", "reference"):
        running = [given[name].clone() for name in ("running_mean", "running_var")]
        with tritorch.backend.use(choice):
            y = ops.batch_norm(
                leaves[0],
                *running,
                *leaves[1:3],
                training,
                activation=activation,
                residual=leaves[3] if residual else None,
            )
        grads = torch.autograd.grad(y, leaves, grad, create_graph=True)
        found = [y, *grads, *running]
        if activation != "hardsigmoid":
            total = sum(one.square().sum() for one in grads)
            second = torch.autograd.grad(total, [*leaves, grad], materialize_grads=True)
            found += second
        results.append([one.detach() for one in found])
    assert_close(*results, rtol=rtol, atol=rtol)


def test_variances_and_momentum(device):
    """Biased to normalise, unbiased to keep; the old share is 1 - momentum; moved once a call."""
    x = torch.tensor([[1.0], [2.0], [6.0]], device=device)
    mean, var = torch.full((1,), 10.0, device=device), torch.full((1,), 20.0, device=device)
    y = ops.batch_norm(x, mean, var, training=True, momentum=0.25, eps=1e-12)
    assert_close(y, (x - 3) / (14 / 3) ** 0.5)
    assert_close(mean, torch.full_like(mean, 0.75 * 10 + 0.25 * 3))
    assert_close(var, torch.full_like(var, 0.75 * 20 + 0.25 * 7))


def test_an_empty_batch_leaves_the_running_statistics(device):
    given = arguments(device)
    kept = {name: value.clone() for name, value in given.items()}
    y = ops.batch_norm(torch.empty(0, 3, 4, device=device), **given, training=True)
    assert y.shape == (0, 3, 4)
    assert_close(given, kept, rtol=0, atol=0)


@pytest.mark.parametrize("mean", [None, torch.zeros(3)], ids=["neither", "mean-alone"])
def test_an_empty_batch_needs_no_running_statistics(mean, device):
    mean = None if mean is None else mean.to(device)
    assert ops.batch_norm(torch.empty(0, 3, 4, device=device), mean, None).shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm"])
def test_half_precision_with_float32_parameters(name, dtype, device):
    """The output is the input's, gradients and running statistics the parameters', and what is
    kept of each channel, row or group is float32.
    """
    given = arguments(device, channels=4)
    x = torch.randn(5, 4, device=device).to(dtype).requires_grad_()
    weight, bias = (given[name].requires_grad_() for name in ("weight", "bias"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        if name == "batch_norm":
            y = ops.batch_norm(x, **given, training=True)
        elif name == "layer_norm":
            y = ops.layer_norm(x, (4,), weight, bias)
        else:
            y = ops.group_norm(x, 2, weight, bias)
    assert y.dtype == dtype
    assert kept.count(dtype) == 1
    assert set(kept) == {dtype, torch.float32}
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


def test_far_from_zero(device):
    """Mean 1000, deviation 0.01: squares of the values would leave nothing of the variance."""
    torch.manual_seed(0)
    x = 1000 + 0.01 * torch.randn(4096, 2, dtype=torch.float64)
    x = x.float().to(device)
    true = (x.double() - x.double().mean(0)) * (x.double().var(0, correction=0) + 1e-5).rsqrt()
    y = ops.batch_norm(x, None, None, training=True)
    # a rounding of the mean is 3e-5, and so much of it remains
    assert_close(y.double(), true, rtol=0, atol=4e-3)
    assert_close(y.double().var(0), true.var(0), rtol=1e-4, atol=0)
    turned = x.mT.contiguous()
    for y in (ops.layer_norm(turned, (4096,)), ops.group_norm(turned[None], 2)[0]):
        assert_close(y.double().mT, true, rtol=0, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_peer_defect_16_autocast_keeps_batch_norms_dtype(dtype, device):
    given = arguments(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        y = ops.batch_norm(torch.randn(4, 3, device=device).to(dtype), **given, training=True)
    assert y.dtype == dtype


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_autocast_makes_the_others_float32(name, device):
    """As torch's autocast of a GPU does."""
    x = torch.randn(3, 4, device=device).bfloat16()
    shape = (4,) if name == "layer_norm" else 2
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        y = getattr(ops, name)(x, shape)
    assert_close(y, getattr(F, name)(x.float(), shape))


def evaluated(x, given, grad):
    y = ops.batch_norm(x, **given)
    return torch.autograd.grad(y, [x, given["weight"], given["bias"]], grad)


def test_peer_defect_1_fine_tuning_with_frozen_statistics(device):
    """A layer in evaluation keeps nothing of the batch that its gradient could be made of."""
    layers = []
    for module in (nn, torch.nn):
        layer = module.BatchNorm2d(3).to(device).eval()
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([0.25, 4.0, 1.0]))
        layers.append(layer)
    x, grad = torch.randn(2, 4, 3, 2, 5, device=device)
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], grad)))
    assert_close(*results)


def test_peer_defect_2_gradient_of_evaluation(device):
    """Only weight / sqrt(var + eps) of the running variance, nothing of the batch."""
    given = arguments(device)
    x, grad = torch.randn(2, 4, 3, device=device)
    for tensor in (x, given["weight"], given["bias"]):
        tensor.requires_grad_()
    grad_x, grad_weight, grad_bias = evaluated(x, given, grad)
    invstd = (given["running_var"] + 1e-5).rsqrt()
    assert_close(grad_x, grad * given["weight"] * invstd)
    assert_close(grad_weight, (grad * (x - given["running_mean"]) * invstd).sum(0))
    assert_close(grad_bias, grad.sum(0))


def trained(x, given, grad, **fused):
    y = ops.batch_norm(x, **given, training=True, **fused)
    return y, *torch.autograd.grad(y, [x, given["weight"], given["bias"]], grad)


def test_peer_defect_3_activation_of_channels_last(device):
    given = arguments(device)
    given["weight"].requires_grad_()
    given["bias"].requires_grad_()
    x, grad = torch.randn(2, 2, 3, 4, 5, device=device)
    results = [
        trained(one.requires_grad_(), given, grad, activation="relu")
        for one in (x, x.contiguous(memory_format=torch.channels_last))
    ]
    assert_close(*results)


def test_peer_defect_4_expanded_gradient(device):
    given = arguments(device)
    given["weight"].requires_grad_()
    given["bias"].requires_grad_()
    x = torch.randn(2, 3, 4, 5, device=device).requires_grad_()
    expanded = torch.ones((), device=device).expand(x.shape)
    results = [
        trained(x, given, grad, activation="relu") for grad in (expanded, expanded.contiguous())
    ]
    # another layout is summed in another order
    assert_close(*results)


def test_peer_defect_5_input_without_running_statistics(device):
    x = torch.randn(4, 3, device=device)
    kept = x.clone()
    y = ops.batch_norm(x, None, None, training=True)
    assert torch.equal(x, kept)
    assert_close(y, F.batch_norm(kept, None, None, training=True))


def test_peer_defect_6_many_short_rows(device):
    """4096 images of 9 pixels: no block divides them."""
    x = torch.randn(4096, 2, 9, device=device)
    assert_close(
        ops.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True)
    )


@pytest.mark.parametrize("training", [True, False])
def test_peer_defect_7_input_without_gradient(training, device):
    given = arguments(device)
    weight, bias = (given[name].requires_grad_() for name in ("weight", "bias"))
    x = torch.randn(4, 3, device=device)
    with_input = x.clone().requires_grad_()
    expected, actual = (
        torch.autograd.grad(ops.batch_norm(one, **given, training=training).sum(), [weight, bias])
        for one in (with_input, x)
    )
    assert_close(actual, expected, rtol=0, atol=0)


def test_peer_defect_8_statistics_of_float16(device):
    """Mean and deviation are no numbers of float16: their rounding would be 1 % of the output."""
    x = (torch.randn(64, 2, device=device) * 0.25 + 100).half()
    y = ops.batch_norm(x, None, None, training=True)
    assert_close(
        y, F.batch_norm(x.double(), None, None, training=True).half(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_peer_defect_14_no_parameter_is_left_without_gradient(layer, device):
    """A warning would be an error here."""
    one = getattr(nn, layer)(2).to(device)
    one(torch.randn(3, 2, *(2,) * int(layer[-2]), device=device)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in one.parameters())


def test_peer_defect_15_one_value_per_channel(device):
    given = arguments(device)
    kept = {name: value.clone() for name, value in given.items()}
    with pytest.raises(ValueError, match="more than one value per channel"):
        ops.batch_norm(torch.ones(1, 3, 1, device=device), **given, training=True)
    assert_close(given, kept, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 3, 7), (3, 6, 1, 1), (2, 1, 9, 2)])
def test_peer_defect_18_training_by_default_is_not_evaluation(shape, training, device):
    """Forward, both modes, odd shapes, channels_last, and statistics that are not the batch's."""
    x = (torch.randn(shape) * 3 + 2).to(memory_format=torch.channels_last)
    grad, results = torch.randn(shape), []
    for function, place in ((ops.batch_norm, device), (F.batch_norm, "cpu")):
        given = {name: value.to(place) for name, value in arguments("cpu", shape[1]).items()}
        leaves = [x.to(place), given["weight"], given["bias"]]
        leaves[0] = leaves[0].detach()
        for leaf in leaves:
            leaf.requires_grad_()
        y = function(leaves[0], given["running_mean"], given["running_var"], *leaves[1:], training)
        grads = torch.autograd.grad(y, leaves, grad.to(place))
        found = [y.detach(), *grads, given["running_mean"], given["running_var"]]
        results.append([one.cpu() for one in found])
    assert_close(*results, rtol=1e-5, atol=1e-5)


def test_peer_defect_17_no_load_without_other():
    """What a masked load without it gives is undefined on a GPU, and feeds the sums."""
    folder = Path(__file__).resolve().parent.parent / "kernels"
    loads = [
        (file.name, node.lineno, {keyword.arg for keyword in node.keywords})
        for file in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    assert loads
    assert not [place for *place, given in loads if "mask" in given and "other" not in given]
