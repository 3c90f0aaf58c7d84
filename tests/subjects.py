"""Ops in plain PyTorch, right ones and wrong ones, that the tests of the battery try."""

from dataclasses import replace

import torch

from tritorch.registry import Sample, Subject
from tritorch.testing.trials import Case

CASE = Case("typical", torch.float32)


def samples(make):
    yield Sample("typical", input=make(6, 5), weight=make(5, 7))
    yield Sample("tail", input=make(19, 3), weight=make(3, 16))
    yield Sample("empty", input=make(0, 5), weight=make(5, 7))


def product(input, weight):
    return input @ weight


# in plain PyTorch: what is tested here is what is said, and no kernel
PRODUCT = Subject(
    name="product",
    op=product,
    reference=product,
    gradients=("input", "weight"),
    samples=samples,
    accuracy="multilinear",
    non_finite=("input", "weight"),
)
CUBE = Subject(
    name="cube",
    op=lambda input: input**3,
    reference=lambda input: input**3,
    gradients=("input",),
    samples=lambda make: iter([Sample("typical", input=make(6, 5))]),
    accuracy="composite",
)


def wrong(op, subject=PRODUCT, **fields):
    return replace(subject, op=op, **fields)


def kinds(findings):
    return [finding.kind for finding in findings]
