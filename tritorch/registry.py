"""One declaration per op: tests, compile checks, benchmarks and documentation tables loop over
`specs()`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Argument = Tensor | bool | int | float | str | tuple[int, ...] | torch.dtype | None | list[Tensor]
# None: the op writes its arguments alone
Output = Tensor | tuple[Tensor, ...] | None

FLOATING: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
)


class Sample:
    """One call of an op, every argument by name.

    `layouts` marks the samples that are repeated with every memory layout of every tensor argument,
    and
    `gradcheck` the ones small enough for finite differences in the interpreter.
    """

    def __init__(
        self, name: str, *, layouts: bool = False, gradcheck: bool = False, **arguments: Argument
    ) -> None:
        self.name = name
        self.layouts = layouts
        self.gradcheck = gradcheck
        self.arguments = arguments

    def __repr__(self) -> str:
        return f"Sample({self.name})"


class Reject:
    """A call that must raise what the reference raises, with a message that matches `message`.

    `raises` names the exception only where torch itself accepts the call.
    """

    def __init__(
        self,
        name: str,
        message: str,
        *,
        raises: type[Exception] | None = None,
        **arguments: Argument,
    ) -> None:
        self.name = name
        self.message = message
        self.raises = raises
        self.arguments = arguments


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and minimal memory traffic (bytes) of one pass."""

    flops: int
    bytes: int


class Maker:
    """Makes the tensors of samples: one dtype, one device, one seed, so that a sample is the same
    every time.

    `integers` makes every floating tensor hold integers in [-2, 2], so that sums are exact in every
    dtype.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: str | int = 0,
        *,
        integers: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.integers = integers
        self.generator = torch.Generator()
        self.generator.manual_seed(zlib.crc32(str(seed).encode()))

    def __call__(
        self, *shape: int, low: float | None = None, high: float | None = None, scale: float = 1.0
    ) -> Tensor:
        """A tensor of the dtype under test: standard normal times `scale`, or uniform in [low,
        high].
        """
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if self.integers and low is None:
            values = torch.randint(-2, 3, shape, generator=self.generator).double()
        elif low is not None and high is not None:
            unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            values = low + (high - low) * unit
        else:
            values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.dtype).to(self.device)

    def empty(self, *shape: int) -> Tensor:
        """A tensor whose values do not matter: workloads for compiling and timing."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def classes(self, *shape: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Class indices in [0, count)."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        drawn = torch.randint(0, max(count, 1), shape, generator=self.generator)
        return drawn.to(dtype).to(self.device)

    def float32(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """A float32 tensor whatever the dtype under test: statistics of batch norm, say."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.float32, device="meta")
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * unit).float().to(self.device)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A callable and what it claims to compute: all that the checks of `tritorch.testing` need."""

    name: str
    op: Callable[..., Output]
    # the definition: plain PyTorch, same arguments, any dtype including float64
    reference: Callable[..., Output]
    # names of the arguments that a gradient flows to
    gradients: tuple[str, ...]
    samples: Callable[[Maker], Iterable[Sample]]
    # "exact": bitwise torch's; "multilinear": the tolerance rule with scales derived from the
    # reference; "composite": the rule with the fallback scales of a non-linear reduction
    accuracy: Literal["exact", "multilinear", "composite"]
    # names of the arguments that the op writes (running statistics, in-place results)
    mutates: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATING
    # what autocast does with the floating-point arguments
    autocast: Literal["lower", "float32", "passthrough"] = "passthrough"
    # the arguments that "lower" means, where it does not mean all
    lowered: tuple[str, ...] = ()
    double_backward: bool = True
    # arguments where NaN and infinities have a defined result
    non_finite: tuple[str, ...] = ("input",)


@dataclass(frozen=True, kw_only=True)
class OpSpec(Subject):
    """Everything that tests, benchmarks and tables need to know of one op."""

    # "family.kernel_name", every kernel that the op can launch, forward and backward
    kernels: tuple[str, ...]
    workloads: Callable[[Maker], Iterable[Sample]]
    rejects: Callable[[Maker], Iterable[Reject]]
    # passes "forward" and "backward" of one call, from its arguments, and what of the latter is
    # timed by itself
    cost: Callable[..., Mapping[str, Cost]]
    source: str
    # the layers of tritorch.nn that call the op
    layers: tuple[str, ...] = ()
    notes: str = ""
    # whether one argument that is channels_last makes outputs so where it makes torch's
    keeps_format: bool = True
    # the op that launches the same code in the same configurations, which are compiled for it alone
    configurations_of: str = ""


_SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds a spec; a name can be taken once."""
    if spec.name in _SPECS:
        raise ValueError(f"register: op {spec.name!r} is declared twice")
    _SPECS[spec.name] = spec
    return spec


def specs() -> tuple[OpSpec, ...]:
    """Every declared op, in the order of declaration."""
    return tuple(_SPECS.values())
