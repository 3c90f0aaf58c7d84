"""Matrix product: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops.matmul_function import Matmul, rows_of
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def matmul_reference(input: Tensor, other: Tensor) -> Tensor:
    """input @ other."""
    return torch.matmul(input, other)


@repeated
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """input @ other, with torch.matmul's rules for vectors, matrices and broadcast batches.

    Args:
        input: (..., M, K) or (K,), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        other: (..., K, N) or (K,), the input's dtype and device.

    Returns:
        (..., M, N) without the dimensions that a vector lacks, contiguous.  Sums are kept in
        float32 (float64 for float64); float32 products use TF32 where `torch.backends.cuda.matmul`
        allows it, large ones on Hopper through copies of factors that are not contiguous along the
        inner axis.

    Raises:
        RuntimeError: inner sizes or batches that do not match, scalars, different dtypes or
            devices.
        TypeError: `input` or `other` is not a tensor.

    Source: `torch.matmul`.
    """
    checks.tensor("matmul", input=input, other=other)
    if backend.takes_nested("matmul", input):
        return matmul_reference(input, other)
    if input.dim() == 0 or other.dim() == 0:
        checks.fail(
            RuntimeError, "matmul", "both arguments need a dimension", input=input, other=other
        )
    inner = other.shape[-2] if other.dim() > 1 else other.shape[0]
    if input.shape[-1] != inner:
        checks.fail(
            RuntimeError,
            "matmul",
            f"inner sizes {input.shape[-1]} and {inner} differ",
            input=input,
            other=other,
        )
    _check_batches(input, other)
    if not backend.runs_triton("matmul", input, other, declined=_declined(input, other)):
        return matmul_reference(input, other)
    a, b = binding.autocast_to_lower(input, other)
    checks.same_dtype_and_device("matmul", a, other=b)
    if a.dim() == b.dim() == 2:
        product: Tensor = binding.apply(Matmul, a, b)
        return product
    left, right = a.dim() == 1, b.dim() == 1
    a = a[None] if left else a
    b = b[:, None] if right else b
    if b.dim() == 2:
        y: Tensor = binding.apply(Matmul, rows_of(a), b).view(*a.shape[:-1], b.shape[-1])
    else:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        factors = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
        y = binding.apply(Matmul, *factors).view(*batch, a.shape[-2], b.shape[-1])
    y = y.squeeze(-2) if left else y
    return y.squeeze(-1) if right else y


def _check_batches(input: Tensor, other: Tensor) -> None:
    pairs = zip(reversed(input.shape[:-2]), reversed(other.shape[:-2]), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        checks.fail(RuntimeError, "matmul", "batches do not broadcast", input=input, other=other)


def _declined(input: Tensor, other: Tensor) -> str | None:
    # its gradient is a sum of products over the batch, which would round every product before
    # adding it
    broadcast = other.dim() > 2 and input.shape[:-2] != other.shape[:-2]
    differentiated = torch.is_grad_enabled() and (input.requires_grad or other.requires_grad)
    return "batches that broadcast" if broadcast and differentiated else None


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("empty-rows", input=make(0, 5), other=make(5, 3))
    yield Sample("empty-inner", input=make(3, 0), other=make(0, 5))
    yield Sample("vectors", input=make(33), other=make(33))
    yield Sample("vector-matrix", input=make(7), other=make(7, 5))
    yield Sample("matrix-vector", input=make(5, 7), other=make(7))
    yield Sample("tile-edges", input=make(65, 67), other=make(67, 63), layouts=True)
    yield Sample("tiny", input=make(5, 4), other=make(4, 3), gradcheck=True)
    # more elements than one block of the sum over splits
    yield Sample("splits", input=make(41, 2100), other=make(2100, 26))
    yield Sample("batched", input=make(3, 18, 5), other=make(3, 5, 7), layouts=True)
    yield Sample("tiny-batch", input=make(2, 3, 2), other=make(2, 2, 2), gradcheck=True)
    yield Sample("leading", input=make(2, 3, 17, 5), other=make(5, 9))


def _workloads(make: Maker) -> Iterator[Sample]:
    for m, n, k in (
        (4096, 4096, 4096),
        (1000, 1000, 1000),
        (8, 4096, 4096),
        (64, 64, 65536),
        (1024, 2560, 8192),
    ):
        yield Sample(f"{m}x{n}x{k}", input=make.empty(m, k), other=make.empty(k, n))
    yield Sample("transposed", input=make.empty(512, 512).t(), other=make.empty(512, 512).t())


def _rejects(make: Maker) -> Iterator[Reject]:
    yield Reject(
        "inner", r"matmul: inner sizes 3 and 4 differ.*\(2, 3\)", input=make(2, 3), other=make(4, 5)
    )
    yield Reject("scalar", r"matmul: both arguments need a dimension", input=make(), other=make(4))
    yield Reject(
        "batch",
        r"matmul: batches do not broadcast.*\(2, 3, 4\)",
        input=make(2, 3, 4),
        other=make(3, 4, 5),
    )


def matmul_cost(input: Tensor, other: Tensor) -> dict[str, Cost]:
    y = torch.empty(input.shape, device="meta") @ torch.empty(other.shape, device="meta")
    flops = 2 * y.numel() * input.shape[-1]
    traffic = (input.numel() + other.numel() + y.numel()) * input.element_size()
    return {"forward": Cost(flops, traffic), "backward": Cost(2 * flops, 2 * traffic)}


register(
    OpSpec(
        name="matmul",
        op=matmul,
        reference=matmul_reference,
        kernels=(
            "matmul.matmul_kernel",
            "matmul_tma.matmul_tma_kernel",
            "matmul_tma.matmul_tma_parts_kernel",
            "reduce.many_splits_sum_kernel",
            "reduce.split_sum_kernel",
            "reorder.reorder_kernel",
        ),
        gradients=("input", "other"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=matmul_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.matmul",
        notes="tritorch.matmul",
    )
)
