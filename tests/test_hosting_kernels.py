"""Kernels that hosted code launches: which configuration runs, how, and with which functions."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.libdevice import tanh as imported_tanh
from triton.runtime.autotuner import Autotuner
from triton.tools.tensor_descriptor import TensorDescriptor

from tritorch.testing import hosting
from tritorch.testing.hosting import hosted

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("no_gpu")]

LOG: list[object] = []


def hook(arguments):
    LOG.append(("hook", arguments["BLOCK"], arguments["n"]))


def prune(configs, named, **options):
    LOG.append(("prune", named["n"]))
    return [config for config in configs if config.kwargs["BLOCK"] <= 64]


@triton.autotune(
    [
        triton.Config({"BLOCK": 128}),
        triton.Config({"BLOCK": 32}, num_warps=2, pre_hook=hook),
        triton.Config({"BLOCK": 64}, num_warps=8),
    ],
    key=["n"],
    prune_configs_by={"early_config_prune": prune},
    reset_to_zero=["sum_ptr"],
)
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})
@triton.jit
def sum_kernel(x_ptr, sum_ptr, blocks_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs) if EVEN else tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.atomic_add(sum_ptr, tl.sum(x))
    tl.store(blocks_ptr + tl.program_id(0), BLOCK)


def total(x, result=None):
    result = torch.zeros(1, device="cuda") if result is None else result
    blocks = torch.zeros(8, dtype=torch.int32, device="cuda")
    sum_kernel[lambda meta: [triton.cdiv(meta["n"], meta["BLOCK"])]](x, result, blocks, x.numel())
    return result.item(), blocks[0].item()


@pytest.mark.parametrize(
    ("choice", "block"),
    [
        (None, 32),
        (0, 32),
        (1, 64),
        # the last where there are fewer
        (7, 64),
        ({"sum_kernel": 1}, 64),
        ({"other_kernel": 1}, 32),
        (lambda config: config.num_warps == 8, 64),
        (triton.Config({"BLOCK": 16}), 16),
    ],
)
def test_one_configuration_runs(choice, block):
    with hosted(choice) as host:
        # 96 is a multiple of 32 alone
        assert total(torch.ones(96)) == (96, block)
    shown = [
        (config.kwargs["BLOCK"], config.num_warps) for config in host.configurations["sum_kernel"]
    ]
    assert shown == [(32, 2), (64, 8)]


def test_a_choice_that_fits_none_says_what_there_is():
    with hosted(lambda config: False), pytest.raises(ValueError, match=r"sum_kernel.*BLOCK: 64"):
        total(torch.ones(96))


def test_hooks_and_pruning_happen_as_when_tuning():
    LOG.clear()
    with hosted():
        for _ in range(2):
            assert total(torch.ones(96)) == (96, 32)
    # tuned once for a key: pruned once, while the hook of the choice is of every launch
    assert LOG == [("prune", 96), ("hook", 32, 96), ("hook", 32, 96)]


def test_reset_to_zero_helps_the_first_launch_for_a_key_alone():
    x, result = torch.ones(96), torch.full((1,), 5.0)
    with hosted():
        assert total(x, result)[0] == 96
        assert total(x, result)[0] == 2 * 96
        assert total(torch.ones(64), result)[0] == 64


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=[])
@triton.jit
def increment_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)


@triton.autotune(
    [triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=[], restore_value=["x_ptr"]
)
@triton.jit
def restored_kernel(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)


@pytest.mark.parametrize(("kernel", "first"), [(increment_kernel, 3), (restored_kernel, 1)])
def test_tuning_updates_in_place_too_often_unless_values_are_restored(kernel, first):
    x = torch.zeros(32)
    with hosted(tune=True):
        for expected in (first, first + 1):
            kernel[(1,)](x)
            assert x[0].item() == expected
    y = torch.zeros(32)
    with hosted():
        kernel[(1,)](y)
    assert y[0].item() == 1


def test_two_kernels_of_one_name_are_told_apart():
    twin = Autotuner(
        *[getattr(increment_kernel, name) for name in ("fn", "arg_names", "configs")],
        [],
        None,
        None,
    )
    with hosted({"increment_kernel": 1}) as host:
        increment_kernel[(1,)](torch.zeros(32))
        twin[(1,)](torch.zeros(32))
    assert list(host.configurations) == ["increment_kernel", f"{__name__}.increment_kernel"]


def test_benchmarks_call_once():
    calls = []
    with hosted():
        assert triton.testing.do_bench(lambda: calls.append(1), warmup=9, rep=9) == 1
        assert triton.testing.do_bench(lambda: calls.append(1), quantiles=[0.5, 0.2]) == [1, 1]
        benchmark = triton.testing.Benchmark(["n"], [2**40], "p", ["a"], ["a"], "ms", "plot", {})
        triton.testing.perf_report(benchmark)(lambda **sizes: calls.append(1)).run(print_data=True)
    assert calls == [1, 1]


@triton.jit
def every_argument_kernel(x_ptr, y_desc, M, N, BLOCK: tl.constexpr, SCALE: tl.constexpr = 2):
    tl.static_assert(BLOCK >= 8)
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    for row in tl.range(0, M, BLOCK, num_stages=3, flatten=True, warp_specialize=True):
        y_desc.store([row, 0], x_desc.load([row, 0]) * SCALE)


def double(x, launch):
    y = torch.empty_like(x)
    triton.set_allocator(lambda size, align, stream: torch.empty(size, device="cuda"))
    launch(x, TensorDescriptor.from_tensor(y, [16, 16]), *x.shape)
    return y


def warmed_up(*arguments):
    kernel = every_argument_kernel.warmup(*arguments, BLOCK=16, num_warps=8, grid=(1,))
    kernel._init_handles()
    # what a persistent kernel computes its grid from
    assert 65536 // (kernel.n_regs * 32 * 8) > 0
    assert 232448 // kernel.metadata.shared > 0
    kernel[(1, 1, 1)](*arguments, 16)


@pytest.mark.parametrize(
    "launch",
    [
        lambda *a: every_argument_kernel[(1,)](*a, BLOCK=16, num_ctas=1, maxnreg=128, num_stages=2),
        lambda *a: every_argument_kernel[lambda meta: (meta["SCALE"] - 1,)](*a, 16),
        lambda *a: every_argument_kernel.run(*a, BLOCK=16, grid=[1], warmup=False),
        warmed_up,
    ],
    ids=["options", "default", "run", "warmup"],
)
def test_a_kernel_is_launched_in_any_way(launch):
    with hosted():
        x = torch.randn(32, 16, device="cuda")
        assert torch.equal(double(x, launch), 2 * x)


@triton.jit
def assembly_kernel(x_ptr):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs)
    x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + offs, x)


@triton.jit
def bessel_kernel(x_ptr):
    tl.store(x_ptr, libdevice.jn(1, tl.load(x_ptr)))


@pytest.mark.parametrize(
    ("kernel", "what", "line"),
    [
        (assembly_kernel, "it contains inline assembly", "tl.inline_asm_elementwise"),
        (bessel_kernel, "the interpreter has no __nv_jnf of libdevice", "libdevice.jn"),
    ],
)
def test_what_the_interpreter_lacks_is_named_with_its_line(kernel, what, line):
    with hosted(), pytest.raises(hosting.Unsupported, match=what) as raised:
        kernel[(1,)](torch.zeros(16, dtype=torch.int32 if kernel is assembly_kernel else None))
    assert raised.value.kernel == kernel.__name__
    with open(raised.value.file) as source:
        assert line in source.read().splitlines()[raised.value.line - 1]


@triton.jit
def device_gelu(x):
    return 0.5 * x * (1 + imported_tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@triton.jit
def libdevice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, device_gelu(x))
    tl.store(y_ptr + n + offs, libdevice.pow(tl.abs(x), x * 0 + 1.5))
    tl.store(y_ptr + 2 * n + offs, libdevice.rint(x))
    tl.store(y_ptr + 3 * n + offs, libdevice.float2int_rz(x.to(tl.float32)))
    tl.store(y_ptr + 4 * n + offs, libdevice.isinf(x / (x - x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_libdevice_is_as_exact_as_its_type(dtype):
    x = torch.linspace(-3.2, 3, 16, dtype=dtype)
    y = torch.empty(5, 16, dtype=dtype)
    before = imported_tanh, libdevice.pow
    with hosted():
        libdevice_kernel[(1,)](x, y, 16, 16)
    assert before == (imported_tanh, libdevice.pow)
    wide = x.double()
    truth = [
        0.5 * wide * (1 + torch.tanh(0.79788456 * wide * (1 + 0.044715 * wide * wide))),
        wide.abs() ** 1.5,
        wide.round(),
        wide.trunc(),
        torch.ones(16),
    ]
    tolerance = {torch.float32: 3e-7, torch.float64: 1e-14}[dtype]
    expected = torch.stack([value.double() for value in truth])
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
