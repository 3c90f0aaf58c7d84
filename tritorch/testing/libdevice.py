"""The functions of libdevice for interpreted kernels, which Triton's interpreter does not have.

Each is computed in float64 and rounded once, as libdevice nearly does: its own errors are a few
units in the last place, and those of its `fast_` functions are not imitated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MODULES = ("triton.language.extra.libdevice", "triton.language.extra.cuda.libdevice")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Lets the kernels that are interpreted inside the block call libdevice."""
    lib = importlib.import_module("triton.runtime.interpreter")
    functions = _functions()
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen: set[Any] = set()
    rewrite = lib.InterpretedFunction.rewrite

    def put(names: dict[str, Any]) -> None:
        found = {
            name: functions[id(value)] for name, value in names.items() if id(value) in functions
        }
        changed.append((names, {name: names[name] for name in found}))
        names.update(found)

    def rewrite_with_libdevice(self: Any) -> Any:
        function = rewrite(self)
        # a kernel's module may have imported some by name
        if function not in seen:
            seen.add(function)
            put(function.__globals__)
        return function

    builder = lib.InterpreterBuilder
    refuse = builder.create_extern_elementwise
    for module in _MODULES:
        put(vars(importlib.import_module(module)))
    lib.InterpretedFunction.rewrite = rewrite_with_libdevice
    builder.create_extern_elementwise = _create_extern_elementwise
    try:
        yield
    finally:
        builder.create_extern_elementwise = refuse
        lib.InterpretedFunction.rewrite = rewrite
        for names, before in reversed(changed):
            names.update(before)


@functools.cache
def _functions() -> dict[int, Any]:
    """By the identity of each public function of libdevice: what takes its place."""
    lib = importlib.import_module("triton.runtime.interpreter")
    stubs, cuda = (vars(importlib.import_module(module)) for module in _MODULES)
    return {
        id(names[name]): functools.partial(cuda[name], _semantic=lib.interpreter_semantic)
        for names in (stubs, cuda)
        for name, value in names.items()
        if callable(value) and callable(cuda.get(name)) and not name.startswith("_")
    }


def _create_extern_elementwise(
    self: Any, lib_name: str, lib_path: str, symbol: str, args: list[Any], kind: Any, pure: bool
) -> Any:
    function = _SYMBOLS.get(symbol)
    if function is None:
        raise NotImplementedError(f"the interpreter has no {symbol} of libdevice")
    lib = importlib.import_module("triton.runtime.interpreter")
    wide = [torch.from_numpy(np.asarray(arg.data, np.float64)) for arg in args]
    result: npt.NDArray[Any] = function(*wide).numpy()
    with np.errstate(over="ignore"):
        data = result.astype(lib._get_np_dtype(kind.scalar))
    return lib.TensorHandle(data, kind.scalar)


def _halves_away(x: Tensor) -> Tensor:
    return torch.copysign((x.abs() + 0.5).floor(), x)


def _cube_root(x: Tensor) -> Tensor:
    return torch.copysign(x.abs() ** (1 / 3), x)


_FLOATS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "llabs": torch.abs,
    "fabs": torch.abs,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "rint": torch.round,
    "nearbyint": torch.round,
    "round": _halves_away,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "cbrt": _cube_root,
    "rcbrt": lambda x: 1 / _cube_root(x),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "exp10": lambda x: torch.pow(10.0, x),
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "pow": torch.pow,
    "powi": torch.pow,
    "ldexp": torch.ldexp,
    "scalbn": torch.ldexp,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinpi": lambda x: torch.sin(torch.pi * x.remainder(2)),
    "cospi": lambda x: torch.cos(torch.pi * x.remainder(2)),
    "asin": torch.asin,
    "acos": torch.acos,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "asinh": torch.asinh,
    "acosh": torch.acosh,
    "atanh": torch.atanh,
    "hypot": torch.hypot,
    "rhypot": lambda x, y: 1 / torch.hypot(x, y),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfcx": torch.special.erfcx,
    "erfinv": torch.erfinv,
    "erfcinv": lambda x: torch.erfinv(1 - x),
    "normcdf": torch.special.ndtr,
    "normcdfinv": torch.special.ndtri,
    "lgamma": torch.lgamma,
    "j0": torch.special.bessel_j0,
    "j1": torch.special.bessel_j1,
    "y0": torch.special.bessel_y0,
    "y1": torch.special.bessel_y1,
    "cyl_bessel_i0": torch.special.i0,
    "cyl_bessel_i1": torch.special.i1,
    "fmod": torch.fmod,
    "remainder": lambda x, y: x - y * torch.round(x / y),
    "copysign": torch.copysign,
    "fdim": lambda x, y: torch.where(x > y, x - y, 0 * (x + y)),
    "fma": lambda x, y, z: x * y + z,
    "fast_sin": torch.sin,
    "fast_cos": torch.cos,
    "fast_tan": torch.tan,
    "fast_exp": torch.exp,
    "fast_exp10": lambda x: torch.pow(10.0, x),
    "fast_log": torch.log,
    "fast_log2": torch.log2,
    "fast_log10": torch.log10,
    "fast_pow": torch.pow,
    "fast_fdivide": torch.div,
}
_ROUNDED: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "rcp": torch.reciprocal,
    "sqrt": torch.sqrt,
}
_TO_INTEGERS: dict[str, Callable[..., Tensor]] = {
    "rn": torch.round,
    "rz": torch.trunc,
    "rd": torch.floor,
    "ru": torch.ceil,
}
# as libdevice spells them: with an f for float32, or with a letter in front where it rounds
_SYMBOLS: dict[str, Callable[..., Tensor]] = (
    {f"__nv_{name}{end}": call for name, call in _FLOATS.items() for end in ("", "f")}
    | {f"__nv_{kind}{name}_rn": call for name, call in _ROUNDED.items() for kind in "fd"}
    | {f"__nv_fma{end}_rn": _FLOATS["fma"] for end in ("", "f")}
    | {f"__nv_isnan{end}": torch.isnan for end in "fd"}
    | {f"__nv_isinf{end}": torch.isinf for end in "fd"}
    | {f"__nv_signbit{end}": torch.signbit for end in "fd"}
    | {"__nv_finitef": torch.isfinite, "__nv_isfinited": torch.isfinite}
    | {
        f"__nv_{source}2{integer}_{end}": call
        for source in ("float", "double")
        for integer in ("int", "uint", "ll", "ull")
        for end, call in _TO_INTEGERS.items()
    }
)
