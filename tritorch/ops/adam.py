"""Adam's and AdamW's update of many tensors: reference, launches, declaration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import multi_tensor
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("adam")


class _Lists(NamedTuple):
    """Parallel lists of tensors; without amsgrad that of maxima is empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


@torch.no_grad()
def adam_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    capturable: bool = False,
) -> None:
    """One tensor after the other, as torch's own loop does it."""
    maxima: Sequence[Tensor | None] = max_exp_avg_sqs if amsgrad else [None] * len(params)
    lists = (params, grads, exp_avgs, exp_avg_sqs, maxima, steps)
    for param, grad, exp_avg, exp_avg_sq, largest, step in zip(*lists, strict=True):
        step += 1
        if maximize:
            grad = -grad
        if weight_decay and decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        elif weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if largest is not None:
            torch.maximum(largest, exp_avg_sq, out=largest)
        correction1, correction2 = _corrections(step.item(), beta1, beta2)
        root = (exp_avg_sq if largest is None else largest).sqrt() / math.sqrt(correction2)
        param.addcdiv_(exp_avg, root.add_(eps), value=-lr / correction1)


def _corrections(step: float, beta1: float, beta2: float) -> tuple[float, float]:
    """The bias corrections 1 - beta^step of averages that started at 0."""
    return 1 - beta1**step, 1 - beta2**step


@binding.library_op(
    "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool amsgrad, bool maximize, "
    "bool decoupled_weight_decay, bool capturable) -> ()",
    fake=lambda *arguments: None,
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    capturable: bool,
) -> None:
    if multi_tensor.is_captured(params[0]):
        checks.fail(RuntimeError, "adam_step", "a captured graph would outlive the table it reads")
    lists = _Lists(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    scalars = (lr, beta1, beta2, eps, weight_decay)
    flags = {
        "AMSGRAD": amsgrad,
        "HAS_WEIGHT_DECAY": weight_decay != 0,
        "DECOUPLED": decoupled_weight_decay,
        "MAXIMIZE": maximize,
    }
    if capturable:
        corrections = _corrections_on_device(steps, beta1, beta2)
        _launch(lists, corrections, *scalars, 1.0, 1.0, **flags)
        return
    # a number would become a tensor for each step; `alpha` selects the overload for one tensor
    torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)
    # tensors whose first gradients came together have the same step
    groups: dict[float, list[int]] = {}
    for index, step in enumerate(steps):
        groups.setdefault(step.item(), []).append(index)
    for value, indices in groups.items():
        group = lists if len(groups) == 1 else multi_tensor.chosen(lists, indices)
        _launch(group, None, *scalars, *_corrections(value, beta1, beta2), **flags)


def _corrections_on_device(steps: list[Tensor], beta1: float, beta2: float) -> Tensor:
    """Adds 1 to the steps and returns their bias corrections, two rows of float64."""
    count = len(steps)
    place = multi_tensor.place(steps[0])
    addresses = multi_tensor.table(*place, multi_tensor.addresses(steps, count))
    corrections = torch.empty((2, count), dtype=torch.float64, device=steps[0].device)
    _plan_corrections(count)(steps[0], addresses, corrections, floats=(beta1, beta2))
    launch.count_write(*steps)
    return corrections


@launch.planned
def _plan_corrections(count: int) -> launch.Prepared:
    return launch.Prepared(
        kernels.adam_corrections_kernel,
        (math.ceil(count / kernels.CORRECTIONS_BLOCK),),
        (count,),
        BLOCK=kernels.CORRECTIONS_BLOCK,
        num_warps=4,
    )


def _launch(lists: _Lists, corrections: Tensor | None, *scalars: float, **flags: bool) -> None:
    like = lists.params[0]
    written = [lists.params, lists.exp_avgs, lists.exp_avg_sqs]
    if flags["AMSGRAD"]:
        written.append(lists.max_exp_avg_sqs)
    dense = multi_tensor.dense(lists.params)
    walked = [dense, *(multi_tensor.paired(tensors, dense) for tensors in written[1:])]
    config = launch.config(kernels.adam_step_config, like.element_size())
    place = multi_tensor.place(like)
    counts = tuple([param.numel() for param in dense])
    owners, firsts, programs = multi_tensor.programs(counts, config.kwargs["BLOCK"], *place)
    columns = [dense, multi_tensor.paired(lists.grads, dense), *walked[1:], []]
    rows = [multi_tensor.addresses(tensors, len(counts)) for tensors in columns[:5]]
    table = multi_tensor.table(*place, *rows, counts, firsts)
    run = _plan(config, programs, len(counts), tuple(flags.items()))
    run(like, like, owners, table, corrections, floats=scalars)
    for tensors, copies in zip(written, walked, strict=True):
        multi_tensor.write_back(tensors, copies)


@launch.planned
def _plan(
    config: Any, programs: int, tensors: int, flags: tuple[tuple[str, bool], ...]
) -> launch.Prepared:
    return launch.Prepared(kernels.adam_step_kernel, (programs,), (tensors,), config, **dict(flags))


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    capturable: bool = False,
) -> None:
    """One step of Adam, in place, in one launch for each dtype, device and count of steps.

    With t = step + 1 and g = grad, negated by `maximize`, plus weight_decay * param:

        exp_avg    = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
        v          = exp_avg_sq, with `amsgrad` the largest so far
        param      = param - lr / (1 - beta1^t) * exp_avg / (sqrt(v / (1 - beta2^t)) + eps)

    `decoupled_weight_decay` (AdamW) leaves g alone and takes lr * weight_decay * param from param.
    The kernels keep all of it in float32 (float64 for float64) and round what they write once;
    torch's loop rounds after every operation.  The bias corrections are of float64.  Nothing is
    recorded for autograd, and the version counters of written tensors increase.

    Args:
        params: any shapes, mixed dtypes; the kernels take float32, float16, bfloat16 and float64.
        grads, exp_avgs, exp_avg_sqs: one for each parameter, of its shape and device.
        max_exp_avg_sqs: likewise; without `amsgrad` they are ignored, and the list may be empty.
        steps: for each parameter a tensor of one element, the number of steps so far; the call
            adds 1.
        capturable: the steps are float32 on the parameters' device, and the host does not wait for
            them; otherwise they are best on the CPU.

    Tensors that do not lie in memory like a dense parameter are copied there and back.

    Raises:
        ValueError: the lists differ in length.
        RuntimeError: a shape or a device differs, or what is written is expanded.

    Source: `torch.optim.Adam`, `torch.optim.AdamW`.
    """
    maxima = list(max_exp_avg_sqs) if amsgrad else []
    lists = _Lists(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), maxima, list(steps)
    )
    _check(lists, amsgrad)
    scalars: dict[str, Any] = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay,
        "capturable": capturable,
    }
    for group in multi_tensor.by_dtype_and_device(lists):
        takes = backend.runs_triton(
            "adam_step", *group.params, declined=_declined(group, capturable)
        )
        step = _adam_step_ if takes else adam_step_reference
        step(*group, **scalars)


def _check(lists: _Lists, amsgrad: bool) -> None:
    others = {name: getattr(lists, name) for name in ("grads", "exp_avgs", "exp_avg_sqs")}
    if amsgrad:
        others["max_exp_avg_sqs"] = lists.max_exp_avg_sqs
    written = (*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.max_exp_avg_sqs)
    multi_tensor.check_lists("adam_step", lists.params, written, **others)
    if len(lists.steps) != len(lists.params):
        counts = {"params": len(lists.params), "steps": len(lists.steps)}
        checks.fail(ValueError, "adam_step", "expected as many steps as params", **counts)
    for step in lists.steps:
        if step.numel() != 1:
            checks.fail(RuntimeError, "adam_step", "a step must be one number", step=step)


def _declined(lists: _Lists, capturable: bool) -> str | None:
    like = lists.params[0]
    averages = (*lists.grads, *lists.exp_avgs, *lists.exp_avg_sqs, *lists.max_exp_avg_sqs)
    declined = multi_tensor.declined(lists.params, averages, "an average")
    if declined is None and capturable:
        kinds = {(step.dtype, step.device) for step in lists.steps}
        if kinds - {(torch.float32, like.device)}:
            return "a step that is not float32 on its parameter's device"
    return declined


def _made(
    make: Callable[..., Tensor], step: float, *shapes: tuple[int, ...], **scalars: float
) -> dict[str, Any]:
    """`step` of all tensors; the averages of squares are positive."""

    def squares(shape: tuple[int, ...]) -> Tensor:
        return make(*shape, low=0.25, high=2.0) if isinstance(make, Maker) else make(*shape)

    # `make` would put steps on the parameters' device, where the host waits for them
    made: dict[str, Any] = {
        "params": [make(*shape) for shape in shapes],
        "grads": [make(*shape) for shape in shapes],
        "exp_avgs": [make(*shape) for shape in shapes],
        "exp_avg_sqs": [squares(shape) for shape in shapes],
        "max_exp_avg_sqs": [squares(shape) for shape in shapes] if scalars.get("amsgrad") else [],
        "steps": [torch.tensor(step) for _ in shapes],
    }
    return made | {"lr": 0.1} | scalars


def _samples(make: Maker) -> Iterator[Sample]:
    # a program takes 512 or 1024 elements
    edges = ((1,), (0, 3), (), (1023,), (1025,), (3, 5, 7))
    yield Sample("plain", **_made(make, 3.0, *edges))
    yield Sample("first", **_made(make, 0.0, (7,), (5, 3), beta1=0.0, weight_decay=0.1))
    yield Sample(
        "decoupled", **_made(make, 1.0, (7, 5), weight_decay=0.1, decoupled_weight_decay=True)
    )
    images = _made(make, 2.0, (2, 3, 5, 7), (31,), amsgrad=True, weight_decay=0.1, maximize=True)
    yield Sample("amsgrad", layouts=True, **images)
    # a slice of a flat parameter starts anywhere
    flat = _made(make, 2.0, (1100,), amsgrad=True, beta2=0.9)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    yield Sample("misaligned", **flat | {name: [flat[name][0][1:]] for name in names})
    apart = _made(make, 0.0, (2, 3), (4,), (5,))
    apart["steps"] = [torch.tensor(step) for step in (0.0, 7.0, 0.0)]
    yield Sample("steps-apart", **apart)
    on_device = _made(make, 0.0, (2, 3), (1030,), capturable=True, beta1=0.0)
    on_device["steps"] = [make.float32(low=n, high=n) for n in (0.0, 4.0)]
    yield Sample("capturable", **on_device)
    yield Sample("none", **_made(make, 0.0))


def _workloads(make: Maker) -> Iterator[Sample]:
    empty, shapes = make.empty, multi_tensor.resnet50_shapes()
    adamw = {"weight_decay": 0.01, "decoupled_weight_decay": True}
    yield Sample("resnet50-adamw", **_made(empty, 3.0, *shapes, **adamw))
    odd = _made(empty, 3.0, (4099, 4097), amsgrad=True, weight_decay=0.01, capturable=True)
    odd["steps"] = [make.float32(low=3.0, high=3.0)]
    yield Sample("one-odd-amsgrad", **odd)


def _rejects(make: Maker) -> Iterator[Reject]:
    good, four = _made(make, 0.0, (3,), amsgrad=True), [make(4)]
    yield Reject("fewer-grads", r"as many grads.*params 1, grads 0", **good | {"grads": []})
    yield Reject("fewer-maxima", r"as many max_exp_avg_sqs", **good | {"max_exp_avg_sqs": []})
    yield Reject("fewer-steps", r"as many steps", **good | {"steps": []})
    yield Reject("grad-shape", r"expected grads.*\(3,\).*\(4,\)", **good | {"grads": four})
    yield Reject("average-shape", r"expected exp_avgs.*\(4,\)", **good | {"exp_avgs": four})
    yield Reject("step-size", r"step must be one number", **good | {"steps": [torch.ones(2)]})
    yield Reject("expanded", r"expanded tensor", **good | {"params": [make(1).expand(3)]})


def _cost(
    params: list[Tensor], *lists: Any, amsgrad: bool = False, **options: Any
) -> dict[str, Cost]:
    flops = 13 + amsgrad + 2 * bool(options.get("weight_decay")) + bool(options.get("maximize"))
    numel = sum(param.numel() for param in params)
    size = sum(param.numel() * param.element_size() for param in params)
    return {"forward": Cost(flops * numel, (9 if amsgrad else 7) * size), "backward": Cost(0, 0)}


register(
    OpSpec(
        name="adam_step",
        op=adam_step,
        reference=adam_step_reference,
        kernels=("adam.adam_step_kernel", "adam.adam_corrections_kernel"),
        gradients=(),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.optim.Adam, torch.optim.AdamW",
        mutates=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
        double_backward=False,
        non_finite=(),
        notes="the update of tritorch.optim.Adam and AdamW",
    )
)
