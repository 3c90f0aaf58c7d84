"""Matrix products on Hopper as they are compiled: the machine code of each configuration."""

import pytest
import torch

from tests.hopper_products import KERNEL, PARTS, along, configs, empty, taking
from tritorch import backend, launch, ops
from tritorch.bench import machine_code
from tritorch.ops import conv_dispatch
from tritorch.testing import dry, products

# bytes per element, and which of the entries of that size
ENTRIES = [*((2, entry) for entry in range(27)), *((4, entry) for entry in range(19))]


def configuration(itemsize, entry):
    tables = configs.MATMUL_TMA_CONFIGS, configs.MATMUL_TMA_STREAM_K_CONFIGS
    return (*tables[0][itemsize], *tables[1][itemsize])[entry]


@pytest.mark.reference
def test_every_configuration_is_compiled_below():
    tables = configs.MATMUL_TMA_CONFIGS, configs.MATMUL_TMA_STREAM_K_CONFIGS
    for itemsize in (2, 4):
        number = sum(len(table[itemsize]) for table in tables)
        assert [entry for size, entry in ENTRIES if size == itemsize] == list(range(number))


@pytest.mark.compile
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_overlap_their_products(itemsize, entry):
    """From shared memory to the tensor cores without a stop: nothing is loaded by the threads, and
    no product is waited for before the next.
    """
    config, dtype = configuration(itemsize, entry), DTYPES[itemsize]
    stationary = config.kwargs["FORM"] == "stationary"
    k = config.kwargs["BLOCK_K"] if stationary else 512
    a, b = empty(9000, k, dtype=dtype), empty(k, 512, dtype=dtype)
    with taking(config), products.allowing_tf32():
        found = compiled(ops.matmul, a, along(b, True))
        if itemsize == 2:
            found += compiled(ops.matmul, along(a, True), b)
        # the epilogue that takes most registers
        bias = empty(512, dtype=dtype)
        found += compiled(ops.linear, a.requires_grad_(), along(b, True).mT, bias, "gelu")
    assert len(found) == (3 if itemsize == 2 else 2)
    for kernel in found:
        assert PRODUCT[itemsize] in kernel.compiled.asm["ptx"]
        assert kernel.kernel == KERNEL
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        # one slice has nothing to overlap with
        assert stationary or not used.serialized
        assert min(used.count("HGMMA"), used.count("UTMALDG"), used.count("UTMASTG")) > 0
        assert (used.shared + 1024) * configs.residents(config, itemsize) <= 228 * 1024
    for kernel in found[:-1]:
        used = dry.resources(kernel)
        assert used.count("LDS", "LDSM", "LDG") == 0
        together = configs.residents(config, itemsize)
        assert used.registers * 32 * kernel.num_warps * together <= 65536


DTYPES = {2: torch.bfloat16, 4: torch.float32}
PRODUCT = {2: ".f32.bf16.bf16", 4: ".f32.tf32.tf32"}


@pytest.mark.compile
@pytest.mark.parametrize(("itemsize", "entry"), ENTRIES)
def test_configurations_have_room_for_a_residual(itemsize, entry):
    """Or another takes their place; the loop over the slices is what it is without."""
    config, dtype = configuration(itemsize, entry), DTYPES[itemsize]
    taken = configs.for_residual(config, itemsize)
    fitted = configs.without_idle_stages(taken, 512 // taken.kwargs["BLOCK_K"])
    stationary = config.kwargs["FORM"] == "stationary"
    k = config.kwargs["BLOCK_K"] if stationary else 512
    a, b, bias, residual = (
        empty(*shape, dtype=dtype) for shape in ((9000, k), (512, k), (512,), (9000, 512))
    )
    with taking(config), products.allowing_tf32():
        for activation in ("relu", "gelu"):
            found = compiled(ops.linear, a, b, bias, activation, residual=residual)
            # with the values before the activation
            a = a.detach().requires_grad_()
            found += compiled(ops.linear, a, b, bias, activation, residual=residual)
            assert len(found) > 1
            assert configs.residents(taken, itemsize, True) >= 1
            for kernel in found:
                assert dry.problems(kernel, "sm_90") == []
                assert (kernel.num_stages, kernel.num_warps) == (
                    fitted.num_stages,
                    fitted.num_warps,
                )
                used = dry.resources(kernel)
                together = configs.residents(taken, itemsize, True)
                assert (used.shared + 1024) * together <= 228 * 1024
                # one slice has nothing to overlap with, and its loop is over whole tiles
                if not stationary:
                    assert not used.serialized
                    code = machine_code.read(used.code)
                    turn = [code[n] for n in machine_code.hot_loop(code).path]
                    assert {"shared load", "matrix load", "global load"}.isdisjoint(
                        machine_code.kinds(turn)
                    )


@pytest.mark.compile
@pytest.mark.parametrize("entry", range(25))
def test_configurations_sum_up_rows_from_shared_memory(entry, monkeypatch):
    """Where they do at all: by a second product with the same tile, which nothing waits for."""
    monkeypatch.setattr(configs, "sums_pay", lambda *_: True)
    config = configs.MATMUL_TMA_CONFIGS[2][entry]
    taken = configs.for_sums(config)
    if taken is None:
        # short sums alone
        assert config.kwargs["FORM"] == "stationary"
        return
    a, b = empty(9000, 1024), empty(9000, 1024)
    with launch.override("matmul_tma_config", config):
        found = compiled(torch.ops.tritorch.matmul_summing, a.T, b)
        found += compiled(torch.ops.tritorch.matmul_summing, along(a, True).T, b)
    assert len(found) == 2
    for kernel in found:
        assert "sums_ptr" in kernel.pointers
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        assert not used.serialized
        residents = configs.residents(taken, 2)
        assert (used.shared + 1024) * residents <= 228 * 1024
        assert used.registers * 32 * kernel.num_warps * residents <= 65536
        code = machine_code.read(used.code)
        products = 0
        for loop in machine_code.loops(code):
            kinds = machine_code.kinds([code[n] for n in loop.path])
            products += kinds.get("tensor core", 0) > 0
            assert {"shared load", "matrix load", "shared store", "global load"}.isdisjoint(kinds)
        # of the first column of tiles, and of all others
        assert products == 2


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_of_tiles_are_added_up_without_a_spill(dtype):
    config = configs.MATMUL_TMA_STREAM_K_CONFIGS[dtype.itemsize][0]
    operands = [empty(*shape, dtype=dtype) for shape in ((9000, 512), (512, 512), (512,))]
    residual = empty(9000, 512, dtype=dtype)
    with (
        taking(config),
        products.allowing_tf32(),
        backend.use("triton"),
        backend.strict(),
        dry.compiling_for("sm_90") as recorder,
    ):
        ops.linear(*operands, "gelu", residual=residual)
        ops.linear(operands[0].requires_grad_(), *operands[1:], "gelu", residual=residual)
    found = [kernel for kernel in recorder.kernels if kernel.kernel == PARTS]
    assert len(found) == 2
    assert [problem for kernel in found for problem in dry.problems(kernel, "sm_90")] == []


def compiled(op, *operands, **options):
    """The matrix products that the op launches."""
    with backend.use("triton"), backend.strict(), dry.compiling_for("sm_90") as recorder:
        op(*operands, **options)
    return [kernel for kernel in recorder.kernels if kernel.kernel == KERNEL]


@pytest.mark.compile
def test_a_strided_gradient_writes_its_zeros_without_a_spill():
    x, w = empty(32, 256, 28, 28).requires_grad_(), empty(512, 256, 1, 1).requires_grad_()

    def run():
        y = ops.conv2d(x, w, stride=2)
        y.backward(torch.empty_like(y))

    found = compiled(run)
    assert [kernel.constexprs["FILLS"] for kernel in found] == [False, True, False]
    assert [kernel.constexprs["SUMS_BATCH"] for kernel in found] == [False, False, True]
    for kernel in found:
        assert dry.problems(kernel, "sm_90") == []
        assert not dry.resources(kernel).serialized


@pytest.mark.compile
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("entry", range(14))
def test_pointwise_gradients_as_tf32_have_room(entry, stride, monkeypatch):
    """With a copy of the filter, and with a stride zeros beside each pixel."""
    monkeypatch.setattr(conv_dispatch, "_MIN_PIXELS", 0)
    config = configs.MATMUL_TMA_CONFIGS[4][entry]
    x, w = (empty(*s, dtype=torch.float32) for s in ((64, 256, 28, 28), (512, 256, 1, 1)))

    def run():
        y = ops.conv2d(x.requires_grad_(), w, stride=stride)
        y.backward(torch.empty_like(y))

    with launch.override("matmul_tma_config", config), products.allowing_tf32():
        found = compiled(run)
    # one where nothing tells result and gradient apart
    assert stride == 1 or [kernel.constexprs["FILLS"] for kernel in found] == [False, True]
    assert found
    for kernel in found:
        assert dry.problems(kernel, "sm_90") == []
        used = dry.resources(kernel)
        assert not used.serialized
        assert used.count("LDS", "LDSM") == 0
