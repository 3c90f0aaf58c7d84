"""A step of Adam and AdamW of tritorch.optim against torch.optim's, on both paths."""

import itertools

import pytest
import torch
from torch import nn

from tests.optimizers import KINDS, NAMES, Run, assert_close, both, normal
from tests.optimizers import fallbacks as fallbacks
from tests.optimizers import kernels as kernels
from tritorch import launch, ops, optim
from tritorch.testing import tolerances

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

# every combination of what changes the arithmetic
OPTIONS = [
    {"weight_decay": w, "amsgrad": a, "maximize": m, "betas": b}
    for w, a, m, b in itertools.product(
        (0.0, 0.1), (False, True), (False, True), ((0.9, 0.999), (0.0, 0.95))
    )
]


def name_of(given):
    return "-".join(f"{name}={value}" for name, value in given.items() if value)


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
