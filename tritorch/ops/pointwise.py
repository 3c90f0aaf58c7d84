"""1x1 convolutions as matrix products of pixels with the filter.

With a stride of 2 each column of the output is an entry of a batch: neighbours in a column are two
rows of the image apart, a constant stride.
"""

from __future__ import annotations

from tritorch.ops import matmul_tma
from tritorch.ops.geometry import Geometry
from tritorch.ops.matmul_entries import Entries
from tritorch.ops.matmul_tma import Fill, Plan
from tritorch.ops.strided import Layout, are_alike


def plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    has_bias: bool,
    count: int,
    moments: bool = False,
    residual: Layout | None = None,
) -> Plan | None:
    """x @ weight.T, or the transposed one, on `count` multiprocessors; None if it is no product."""
    if not _is_pointwise(weight, geometry):
        return None
    if residual is not None and not are_alike(residual, y):
        return None
    w = _filter(weight)
    image, pixels = (y, x) if transposed else (x, y)
    seen = _pixels(image, pixels, geometry.stride)
    if seen is None:
        return None
    image_entries, entries, fill = seen
    if not transposed:
        added = None if residual is None else entries
        return matmul_tma.plan(
            image_entries, w, entries, x.itemsize, count, moments=moments, residual=added
        )
    # zeros are what the other pixels get
    if has_bias and fill is not None:
        return None
    if fill is None:
        return matmul_tma.plan(entries, w.transposed, image_entries, x.itemsize, count)
    (_, rows, channels), (over_columns, over_rows, over_channels) = image_entries
    whole = Entries(
        (2 * image.shape[3], rows, channels), (over_columns // 2, over_rows, over_channels)
    )
    return matmul_tma.plan(entries, w.transposed, whole, x.itemsize, count, fill=fill)


def plan_grad_weight(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry, count: int
) -> Plan | None:
    """grad_output.T @ input, the gradient of the filter; None if it is no product."""
    if not _is_pointwise(output, geometry):
        return None
    seen = _pixels(input, grad_output, geometry.stride)
    if seen is None:
        return None
    image, pixels, _ = seen
    w = _filter(output)
    a, b = pixels.transposed, image.transposed
    return matmul_tma.plan(a, b, w, input.itemsize, count, sums_batch=True)


def _is_pointwise(weight: Layout, geometry: Geometry) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and geometry.groups == 1 and not any(geometry.padding)


def _filter(weight: Layout) -> Entries:
    outputs, inputs, *_ = weight.shape
    return Entries((1, outputs, inputs), (0, weight.stride(0), weight.stride(1)))


def _pixels(
    image: Layout, pixels: Layout, stride: tuple[int, ...]
) -> tuple[Entries, Entries, Fill | None] | None:
    """Entries of the image's pixels that the filter sees and of their results, both in
    channels_last, and with a stride of 2 how they lie in the image; or None.
    """
    n, channels, h, w = image.shape
    _, results, p, q = pixels.shape
    if not (_is_channels_last(image) and _is_channels_last(pixels)):
        return None
    if stride == (1, 1):
        rows = n * h * w
        return (
            Entries((1, rows, channels), (0, channels, 1)),
            Entries((1, rows, results), (0, results, 1)),
            None,
        )
    # an odd number of rows would break the constant stride from one image to the next
    if stride != (2, 2) or h != 2 * p:
        return None
    return (
        Entries((q, n * p, channels), (2 * channels, 2 * w * channels, 1)),
        Entries((q, n * p, results), (results, q * results, 1)),
        Fill(2, w),
    )


def _is_channels_last(images: Layout) -> bool:
    """Whether the pixels are dense, each with all of its channels."""
    _, channels, h, w = images.shape
    dense = h * w * channels, 1, w * channels, channels
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(images.shape, images.strides, dense, strict=True)
    )
