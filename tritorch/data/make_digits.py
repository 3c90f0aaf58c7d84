"""Writes digits.npz from scikit-learn's copy of the digits: `python tritorch/data/make_digits.py`.

Nothing in tritorch imports this file, and scikit-learn is no dependency. Running it again gives the
same arrays, and with the same zlib the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

TARGET = Path(__file__).with_name("digits.npz")
# numpy.savez stamps the time of writing into the archive
EPOCH = (1980, 1, 1, 0, 0, 0)


def write_npz(target: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    """A compressed .npz whose bytes depend on the arrays alone."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    digits = load_digits()
    write_npz(
        TARGET,
        {"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.uint8)},
    )
