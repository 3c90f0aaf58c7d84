"""The data that ships with tritorch: handwritten digits, learnt in seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Digits", "load_digits", "split"]

# darkest value of a pixel: each counts the set pixels of a 4x4 block of the original bitmap
_FULL = 16


@dataclass(frozen=True)
class Digits:
    """Handwritten digits and what they show.

    `images` is (N, 1, 8, 8) float32 in [0, 1], contiguous; `labels` is (N,) int64 in [0, 9].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits() -> Digits:
    """All 1797 digits, on the CPU, in the order of the source.

    Source: the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
    UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49 (CC BY 4.0).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels, labels = file["images"], file["labels"]
    images = torch.from_numpy(pixels).unsqueeze(1).float() / _FULL
    return Digits(images, torch.from_numpy(labels).long())


def split(seed: int = 0, train: int = 1437) -> tuple[Digits, Digits]:
    """The digits in an order drawn from `seed`: the first `train` of them, and the others.

    The same seed gives the same two sets on every machine. Raises ValueError where `train` leaves
    one of them empty.
    """
    digits = load_digits()
    if not 0 < train < len(digits):
        raise ValueError(f"split: train must be between 1 and {len(digits) - 1}, got {train}")
    # the one generator whose stream NumPy promises never to change
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(digits)))
    first, others = order[:train], order[train:]
    return (
        Digits(digits.images[first], digits.labels[first]),
        Digits(digits.images[others], digits.labels[others]),
    )
