"""Adam and AdamW of tritorch.optim against torch.optim's, on both paths."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tritorch import backend, launch, ops, optim
from tritorch.testing import tolerances

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

NAMES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
KINDS = pytest.mark.parametrize("kind", ["Adam", "AdamW"])

# every combination of what changes the arithmetic
OPTIONS = [
    {"weight_decay": w, "amsgrad": a, "maximize": m, "betas": b}
    for w, a, m, b in itertools.product(
        (0.0, 0.1), (False, True), (False, True), ((0.9, 0.999), (0.0, 0.95))
    )
]


def name_of(given):
    return "-".join(f"{name}={value}" for name, value in given.items() if value)


@pytest.fixture
def kernels(rung):
    """Whether this rung runs the kernels: then no call may leave them."""
    backend.reset()
    yield rung != "reference"
    assert backend.explain() == {}


@pytest.fixture
def fallbacks(rung):
    """Returns the reasons for which steps left the kernels; none are counted where none run."""
    backend.reset()
    yield lambda: list(backend.explain().get("adam_step", {})) if rung != "reference" else None
    backend.reset()


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Run:
    """Parameters, an optimizer, and gradients that depend on the step alone."""

    def __init__(
        self,
        module,
        kind,
        device,
        shapes=((3, 4), (1030,)),
        dtype=torch.float32,
        like=None,
        **given,
    ):
        # what a narrower type holds, for a run in a wider one
        self.values = lambda shape, seed: normal(shape, seed).to(like or dtype).to(device, dtype)
        self.params = [nn.Parameter(self.values(shape, i)) for i, shape in enumerate(shapes)]
        self.optimizer = getattr(module, kind)(self.params, **{"lr": 0.1} | given)
        self.steps = 0

    def set_grads(self, but=()):
        self.steps += 1
        for i, param in enumerate(self.params):
            grad = self.values(param.shape, 100 * self.steps + i)
            param.grad = None if i in but else grad

    def step(self, times=1, but=()):
        for _ in range(times):
            self.set_grads(but)
            self.optimizer.step()
        return self

    def tensors(self):
        """Parameters and averages by name."""
        found = {f"parameter {i}": param for i, param in enumerate(self.params)}
        for i, param in enumerate(self.params):
            state = self.optimizer.state.get(param, {})
            found |= {f"{name} {i}": tensor for name, tensor in state.items()}
        return found


def both(kind, device, **given):
    return Run(optim, kind, device, **given), Run(torch.optim, kind, device, **given)


def assert_close(ours, torchs, **options):
    found, expected = ours.tensors(), torchs.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = expected[name]
        assert (tensor.dtype, tensor.device) == (other.dtype, other.device), name
        # a step, in one launch and in several roundings
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=2e-6, msg=name, **options)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("given", OPTIONS, ids=name_of)
@KINDS
def test_trajectory_is_torchs_up_to_rounding(kind, given, dtype, device, kernels):
    shapes = ((3, 4), (1030,))
    # float16 has no room for the default, nor for gradients squared
    options = {"shapes": shapes, "eps": 1e-4, **given}
    ours = Run(optim, kind, device, dtype=dtype, **options).step(4)
    torchs = Run(torch.optim, kind, device, dtype=dtype, foreach=False, **options).step(4)
    wide = {"dtype": torch.float64, "like": dtype}
    truth = Run(torch.optim, kind, "cpu", **wide, foreach=False, **options).step(4)
    expected, baseline = truth.tensors(), torchs.tensors()
    assert ours.tensors().keys() == expected.keys()
    for name, tensor in ours.tensors().items():
        if not kernels or name.startswith("step"):
            assert torch.equal(tensor, baseline[name]), name
            continue
        verdict = tolerances.compare(
            tensor.cpu(), expected[name].double(), baseline=baseline[name].cpu(), terms=4 * 8
        )
        assert verdict.accepted, f"{name}: {verdict.failure}"


def test_ties_of_a_short_average_are_not_all_rounded_to_one_side(device):
    """A tenth of such sums lies halfway between two numbers of the type, but for the last bits."""
    param, grad, average = (normal((20_000,), seed).bfloat16() for seed in range(3))
    truth = (0.9 * average.double() + 0.1 * grad.double()).bfloat16()
    lists = [[each.clone().to(device)] for each in (param, grad, average, average.abs())]
    ops.adam_step(*lists, [], [torch.zeros((), device=device)], lr=0.1)
    found = lists[2][0].cpu()
    assert (found != truth).double().mean() < 1e-3


@KINDS
def test_checkpoints_go_both_ways(kind, device, kernels):
    given = {"weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.75), "maximize": True}
    expected = Run(torch.optim, kind, device, **given).step(3)
    for order in ((torch.optim, optim, torch.optim), (optim, torch.optim, optim)):
        previous = None
        for module in order:
            # every option comes from the checkpoint
            run = Run(module, kind, device, **given if previous is None else {"lr": 4.0})
            if previous is not None:
                run.optimizer.load_state_dict(copy.deepcopy(previous.optimizer.state_dict()))
                run.steps = previous.steps
                for param, other in zip(run.params, previous.params, strict=True):
                    param.data.copy_(other.data)
            previous = run.step()
        assert_close(previous, expected)


@pytest.mark.parametrize("amsgrad", [False, True])
@KINDS
def test_state_dict_is_torchs(kind, amsgrad, device, kernels):
    ours, torchs = (
        run.step(2).optimizer.state_dict() for run in both(kind, device, amsgrad=amsgrad)
    )
    assert ours["param_groups"] == torchs["param_groups"]
    assert ours["state"].keys() == torchs["state"].keys()
    for number, state in torchs["state"].items():
        mine = ours["state"][number]
        assert mine.keys() == state.keys() == STATE - (set() if amsgrad else {"max_exp_avg_sq"})
        assert mine["step"].dtype == torch.float32
        assert mine["step"].device.type == "cpu"
        assert mine["step"] == 2
        assert not mine["exp_avg"].requires_grad


@KINDS
def test_one_launch_for_each_dtype(kind, device, kernels):
    mixed = [nn.Parameter(torch.ones(3, dtype=dtype, device=device)) for dtype in [*NAMES, *NAMES]]
    optimizer = getattr(optim, kind)(mixed, lr=0.5)
    for param in mixed:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with launch.recorded() as launches:
            optimizer.step()
        assert len(launches) == kernels * len(NAMES)


@KINDS
def test_a_gradient_that_comes_later_has_a_step_of_its_own(kind, device, kernels):
    shapes = ((3, 4), (5,), (2, 2))
    ours, torchs = both(kind, device, shapes=shapes, weight_decay=0.1)
    for but, launches in (({0}, 1), (set(), 2), ({1}, 2), ({0, 1, 2}, 0)):
        with launch.recorded() as recorded:
            ours.step(but=but)
        assert len(recorded) == launches * kernels, but
        torchs.step(but=but)
    assert_close(ours, torchs)
    assert [ours.optimizer.state[p]["step"].item() for p in ours.params] == [2, 2, 3]


def test_parameter_groups(device, kernels):
    ours, torchs = both("AdamW", device)
    for run in (ours, torchs):
        run.step()
        added = [nn.Parameter(run.values(shape, 50)) for shape in ((5,), (2, 2))]
        run.params += added
        run.optimizer.add_param_group({"params": added, "lr": 0.25, "amsgrad": True, "eps": 1e-3})
    with launch.recorded() as launches:
        ours.step()
    assert len(launches) == 2 * kernels
    torchs.step()
    assert_close(ours, torchs)


def test_any_layout_of_parameter_gradient_and_averages(device, kernels):
    def layouts(module):
        images, flat = normal((2, 3, 4, 5), 1).to(device), normal((40,), 2).to(device)
        values = [images.to(memory_format=torch.channels_last), images.clone(), flat.clone()[::2]]
        params = [nn.Parameter(value) for value in (*values, flat.clone()[1:39])]
        optimizer = module.Adam(params, amsgrad=True, weight_decay=0.1)
        for step in range(3):
            for param in params:
                param.grad = normal(param.shape, step).to(device)
            params[1].grad = params[1].grad.to(memory_format=torch.channels_last)
            optimizer.step()
        averages = [optimizer.state[param]["exp_avg"] for param in params]
        return params + averages, [tensor.stride() for tensor in params + averages]

    ours, torchs = layouts(optim), layouts(torch.optim)
    torch.testing.assert_close(ours[0], torchs[0], rtol=1e-5, atol=1e-6)
    assert ours[1] == torchs[1]


def test_a_steady_step_copies_no_tensor_and_builds_no_table(device, kernels):
    params = [nn.Parameter(normal(shape, 0).to(device)) for shape in ((2, 3), (5,))]
    optimizer = optim.AdamW(params, amsgrad=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = {event.name for event in profile.events()}
    # lift_fresh is what torch.tensor calls
    unwanted = {"aten::clone", "aten::empty_like", "aten::lift_fresh"}
    assert not names & unwanted or not kernels


def test_autograd_sees_the_write_and_records_nothing(device, kernels):
    run = Run(optim, "Adam", device, amsgrad=True).step()
    written = list(run.tensors().values())
    before = [tensor._version for tensor in written]
    loss = run.params[0].square().sum()
    run.step()
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    assert all(param.is_leaf and param.requires_grad for param in run.params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_on_the_device_are_the_kernels_to_read(device, kernels):
    """`capturable`: numbers that the host never sees give the same update."""

    def stepped(capturable):
        values = [normal((1030,), i).to(device) for i in range(3)]
        lists = [[value.clone()] for value in values] + [[values[2].square()], [values[1].square()]]
        steps = [torch.tensor(4.0, device=device if capturable else "cpu")]
        options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "capturable": capturable}
        with launch.recorded() as launches:
            ops.adam_step(*lists, steps, **options)
        assert len(launches) == (1 + capturable) * kernels
        return [tensor.cpu() for tensors in (*lists, steps) for tensor in tensors]

    torch.testing.assert_close(stepped(True), stepped(False), rtol=1e-6, atol=1e-7)


@KINDS
def test_grad_scaler(kind, device, kernels):
    def scaled(module):
        run = Run(module, kind, device)
        scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
        scales = []
        for step in range(4):
            run.set_grads()
            for param in run.params:
                param.grad.mul_(scaler.scale(torch.ones((), device=device)))
            if step == 1:
                run.params[0].grad[0, 0] = float("inf")
            if step == 2:
                scaler.unscale_(run.optimizer)
                nn.utils.clip_grad_value_(run.params, 2.0)
            scaler.step(run.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return run, scales

    (ours, scales), (torchs, expected) = scaled(optim), scaled(torch.optim)
    assert_close(ours, torchs)
    assert scales == expected == [4.0, 2.0, 2.0, 2.0]
    # the step that met infinity is none
    assert ours.tensors()["step 0"] == 3


def test_compiled_step(device, kernels):
    pair = both("AdamW", device, amsgrad=True)
    torch.compiler.reset()
    for each in pair:
        # torch's compiler makes an optimizer of CUDA tensors capturable, its steps on the GPU
        step = torch.compile(each.optimizer.step, backend="aot_eager")
        for _ in range(3):
            each.set_grads()
            step()
    assert_close(*pair)


def test_closure_hooks_and_copies(device, kernels):
    run = Run(optim, "AdamW", device)
    seen = []
    run.optimizer.register_step_pre_hook(lambda *arguments: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *arguments: seen.append("after"))

    def closure():
        run.optimizer.zero_grad()
        loss = run.params[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert run.optimizer.step(closure) > 0
    assert seen == ["before", "after"]
    copied = copy.deepcopy(run)
    assert_close(copied.step(), run.step())
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert repr(run.optimizer) == repr(Run(torch.optim, "AdamW", device).optimizer)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, torch.tensor(0.5))},
        {"weight_decay": -0.5},
        {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
        {"params": []},
    ],
    ids=str,
)
@KINDS
def test_bad_arguments_raise_torchs_error(kind, given, device):
    arguments = {"params": [nn.Parameter(torch.ones(3, device=device))]} | given
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        getattr(torch.optim, kind)(**arguments)
    with pytest.raises(expected.type) as ours:
        getattr(optim, kind)(**arguments)
    assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"foreach": False}, "foreach=False"),
        ({"fused": True}, "fused=True"),
        ({"lr": torch.tensor(0.05, requires_grad=True)}, "lr is a tensor"),
    ],
    ids=["foreach", "fused", "lr"],
)
def test_torchs_own_step_takes_what_the_kernels_do_not(given, reason, device, fallbacks):
    theirs = Run(torch.optim, "Adam", device, **given).step(2)
    with launch.recorded() as launches:
        ours = Run(optim, "Adam", device, **given).step(2)
    assert launches == []
    assert_close(ours, theirs)
    reasons = fallbacks()
    assert reasons is None or [text.startswith(reason) for text in reasons] == [True]


def test_numbers_that_are_tensors(device, kernels):
    def given():
        return {"lr": torch.tensor(0.05), "betas": (torch.tensor(0.5), torch.tensor(0.75))}

    ours = Run(optim, "Adam", device, **given()).step(3)
    assert_close(ours, Run(torch.optim, "Adam", device, **given()).step(3))


def test_sparse_gradients_and_steps_off_the_device_raise_torchs_error(device, fallbacks):
    messages = []
    for module in (optim, torch.optim):
        run = Run(module, "Adam", device)
        run.set_grads()
        run.params[0].grad = run.params[0].grad.to_sparse()
        with pytest.raises(RuntimeError, match="sparse gradients") as error:
            run.optimizer.step()
        messages.append(str(error.value))
    if device == "cpu":
        for module in (optim, torch.optim):
            with pytest.raises(AssertionError, match="capturable=True") as error:
                Run(module, "Adam", device, capturable=True).step()
            messages.append(str(error.value))
    assert messages[0::2] == messages[1::2]


def test_complex_parameters_go_to_torch(device, fallbacks):
    params = [nn.Parameter(torch.full((3,), 1 + 2j, device=device)) for _ in range(2)]
    for param, module in zip(params, (optim, torch.optim), strict=True):
        param.grad = torch.full_like(param, 2 - 1j)
        module.Adam([param], lr=0.5).step()
    assert torch.equal(*params)
    assert fallbacks() in (None, ["dtype complex64"])
