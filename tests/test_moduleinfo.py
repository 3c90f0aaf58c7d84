"""Every layer on the sample inputs and the bad inputs with which torch tests its own.

On the reference path all of them; through the kernels a few, spread over the list, and every bad
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from tests import databases, exclusions
from tests.databases import Finding, Result
from tritorch import nn
from tritorch.registry import FLOATING, specs

# inputs of a layer that go through the kernels, and the elements that one may have
FEW, ELEMENTS = 6, 1000
LAYERS = sorted({layer for spec in specs() for layer in spec.layers})


class Input(NamedTuple):
    """A layer as it is to be made, and one call of it."""

    made_with: tuple[tuple[Any, ...], dict[str, Any]]
    called_with: tuple[tuple[Any, ...], dict[str, Any]]
    dtype: torch.dtype
    device: str
    training: bool = True

    def make(self, layer: type[torch.nn.Module], *dtypes: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        args, kwargs = databases.copied(self.made_with)
        made = layer(*args, **kwargs).to(self.device)
        for dtype in (self.dtype, *dtypes):
            made = made.to(dtype)
        return made.train(self.training)


def entries(layer: str) -> list[Any]:
    return [info for info in databases.load()[1] if info.module_cls is getattr(torch.nn, layer)]


def inputs(info: Any, device: str, dtype: torch.dtype) -> Iterator[Input]:
    for training in (True, False):
        torch.manual_seed(0)
        for one in info.module_inputs_func(info, device, dtype, True, training):
            made, called = one.constructor_input, one.forward_input
            yield Input(
                (made.args, made.kwargs), (called.args, called.kwargs), dtype, device, training
            )


def run(layer: type[torch.nn.Module], one: Input, *, wide: bool = False) -> Result:
    """One training step, or an evaluation: outputs, gradients, parameters and buffers."""
    made = one.make(layer, *[torch.float64] * wide)
    called_with = databases.widened(one.called_with) if wide else one.called_with
    return databases.run(made, called_with, made.state_dict(keep_vars=True), gradients=True)


def compared(layer: str, one: Input, *, kernels: bool) -> list[Finding]:
    ours, theirs = getattr(nn, layer), getattr(torch.nn, layer)
    return databases.differences(
        lambda: run(ours, one),
        lambda: run(theirs, one),
        lambda: run(theirs, one, wide=True),
        lambda: printed(layer, one),
        kernels=kernels,
    )


def printed(layer: str, one: Input) -> str:
    mode = "train" if one.training else "eval"
    called = databases.printed(f".{mode}()", *one.called_with)
    return databases.printed(layer, *one.made_with) + called


def by_layer() -> pytest.MarkDecorator:
    chosen = [layer for layer in LAYERS if layer not in exclusions.WITHOUT_ENTRY]
    return pytest.mark.parametrize("layer", chosen)


def judge(layer: str, test: str, findings: list[Finding], device: str = "cpu") -> None:
    databases.judge(exclusions.of(layer, test, device), findings)


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    with databases.isolated():
        yield


@pytest.mark.reference
@by_layer()
def test_reference_path(layer: str) -> None:
    findings, count = [], 0
    for info in entries(layer):
        for dtype in set(info.supported_dtypes("cpu")) & set(FLOATING):
            for one in inputs(info, "cpu", dtype):
                findings += compared(layer, one, kernels=False)
                count += 1
    assert count
    judge(layer, "reference_path", findings)


@pytest.mark.interpret
@by_layer()
def test_kernels(layer: str, device: str) -> None:
    small = [
        one
        for info in entries(layer)
        for one in inputs(info, device, torch.float32)
        if sum(t.numel() for t in databases.tensors_of(one.called_with).values()) <= ELEMENTS
    ]
    assert small
    findings = []
    for one in databases.spread(small, FEW):
        findings += compared(layer, one, kernels=True)
    judge(layer, "kernels", findings, device)


def bad_inputs(layer: str, device: str) -> Iterator[Input]:
    for info in entries(layer):
        if info.module_error_inputs_func is not None:
            for bad in info.module_error_inputs_func(info, device, torch.float32, False, True):
                made = bad.module_error_input.constructor_input
                # none where the layer cannot even be made
                called = bad.module_error_input.forward_input
                called_with = (called.args, called.kwargs) if called else ((), {})
                yield Input((made.args, made.kwargs), called_with, torch.float32, device)


@pytest.mark.reference
@pytest.mark.interpret
@by_layer()
def test_bad_calls(layer: str, device: str) -> None:
    """Ours raises what torch does on the CPU, when the layer is made or when it is called."""

    def attempt(module: type[torch.nn.Module], one: Input) -> Result:
        def make_and_call(*args: Any, **kwargs: Any) -> Any:
            return one.make(module)(*args, **kwargs)

        return databases.run(make_and_call, one.called_with, gradients=False)

    findings = []
    for ours, theirs in zip(bad_inputs(layer, device), bad_inputs(layer, "cpu"), strict=True):
        findings += databases.differences(
            partial(attempt, getattr(nn, layer), ours),
            expected := partial(attempt, getattr(torch.nn, layer), theirs),
            expected,
            partial(printed, layer, ours),
            kernels=False,
        )
    judge(layer, "bad_calls", findings, device)


@pytest.mark.reference
def test_only_layers_without_an_entry_are_said_to_have_none() -> None:
    without = {layer for layer in LAYERS if not entries(layer)}
    assert without == exclusions.WITHOUT_ENTRY.keys() & set(LAYERS)
