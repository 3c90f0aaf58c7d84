"""The digits that ship with tritorch: complete, unchanged, and split the same way everywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from tritorch.data import load_digits, split

pytestmark = pytest.mark.reference

# class counts of the test set, as the UCI Machine Learning Repository states them
COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_digits_have_the_documented_form():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert digits.images.is_contiguous()
    assert (digits.images.min().item(), digits.images.max().item()) == (0.0, 1.0)
    assert digits.labels.dtype == torch.int64
    assert len(digits) == 1797
    assert torch.bincount(digits.labels).tolist() == COUNTS


def test_digits_are_those_of_the_source():
    # the digests are of scikit-learn's arrays, converted to bytes
    digits = load_digits()
    assert digest((digits.images * 16).to(torch.uint8)) == (
        "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    )
    assert digest(digits.labels.to(torch.uint8)) == (
        "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    )


def test_split_keeps_every_digit_once():
    train, test = split(seed=3, train=1000)
    assert (len(train), len(test)) == (1000, 797)
    everything = load_digits()
    images = torch.cat([train.images, test.images]).flatten(1)
    labels = torch.cat([train.labels, test.labels]).unsqueeze(1)
    ours = torch.cat([images, labels.float()], dim=1)
    theirs = torch.cat([everything.images.flatten(1), everything.labels.unsqueeze(1).float()], 1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_split_follows_its_seed_alone():
    torch.manual_seed(1)
    train, test = split(seed=0)
    torch.manual_seed(2)
    again, _ = split(seed=0)
    other, _ = split(seed=1)
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.labels, other.labels)
    # the first labels of seed 0, so that results of different machines are of the same digits
    assert train.labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]


@pytest.mark.parametrize("train", [0, 1797, -1])
def test_split_refuses_an_empty_part(train):
    with pytest.raises(ValueError, match=rf"split: train must be between 1 and 1796, got {train}"):
        split(train=train)
