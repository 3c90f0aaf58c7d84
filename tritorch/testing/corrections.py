"""What is wrong with Triton's interpreter, and what a GPU does instead.

Each function replaces one of the interpreter's own inside `interpreter.corrected`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tritorch.testing import loops, patches

Array = npt.NDArray[Any]

# set by `tritorch.testing.interpreter.corrected`
tf32: bool = False

# triton.runtime.interpreter, triton.language and the least tile of `tl.dot`: set by `_load`, so
# that Triton is imported when it is first corrected
_lib: Any = None
_tl: Any = None
_min_dot_size: Any = None

_patches: list[patches.Patch] = []
# what the patches replaced, by its name
_originals: dict[str, Any] = {}
# by the name of a dtype, numpy's that holds it
_np_dtypes: dict[str, Any] = {}
# of this launch: the functions that have run, and which of `tl` and `tl.core` is patched for them
_seen: set[Any] = set()


def patch() -> None:
    """Puts the corrections in place; raises RuntimeError where Triton lacks a part to correct."""
    if not _patches:
        _load()
    patches.put(_patches, _originals)


def restore() -> None:
    """Puts back what `patch` replaced."""
    _forget()
    patches.restore(_patches, _originals)


def _forget() -> None:
    """Of a launch that is over, or of functions that the host called without one."""
    _seen.clear()
    loops.restore()


def _load() -> None:
    """Imports Triton and checks that it has the private parts that are replaced or used here."""
    global _lib, _tl, _min_dot_size
    lib = importlib.import_module("triton.runtime.interpreter")
    nvidia = importlib.import_module("triton.backends.nvidia.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    for path in _USED:
        _require(lib, path)
    found = [
        (_require(lib, path) if path else lib, name, replacement)
        for path, replacements in _REPLACEMENTS.items()
        for name, replacement in replacements.items()
    ]
    for owner, name, _ in found:
        # 3.6 has no get_bf16: that it is missing is the defect
        if name != "get_bf16":
            _require(owner, name)
    if hasattr(lib._interpreter, "fma_fp32"):
        # this Triton rounds once
        found = [patch for patch in found if patch[1] != "create_fma"]
    _lib, _tl, _min_dot_size = lib, lib.tl, _require(nvidia, "min_dot_size")(target)
    _patches.extend(found)


def _require(owner: Any, path: str) -> Any:
    return patches.require(owner, path, "interpreter.corrected")


# bfloat16: numpy has no such type.  A corrected handle of bfloat16 holds float32 numbers that
# bfloat16 can represent, and making a handle rounds to them: so every operation computes in float32
# and rounds once, and only memory and bit casts see 16 bits.


def _is_bf16(dtype: Any) -> bool:
    return bool(dtype.scalar.name == "bf16")


def _round_to_bf16(values: Array) -> Array:
    """The float32 numbers nearest to `values` that bfloat16 has, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any():
        # also keeps the payload of a NaN that is only copied
        return bits.view(np.float32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    quiet_nan = bits | np.uint32(0x400000)
    kept = np.where(np.isnan(values), quiet_nan, rounded) & np.uint32(0xFFFF0000)
    nearest: Array = kept.view(np.float32)
    return nearest


def _from_bits(bits: Array) -> Any:
    return _lib.TensorHandle((bits.astype(np.uint32) << 16).view(np.float32), _tl.bfloat16)


def to_bits(handle: Any) -> Any:
    """The handle itself, or the 16 bits of each element if it is of bfloat16."""
    if not _is_bf16(handle.dtype) or handle.data.dtype == np.bool_:
        return handle
    return _lib.TensorHandle((handle.data.view(np.uint32) >> 16).astype(np.uint16), _tl.uint16)


def _pointers_to_bits(ptrs: Any) -> Any:
    return _lib.TensorHandle(ptrs.data, _tl.pointer_type(_tl.uint16))


def _post_init(self: Any) -> None:
    if not _is_bf16(self.dtype):
        _originals["__post_init__"](self)
    elif np.issubdtype(self.data.dtype, np.floating):
        self.data = _round_to_bf16(self.data)
    elif self.data.dtype != np.bool_:
        # the interpreter gives the outcome of a comparison the type of its operands: bool passes
        raise TypeError(f"interpreter.corrected: bfloat16 data of numpy type {self.data.dtype}")


def _get_np_dtype(dtype: Any) -> Any:
    # Triton makes a table of all dtypes for each
    name = dtype.scalar.name
    if name not in _np_dtypes:
        bf16 = _is_bf16(dtype)
        _np_dtypes[name] = np.dtype(np.float32) if bf16 else _originals["_get_np_dtype"](dtype)
    return _np_dtypes[name]


def _get_bf16(self: Any, value: float) -> Any:
    return _lib.TensorHandle(np.array([value], dtype=np.float32), _tl.bfloat16)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    data = src.data.astype(_lib._get_np_dtype(dst_type))
    return _lib.TensorHandle(data, dst_type.scalar)


def _create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
    original = _originals["create_fp_to_fp"]
    if _is_bf16(src.dtype):
        src = _lib.TensorHandle(src.data, _tl.float32)
    if not _is_bf16(dst_type):
        return original(self, src, dst_type, rounding)
    if src.data.dtype == np.uint8:
        src = original(self, src, _tl.float32, None)
    values = src.data.astype(np.float32)
    if rounding == _lib._ir.ROUNDING_MODE.RTZ:
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return _lib.TensorHandle(values, _tl.bfloat16)


def _create_bitcast(self: Any, src: Any, dst_type: Any) -> Any:
    src = to_bits(src)
    if _is_bf16(dst_type):
        return _from_bits(src.data.view(np.uint16))
    return _originals["create_bitcast"](self, src, dst_type)


def _create_fabs(self: Any, arg: Any) -> Any:
    if _is_bf16(arg.dtype):
        return self.unary_op(arg, np.abs)
    return _originals["create_fabs"](self, arg)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    # a product of two float32 is exact in float64: the sum is then what rounds
    wide = x.data.astype(np.float64) * y.data + z.data
    return _lib.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


def _create_masked_load(
    self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any
) -> Any:
    original = _originals["create_masked_load"]
    element, mask = ptrs.get_element_ty(), _flags(mask)
    if other is None:
        other = _lib.TensorHandle(poison(ptrs.data.shape, _lib._get_np_dtype(element)), element)
    if not _is_bf16(element):
        return original(self, ptrs, mask, other, *rest, **named)
    loaded = original(self, _pointers_to_bits(ptrs), mask, to_bits(other), *rest, **named)
    return _from_bits(loaded.data)


def poison(shape: tuple[int, ...], dtype: Any) -> Array:
    """What a masked lane holds that is loaded without `other`: anything, so nothing harmless."""
    if np.issubdtype(dtype, np.floating):
        return np.full(shape, np.nan, dtype)
    # large and odd, and neutral in no minimum, maximum or sum
    return np.full(shape, int.from_bytes(b"\x5b" * dtype.itemsize, "little"), dtype)


def _flags(mask: Any) -> Any:
    # the outcome of an operation on flags may be integers, which 3.9 takes for no mask
    lanes = np.asarray(mask.data)
    return mask if lanes.dtype == np.bool_ else _lib.TensorHandle(lanes.astype(np.bool_), _tl.int1)


def _create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    return _originals["create_masked_store"](self, ptrs, to_bits(value), _flags(mask), *rest)


def _create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
    mask = _flags(mask)
    if not _is_bf16(val.dtype):
        return _originals["create_atomic_rmw"](self, op, ptr, val, mask, *rest)
    if op != _lib._ir.ATOMIC_OP.FADD:
        raise NotImplementedError(f"interpreter.corrected: atomic {op} of bfloat16")
    memory, one = _lib._interpreter, np.ones(1, np.bool_)
    old = np.full(val.data.shape, np.nan, np.float32)
    # lanes may share an address, so each one reads what the one before it wrote
    for lane in zip(*np.nonzero(np.broadcast_to(mask.data, old.shape)), strict=True):
        here = ptr.data[lane].reshape(1)
        before = _from_bits(memory.load(here, one, np.zeros(1, np.uint16), np.dtype(np.uint16)))
        after = _lib.TensorHandle(before.data + val.data[lane], _tl.bfloat16)
        memory.store(here, to_bits(after).data, one)
        old[lane] = before.data[0]
    return _lib.TensorHandle(old, _tl.bfloat16)


def _create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
    old = _originals["create_atomic_cas"](self, ptr, to_bits(cmp), to_bits(val), *rest)
    return _from_bits(old.data) if _is_bf16(val.dtype) else old


# NaN: a GPU's maximum and minimum drop it unless asked to propagate


def _create_maxnumf(self: Any, lhs: Any, rhs: Any) -> Any:
    return self.binary_op(lhs, rhs, np.fmax)


def _create_minnumf(self: Any, lhs: Any, rhs: Any) -> Any:
    return self.binary_op(lhs, rhs, np.fmin)


def _create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
    if propagate_nans == _lib._ir.PROPAGATE_NAN.NONE:
        return _create_minnumf(self, _create_maxnumf(self, arg, lo), hi)
    return _originals["create_clampf"](self, arg, lo, hi, propagate_nans)


def _min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    # the same values as numpy's nanmax, without its warning where all are NaN
    quiet: dict[Any, Any] = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
    val_reduce_op = quiet.get(val_reduce_op, val_reduce_op)
    return _originals["min_max"](self, input, val_reduce_op, idx_reduce_op)


def _apply_impl(self: Any, input: Any) -> Any:
    standard = _tl.standard
    with_index = (standard._argmax_combine_tie_break_left, standard._argmin_combine_tie_break_left)
    if self.combine_fn in with_index and np.isnan(input[0].handle.data).any():
        # of a pair with NaN a GPU keeps the second: what was the largest so far is lost
        return self.generic_reduce(input)
    return _originals["apply_impl"](self, input)


# rounding of sums, tiles, launches


def _sum(self: Any, input: Any) -> Any:
    dtype, values = input.dtype, input.handle.data
    if not dtype.is_floating() or dtype.primitive_bitwidth != 16:
        return _originals["sum"](self, input)
    # a GPU rounds every partial sum to the dtype of the operand, numpy the total alone
    shape = values.sum(axis=self.axis, keepdims=self.keep_dims).shape
    values = values.ravel() if self.axis is None else np.moveaxis(values, self.axis, 0)
    while len(values) > 1:
        values = _lib.TensorHandle(values[0::2] + values[1::2], dtype).data
    return self.to_tensor(values[0].reshape(shape), dtype)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
    m, n, k = _min_dot_size(a.dtype, b.dtype)
    if a.data.shape[-2] < m or b.data.shape[-1] < n or a.data.shape[-1] < k:
        # the words of the compiler for CUDA, which has the largest least tile
        refuse_tile(f"Input shapes should have M >= {m}, N >= {n} and K >= {k}")
    if tf32 and a.data.dtype == np.float32 and input_precision == _lib._ir.INPUT_PRECISION.TF32:
        a, b = _to_tf32(a), _to_tf32(b)
    return _originals["create_dot"](self, a, b, d, input_precision, *rest)


def refuse_tile(message: str) -> None:
    """Raises, as a compiler does; the detectors replace it by a finding and go on."""
    raise AssertionError(message)


def _to_tf32(handle: Any) -> Any:
    # Triton emits no conversion before the product, and a tensor core does not read the low bits
    bits = handle.data.view(np.uint32) & np.uint32(0xFFFFE000)
    return _lib.TensorHandle(bits.view(np.float32), handle.dtype)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _originals["_patch_lang_tensor"](tensor, scope)
    # numpy 2.4 refuses int() of an array of one dimension: every loop bound known at run time alone
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_lang(fn: Any) -> Any:
    if fn in _seen:
        return _lib._LangPatchScope()
    loops.put(fn.__globals__)
    # patching takes longer than a device function itself, whose caller has mostly done it
    languages = {one for one in fn.__globals__.values() if one is _tl or one is _tl.core}
    is_patched = bool(languages) and languages <= _seen
    _seen.update(languages, (fn,))
    if is_patched:
        return _lib._LangPatchScope()
    scope = _originals["_patch_lang"](fn)
    # the class is what the language has where nothing is interpreted
    if not isinstance(_tl.range, type):
        scope.set_attr(_tl, "range", loops.counting(_tl.range))
    return scope


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    _forget()
    names = [*self.arg_names, *args[len(self.arg_names) :]]
    args = tuple(_argument(self, name, value) for name, value in zip(names, args, strict=False))
    kwargs = {name: _argument(self, name, value) for name, value in kwargs.items()}
    # a GPU knows no floating-point warnings
    try:
        with np.errstate(all="ignore"):
            return _originals["__call__"](self, *args, **kwargs)
    finally:
        _forget()


def _argument(launch: Any, name: str, value: Any) -> Any:
    """Gives a number the dtype that its parameter is annotated with, and a float float32."""
    annotation = launch.fn.__annotations__.get(name)
    if name in launch.constexprs or not isinstance(value, int | float):
        return value
    if annotation is not None:
        normalized = importlib.import_module("triton.runtime.jit")._normalize_ty(annotation)
        dtype = _tl.str_to_ty(normalized, None)
    elif isinstance(value, float):
        dtype = _tl.float32
    else:
        return value
    data = np.array([value]).astype(_lib._get_np_dtype(dtype))
    return _tl.tensor(_lib.TensorHandle(data, dtype), dtype)


# private parts that are used but not replaced
_USED = (
    "TensorHandle",
    "_LangPatchScope",
    "_interpreter.load",
    "_interpreter.store",
    "interpreter_semantic.to_tensor",
    "_ir.ATOMIC_OP.FADD",
    "_ir.INPUT_PRECISION.TF32",
    "_ir.PROPAGATE_NAN.NONE",
    "_ir.ROUNDING_MODE.RTZ",
    "tl.standard._argmax_combine_tie_break_left",
    "tl.standard._argmin_combine_tie_break_left",
    "tl.str_to_ty",
)

# by the path of their owner below triton.runtime.interpreter
_REPLACEMENTS: dict[str, dict[str, Any]] = {
    "": {
        "_get_np_dtype": _get_np_dtype,
        "_patch_lang": _patch_lang,
        "_patch_lang_tensor": _patch_lang_tensor,
    },
    "TensorHandle": {"__post_init__": _post_init},
    "GridExecutor": {"__call__": _launch},
    "ReduceOps": {"apply_impl": _apply_impl, "min_max": _min_max, "sum": _sum},
    "InterpreterBuilder": {
        "cast_impl": _cast_impl,
        "create_atomic_cas": _create_atomic_cas,
        "create_atomic_rmw": _create_atomic_rmw,
        "create_bitcast": _create_bitcast,
        "create_clampf": _create_clampf,
        "create_dot": _create_dot,
        "create_fabs": _create_fabs,
        "create_fma": _create_fma,
        "create_fp_to_fp": _create_fp_to_fp,
        "create_masked_load": _create_masked_load,
        "create_masked_store": _create_masked_store,
        "create_maxnumf": _create_maxnumf,
        "create_minnumf": _create_minnumf,
        "get_bf16": _get_bf16,
    },
}
