"""What the dry driver records, measures and complains about, on kernels made to provoke it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tritorch.testing import dry

pytestmark = pytest.mark.compile

CUDA = ["sm_80", "sm_90", "sm_100"]


@triton.jit
def copy_kernel(x_ptr, y_ptr, bias_ptr, n, scale, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.float32) * scale
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs, mask=mask, other=0)
    if ACTIVATION is not None:
        x = tl.maximum(x, 0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def square_kernel(a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    offs, offs_k = tl.arange(0, SIZE), tl.arange(0, BLOCK_K)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * SIZE + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + offs[:, None] * SIZE + offs[None, :], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def pair_kernel(descriptor, pair, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = descriptor.load([0, 0])
    tl.store(pair[0] + offs[:, None] * SIZE + offs[None, :], x * pair[1])


@triton.jit
def cosine_kernel(x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(x_ptr + offs, tl.cos(tl.load(x_ptr + offs)))


@triton.jit
def refusing_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 10, "BLOCK is too large")
    tl.store(x_ptr, 0.0)


def copy(dtype=torch.float32, n=1000, bias=None, activation=None, **options):
    x = torch.empty(n, dtype=dtype)
    grid = (triton.cdiv(n, 256),)
    return copy_kernel[grid](x, torch.empty_like(x), bias, n, 2.0, activation, 256, **options)


def square(dtype=torch.float16, size=64, block_k=32, **options):
    a, b, c = torch.empty(3, size, 256, dtype=dtype)
    square_kernel[(1,)](a, b, c, 256, size, block_k, **options)


@pytest.mark.parametrize("target", dry.TARGETS)
def test_launch_is_recorded_and_runs_nothing(target):
    with dry.compiling_for(target) as recorder:
        compiled = copy(torch.bfloat16, bias=torch.empty(1000), activation="relu", num_warps=8)
    (launch,) = recorder.launches
    assert recorder.kernels == [launch]
    assert launch.kernel == "copy_kernel"
    assert launch.grid == (4, 1, 1)
    assert launch.compiled is compiled
    assert launch.constexprs == {"ACTIVATION": "relu", "BLOCK": 256}
    assert launch.pointers == {"x_ptr": "bf16", "y_ptr": "bf16", "bias_ptr": "fp32"}
    assert launch.num_warps == 8
    assert launch.num_stages == compiled.metadata.num_stages
    assert compiled.metadata.target.arch == dry.TARGETS[target].arch
    for word in ("BLOCK=256", "num_warps=8", "y_ptr bf16"):
        assert word in launch.config


def test_none_is_neither_a_pointer_nor_lost_among_constants():
    with dry.compiling_for("sm_90") as recorder:
        copy(n=1)
    (launch,) = recorder.launches
    assert launch.pointers == {"x_ptr": "fp32", "y_ptr": "fp32"}
    assert launch.constexprs == {"ACTIVATION": None, "BLOCK": 256}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_dtype_is_a_kernel_of_its_own(dtype):
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    with dry.compiling_for("sm_80") as recorder:
        copy(dtype)
    assert recorder.launches[0].pointers["x_ptr"] == names.get(dtype, "fp64")


def test_descriptors_and_tuples_are_arguments():
    x = torch.empty(64, 64, dtype=torch.float16)
    with dry.compiling_for("sm_90") as recorder:
        pair_kernel[(1, 2, 3)](TensorDescriptor.from_tensor(x, [64, 64]), (x, 2.0, None), 64)
    (launch,) = recorder.launches
    assert launch.grid == (1, 2, 3)
    assert launch.pointers == {"descriptor": "tensordesc<fp16[64, 64]>", "pair[0]": "fp16"}
    assert dry.resources(launch).count("UTMALDG") > 0


def test_equal_kernels_are_counted_once_and_launches_each_time():
    with dry.compiling_for("sm_90") as recorder:
        copy(n=1008)
        copy(n=2000)
        # this length is no multiple of 16, a fact that Triton compiles for
        copy(n=1001)
    assert [launch.grid[0] for launch in recorder.launches] == [4, 8, 4]
    assert [launch.grid[0] for launch in recorder.kernels] == [4, 4]


def test_cached_kernels_are_recorded_in_a_later_block():
    for _ in range(2):
        with dry.compiling_for("sm_90") as recorder:
            copy()
        assert len(recorder.launches) == 1


def test_blocks_nest_and_restore_what_was_active():
    before = triton.runtime.driver._active
    assert dry.active() is None
    with dry.compiling_for("sm_80") as outer:
        copy()
        with dry.compiling_for("gfx942") as inner:
            assert dry.active() is dry.TARGETS["gfx942"]
            copy()
        assert dry.active() is dry.TARGETS["sm_80"]
        copy()
    assert dry.active() is None
    assert triton.runtime.driver._active is before
    assert [launch.compiled.metadata.target.arch for launch in outer.launches] == [80, 80]
    assert [launch.compiled.metadata.target.arch for launch in inner.launches] == ["gfx942"]


def test_an_error_inside_the_block_restores_what_was_active():
    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), dry.compiling_for("sm_80"):
        _ = 1 / 0
    assert dry.active() is None
    assert triton.runtime.driver._active is before


def test_a_kernel_kept_from_another_target_is_refused():
    with dry.compiling_for("sm_80"):
        kernel = copy()
    arguments = (1, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None)
    with pytest.raises(RuntimeError, match=r"compiled for 80 and launched without a dry driver"):
        kernel.run(*arguments)
    with (
        dry.compiling_for("sm_90"),
        pytest.raises(RuntimeError, match="compiled for 80 and launched for sm_90"),
    ):
        kernel.run(*arguments)


def test_a_target_that_does_not_exist_is_refused():
    with (
        pytest.raises(ValueError, match="one of sm_80, sm_90, sm_100, gfx942"),
        dry.compiling_for("sm_1"),
    ):
        pass


@pytest.mark.parametrize("target", dry.TARGETS)
def test_compile_error_names_kernel_target_and_configuration(target):
    expected = rf"(?s)refusing_kernel .* {target} with BLOCK=16, num_warps=2.*x_ptr fp16.*too large"
    with dry.compiling_for(target) as recorder, pytest.raises(dry.CompileError, match=expected):
        refusing_kernel[(1,)](torch.empty(1, dtype=torch.float16), 16, num_warps=2)
    assert recorder.launches == []
    with dry.compiling_for(target) as recorder:
        refusing_kernel[(1,)](torch.empty(1, dtype=torch.float16), 8)
    assert len(recorder.launches) == 1


@pytest.mark.parametrize("target", CUDA)
def test_resources_of_a_copy_on_cuda(target):
    with dry.compiling_for(target) as recorder:
        copy(torch.float16, n=1024, num_warps=1)
    used = dry.resources(recorder.launches[0])
    assert 8 <= used.registers <= 64
    assert (used.stack, used.shared, used.num_warps, used.spills) == (0, 0, 1, 0)
    # 256 halves are 512 bytes: one 16-byte access for each of 32 threads
    assert (used.wide_loads, used.wide_stores) == (1, 1)
    assert used.count("LDG", "STG") == 2
    assert used.tensor_core_instructions == 0
    assert dry.resources(recorder.launches[0].compiled) == used


@pytest.mark.parametrize("target", dry.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_products_use_tensor_cores(target, dtype):
    with dry.compiling_for(target) as recorder:
        square(dtype, num_stages=2)
    (launch,) = recorder.launches
    used = dry.resources(launch)
    assert used.tensor_core_instructions > 0
    assert used.shared == launch.compiled.metadata.shared > 0
    assert dry.problems(launch, target) == []
    opcode = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target, "v_mfma")
    assert any(name.startswith(opcode) for name in used.opcodes)


def test_ieee_float32_products_use_none_and_that_is_no_problem():
    with dry.compiling_for("sm_90") as recorder:
        square(torch.float32, num_stages=2)
    (launch,) = recorder.launches
    assert dry.resources(launch).tensor_core_instructions == 0
    assert dry.resources(launch).count("FFMA") > 0
    assert dry.problems(launch, "sm_90") == []


@pytest.mark.parametrize("target", dry.TARGETS)
def test_spills_and_shared_memory_are_problems(target):
    with dry.compiling_for(target) as recorder:
        square(size=256, block_k=128, num_warps=4, num_stages=4)
    (launch,) = recorder.launches
    used, limits = dry.resources(launch), dry.TARGETS[target]
    assert used.shared > limits.shared_memory
    assert used.stack > 0
    assert used.spills > 0
    shared, spills = dry.problems(launch, target)
    assert f"{used.shared} bytes of shared memory of {limits.shared_memory}" in shared
    assert f"{used.stack} bytes of stack per thread, {used.spills} " in spills
    for sentence in (shared, spills):
        assert sentence.startswith(f"square_kernel on {target} ")
        assert "SIZE=256, BLOCK_K=128, num_warps=4" in sentence


@pytest.mark.parametrize("target", CUDA)
def test_an_array_in_local_memory_is_no_spill(target):
    with dry.compiling_for(target) as recorder:
        cosine_kernel[(1,)](torch.empty(64), 64)
        cosine_kernel[(1,)](torch.empty(4096), 4096, maxnreg=32)
    alone, beside_spills = map(dry.resources, recorder.launches)
    # 28 bytes of libdevice's reduction of large arguments, in words of 8, which the compiler of
    # Triton 3.9 keeps in registers
    assert alone.stack in (0, 32)
    assert (alone.arrays, alone.spilled_bytes, alone.spills) == (32, 0, 0)
    assert dry.problems(recorder.launches[0], target) == []
    assert beside_spills.spilled_bytes == beside_spills.stack - 32 > 0
    (problem,) = dry.problems(recorder.launches[1], target)
    assert f" spills: {beside_spills.spilled_bytes} bytes of stack per thread" in problem


def test_a_sixteen_bit_product_without_tensor_cores_is_a_problem():
    # one kernel's code with the other's intermediate language stands for a compiler that missed
    with dry.compiling_for("sm_90") as recorder:
        square(torch.float16, num_stages=2)
        square(torch.float32, num_stages=2)
    half, single = recorder.launches
    assert dry.problems(single, "sm_90") == []
    single.compiled.asm["ttir"] = half.compiled.asm["ttir"]
    (sentence,) = dry.problems(single, "sm_90")
    assert "has 1 16-bit dot products and no tensor-core instruction" in sentence


def test_machine_code_is_disassembled_when_asked_for_and_once(monkeypatch):
    asked = []
    run = subprocess.run

    def counted(command, **options):
        # the assembler, and Triton when it asks for versions, run by the same function
        if "cuobjdump" in command[0] and command[1] != "--version":
            asked.append(command[1])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    with dry.compiling_for("sm_80") as recorder:
        copy(torch.float64, n=4096, num_warps=2)
    for _ in range(2):
        used = dry.resources(recorder.launches[0])
    assert asked == ["-res-usage"]
    for _ in range(2):
        assert used.count("STG") > 0
    assert asked == ["-res-usage", "-sass"]


def test_active_needs_no_triton():
    program = (
        "import sys; from tritorch.testing import dry; print(dry.active(), 'triton' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.stdout.strip() == "None False"


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), dry.compiling_for("sm_80"):
        pass


def test_a_default_of_the_next_triton_is_no_error_where_warnings_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dry.compiling_for("sm_80") as recorder:
            # 3.9 warns of it by itself
            copy()
            warnings.warn("TRITON_DEFAULT_FP_FUSION is unset: ...", UserWarning, stacklevel=1)
            with pytest.raises(UserWarning, match="another"):
                warnings.warn("another", UserWarning, stacklevel=1)
    assert len(recorder.launches) == 1


def test_numbers_and_sizes_of_the_arguments_are_recorded():
    x = torch.empty(64, 64, dtype=torch.float16)
    with dry.compiling_for("sm_90") as recorder:
        copy(n=1)
        pair_kernel[(1,)](TensorDescriptor.from_tensor(x, [64, 64]), (x[:1].expand(9, 64), 2.0), 64)
    one, pair = recorder.launches
    assert one.numbers == {"n": 1, "scale": 2.0, "BLOCK": 256}
    assert one.sizes == {"x_ptr": 4, "y_ptr": 4}
    assert pair.numbers == {"pair[1]": 2.0, "SIZE": 64}
    assert pair.sizes == {"descriptor": 8192, "pair[0]": 128}
