"""What torch's dispatcher knows of the library: classes of autocast, and none of torch's ops."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritorch.ops
from tritorch import backend, nn, ops
from tritorch.registry import specs

# by torch's documentation of autocast on a GPU; what is in neither keeps the dtypes of its input
LOWER = [
    "linear",
    "matmul",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "conv2d_batch_norm",
]
FLOAT32 = [
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "nll_loss",
    "cross_entropy",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "layer_norm",
    "group_norm",
]
# float32 on a GPU alone, where the tests of a GPU see it
FLOAT32_ON_A_GPU = ("softmax", "log_softmax")


@pytest.mark.reference
def test_classes_of_autocast_are_torchs():
    classes = {spec.name: spec.autocast for spec in specs()}
    assert {name for name, kind in classes.items() if kind == "lower"} == set(LOWER)
    assert {name for name, kind in classes.items() if kind == "float32"} == set(FLOAT32)


@pytest.mark.cuda
@pytest.mark.parametrize("name", FLOAT32_ON_A_GPU)
def test_softmax_is_float32_under_autocast_of_a_gpu(name):
    x = torch.randn(3, 5, device="cuda", dtype=torch.float16)
    with torch.autocast("cuda"):
        ours, theirs = getattr(ops, name)(x, 1), getattr(F, name)(x, 1)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


CALLS = {
    "linear": ((3, 4), (5, 4)),
    "matmul": ((3, 4), (4, 5)),
    "conv2d": ((2, 3, 5, 4), (4, 3, 3, 2)),
    "conv_transpose2d": ((2, 3, 4, 3), (3, 4, 2, 2)),
    "mse_loss": ((3, 4), (3, 4)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_is_computed_in_the_state_of_its_forward_pass(name, device):
    """Whatever autocast is on when it runs: none, or that of another dtype."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in CALLS[name]]
    found = []
    for enabled in (False, True):
        one = [leaf.clone().requires_grad_() for leaf in leaves]
        with torch.autocast(device, dtype=torch.bfloat16):
            y = getattr(ops, name)(*one)
        grad = torch.ones_like(y) / 3
        with torch.autocast(device, dtype=torch.float16, enabled=enabled):
            first = torch.autograd.grad(y, one, grad, create_graph=True)
            second = torch.autograd.grad(sum(g.float().square().sum() for g in first), one)
        found.append([*first, *second])
    assert [g.dtype for g in found[0]] == [torch.float32] * 4
    for without, within in zip(*found, strict=True):
        assert torch.equal(without, within)


@pytest.mark.reference
@pytest.mark.parametrize("key", ["CPU", "CUDA", "AutogradCUDA"])
def test_peer_defect_14_no_op_of_torchs_is_overridden(key):
    """A composite that is, without a gradient of its own, leaves parameters without theirs."""
    names = "linear conv2d conv_transpose2d.input batch_norm cross_entropy_loss layer_norm"
    for name in names.split():
        # a composite is registered for all keys at once
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


@pytest.mark.interpret
def test_a_plain_call_launches_past_the_dispatcher(device, monkeypatch):
    def never(*arguments):
        raise AssertionError("the dispatcher was asked")

    x = torch.randn(3, 5, device=device)
    op = torch.ops.tritorch.activation_forward.default
    monkeypatch.setattr(op, "_op", never)
    torch.testing.assert_close(ops.relu(x), F.relu(x))


@pytest.mark.interpret
def test_who_listens_hears_of_library_ops(device):
    x = torch.randn(3, 5, device=device, requires_grad=True)
    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listener():
        ops.relu(x).sum().backward()
    ours = [name for name in seen if name.startswith("tritorch")]
    assert ours == ["tritorch.activation_forward.default", "tritorch.activation_backward.default"]

    with torch.profiler.profile() as profile:
        ops.relu(x)
    assert "tritorch::activation_forward" in {event.name for event in profile.events()}


LAYERS = {
    "conv": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
    "max-pool": lambda: nn.MaxPool2d(2),
    "avg-pool": lambda: nn.AvgPool2d(3, stride=1),
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "norm": lambda: nn.BatchNorm2d(3),
    "linear": lambda: nn.Linear(6, 2),
    "relu": lambda: nn.ReLU(),
    "softmax": lambda: nn.Softmax(1),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", LAYERS)
# it warns of every size that is looked at
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_trace_records_torchs_own_ops(name, device):
    layer = LAYERS[name]().to(device).eval()
    backend.reset()
    traced = torch.jit.trace(layer, (torch.randn(2, 3, 5, 6, device=device),))
    assert backend.explain()
    assert all(set(why) == {"torch.jit.trace is recording"} for why in backend.explain().values())
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(kind.startswith("tritorch") for kind in kinds)
    other = torch.randn(2, 3, 5, 6, device=device)
    torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.interpret
def test_negated_views_are_read_as_what_they_stand_for(device):
    x = torch.randn(3, 5, device=device)
    torch.testing.assert_close(ops.relu(torch._neg_view(x)), F.relu(-x))
    y = ops.linear(torch._neg_view(x), torch.ones(2, 5, device=device))
    torch.testing.assert_close(y, -x.sum(1, keepdim=True).expand(3, 2))


@pytest.mark.interpret
def test_a_class_that_computes_by_itself_hears_of_torchs_ops(device):
    class Wrapped(TwoTensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func.namespace == "tritorch":
                raise NotImplementedError(func)
            return super().__torch_dispatch__(func, types, args, kwargs)

    x = torch.randn(3, 5, device=device)
    backend.reset()
    with backend.use("triton"):
        y = ops.relu(Wrapped(x, -x))
    assert backend.explain() == {"relu": {"a Wrapped, which computes torch's ops by itself": 1}}
    torch.testing.assert_close(y.a, F.relu(x))
    torch.testing.assert_close(y.b, F.relu(-x))


class Lowered(torch.Tensor):
    """A weight of fewer bits, of which torch's own functions make a product."""

    @staticmethod
    def __new__(cls, bits):
        return torch.Tensor._make_wrapper_subclass(cls, bits.shape, dtype=torch.float32)

    def __init__(self, bits):
        self.bits = bits

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], args[1].bits.float(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Lowered(args[0].bits)
        raise NotImplementedError(func)


@pytest.mark.interpret
def test_a_weight_that_says_its_own_product_is_asked_for_it(device):
    layer = tritorch.nn.Linear(5, 4)
    bits = torch.randint(-8, 8, (4, 5), dtype=torch.int8)
    layer.weight = torch.nn.Parameter(Lowered(bits), requires_grad=False)
    x = torch.randn(3, 5)
    with backend.use("triton"):
        torch.testing.assert_close(layer(x), F.linear(x, bits.float(), layer.bias))


class Named(torch.Tensor):
    """A class with a name alone: its memory is read as any other's."""


class Passing(torch.Tensor):
    """A class that hears of torch's functions, and calls them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.interpret
@pytest.mark.parametrize("kind", [Named, Passing])
def test_a_class_that_computes_nothing_runs_the_kernels(kind, device):
    x = torch.randn(3, 5, device=device).as_subclass(kind)
    with backend.use("triton"), backend.strict():
        y = ops.relu(x)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.relu(x.as_subclass(torch.Tensor)))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["relu", "silu", "conv", "linear", "max-pool", "global", "norm"])
def test_batched_gradients_are_torchs(name, device):
    """The tensors are of torch's own class, and without memory of their own."""
    layer = {**LAYERS, "silu": lambda: nn.SiLU()}[name]().to(device).eval()
    grads = []
    for path in ("auto", "reference"):
        with backend.use(path):
            x = torch.linspace(-2, 2, 180, device=device).view(2, 3, 5, 6).requires_grad_()
            y = layer(x)
            many = torch.linspace(-1, 1, 3 * y.numel(), device=device).view(3, *y.shape)
            grads += torch.autograd.grad(y, x, many, is_grads_batched=True)
    torch.testing.assert_close(*grads)


@pytest.mark.interpret
def test_zeros_without_memory_are_zeros(device):
    zeros = torch._efficientzerotensor((3, 4), device=device)
    torch.testing.assert_close(ops.relu(zeros), torch.zeros(3, 4, device=device))


@pytest.mark.interpret
def test_a_profiler_of_all_threads_hears_of_library_ops(device):
    x = torch.randn(3, 5, device=device)
    everybody = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(experimental_config=everybody) as profile:
        ops.relu(x)
    assert "tritorch::activation_forward" in {event.name for event in profile.events()}


@pytest.fixture
def mesh():
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_sharded_models_train_as_with_torch(name, mesh):
    found = []
    for home in (tritorch, torch):
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()
        model = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
        model = tritorch.convert(model) if home is tritorch else model
        parallelize_module(model, mesh, {"0": ColwiseParallel(output_layouts=Replicate())})
        fully_shard(model[3], mesh=mesh)
        optimizer = getattr(home.optim, name)(model.parameters(), lr=0.1)
        x = torch.randn(6, 5)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found.append(losses)
    torch.testing.assert_close(found[0], found[1])
    assert found[1][2] < found[1][0]
