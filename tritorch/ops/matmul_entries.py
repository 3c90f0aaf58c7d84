"""Operands of matrix products as tensors of three dimensions."""

from __future__ import annotations

import math
from typing import NamedTuple

from tritorch.descriptors import View


class Entries(NamedTuple):
    """A tensor as three dimensions, strides in elements; a batch of one may have any stride."""

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def transposed(self) -> Entries:
        """The same with the last two exchanged."""
        (batch, rows, columns), (over_batch, over_rows, over_columns) = self
        return Entries((batch, columns, rows), (over_batch, over_columns, over_rows))

    @property
    def runs_inside(self) -> bool:
        """Whether the inner axis of the product is the one along memory."""
        return self.shape[2] > 1 and self.strides[2] == 1

    @property
    def is_contiguous(self) -> bool:
        batch, rows, columns = self.shape
        whole = batch == 1 or self.strides[0] == rows * columns
        return self.strides[1:] == (columns, 1) and whole

    def tiles(
        self, rows: int, columns: int, itemsize: int, transposed: bool = False
    ) -> View | None:
        """Tiles of rows x columns of one entry, or None if there is no descriptor of them."""
        entries, block = self, (1, rows, columns)
        if transposed:
            entries, block = self.transposed, (1, columns, rows)
        (batch, over_batch), (height, over_height), (width, over_width) = zip(*entries, strict=True)
        # along a dimension of one element torch's stride may be anything
        over_width = over_width if width > 1 else 1
        over_height = over_height if height > 1 else 8 * math.ceil(width / 8)
        over_batch = over_batch if batch > 1 else height * over_height
        view = View(entries.shape, (over_batch, over_height, over_width), block, transposed)
        return view if view.is_describable(itemsize) else None
