"""Every kernel and every shipped configuration, compiled for GPUs that need not be there."""

import pytest
import torch
from torch import Tensor

import tritorch.ops  # noqa: F401  declares the specs
from tests import narrow
from tritorch import backend, launch
from tritorch.ops import batch_norm_stages
from tritorch.registry import Maker, specs
from tritorch.testing import configurations, dry, products

pytestmark = pytest.mark.compile

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


def compiled(spec, target, dtype, arguments, second=False):
    """What the op launches for one call, forward and backward, with `second` also its second
    gradient.
    """
    given = {
        name: value.detach().requires_grad_() if wants_gradient(spec, name, value) else value
        for name, value in arguments.items()
    }
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    with backend.use("triton"), backend.strict(), dry.compiling_for(target) as recorder:
        result = spec.op(**given)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if outputs:
            second = second and spec.double_backward
            # a gradient of the output that itself requires one, as a gradient penalty sends it
            grads = [torch.empty_like(output).requires_grad_(second) for output in outputs]
            found = differentiate(outputs, leaves, grads, create_graph=second)
            found = [grad for grad in found if grad is not None and grad.requires_grad]
            if second and found:
                differentiate(found, leaves + grads, [torch.empty_like(grad) for grad in found])
    return recorder.kernels


def differentiate(outputs, inputs, grads, **options):
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, **options)


def wants_gradient(spec, name, value):
    return name in spec.gradients and isinstance(value, Tensor) and value.is_floating_point()


# bfloat16's code is float16's with other instructions; float32's is the same on sm_90 and sm_100,
# products as TF32 excepted, which have a test below; float64, which is for checks of gradients, has
# to fit where each maker has the least shared memory
GPUS = {
    torch.float16: tuple(sorted(dry.TARGETS)),
    torch.bfloat16: ("sm_90",),
    torch.float32: ("gfx942", "sm_80", "sm_90"),
    torch.float64: ("gfx942", "sm_80"),
}


def by_dtype_and_target(where=lambda spec, dtype, target: True):
    return [
        pytest.param(spec, dtype, target, id=f"{spec.name}-{NAMES[dtype]}-{target}")
        for spec in specs()
        for dtype in spec.dtypes
        for target in GPUS[dtype]
        if where(spec, dtype, target)
    ]


def has_tables(spec, dtype, target):
    """The tables are by itemsize: bfloat16 has float16's.  Without Hopper a convolution and its
    norm are the kernels of both.
    """
    of_both = spec.name == "conv2d_batch_norm" and target != "sm_90"
    return dtype != torch.bfloat16 and not spec.configurations_of and not of_both


def check(kernels, target):
    problems = [sentence for kernel in kernels for sentence in dry.problems(kernel, target)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("spec", "dtype", "target"), by_dtype_and_target())
def test_workloads_compile_without_spills(spec, dtype, target):
    """No spill, shared memory within the GPU's, tensor cores for 16-bit products: as selection
    chooses.
    """
    launched = set()
    calls = [(sample, False) for sample in spec.workloads(Maker(dtype))]
    # torch adds up second gradients for real: those of a small call are enough
    calls.append((next(s for s in spec.samples(Maker(dtype)) if s.layouts), True))
    for sample, second in calls:
        kernels = compiled(spec, target, dtype, sample.arguments, second=second)
        check(kernels, target)
        launched |= {kernel.kernel for kernel in kernels}
    declared = {name.partition(".")[2] for name in spec.kernels}
    assert launched <= declared, f"undeclared kernels: {launched - declared}"


def overridden(spec, dtype):
    """(choosing function, entry, arguments of the first workload that asks it) of each entry."""
    asking = {}
    for sample in spec.workloads(Maker(dtype)):
        with pytest.MonkeyPatch.context() as patched, launch.choices() as chosen:
            patched.setattr(launch.Prepared, "__call__", lambda *_, **__: None)
            compiled(spec, "sm_90", dtype, sample.arguments)
        for name, _ in chosen:
            asking.setdefault(name, sample.arguments)
    entries = configurations.entries(spec, dtype)
    return [(name, entry, asking[name]) for name, entry in entries if name in asking]


@pytest.mark.parametrize(("spec", "dtype", "target"), by_dtype_and_target(has_tables))
def test_every_configuration_compiles_without_spills(spec, dtype, target):
    """Each entry of the tables, also one that no workload chooses."""
    for name, entry, arguments in overridden(spec, dtype):
        with launch.override(name, entry):
            check(compiled(spec, target, dtype, arguments), target)


@pytest.mark.parametrize("target", GPUS[torch.float32])
def test_full_float32_compiles_without_spills(target):
    """What torch's default, TF32 in convolutions, would not choose."""
    flags = torch.backends.cudnn.conv
    before, flags.fp32_precision = flags.fp32_precision, "ieee"
    try:
        for spec in specs():
            if "conv.conv2d_kernel" not in spec.kernels or spec.configurations_of:
                continue
            for sample in spec.workloads(Maker(torch.float32)):
                check(compiled(spec, target, torch.float32, sample.arguments), target)
            for name, entry, arguments in overridden(spec, torch.float32):
                if "_full_" in name:
                    with launch.override(name, entry):
                        check(compiled(spec, target, torch.float32, arguments), target)
    finally:
        flags.fp32_precision = before


@pytest.mark.parametrize("target", sorted(dry.TARGETS))
def test_tf32_of_matrices_compiles_without_spills(target):
    """What torch's default, full float32 in products of matrices, would not choose."""
    with products.allowing_tf32():
        for spec in specs():
            if "matmul.matmul_kernel" not in spec.kernels:
                continue
            for sample in spec.workloads(Maker(torch.float32)):
                check(compiled(spec, target, torch.float32, sample.arguments), target)
            forced = overridden(spec, torch.float32)
            assert {"matmul_config", "matmul_tma_config"} <= {name for name, *_ in forced}
            for name, entry, arguments in forced:
                with launch.override(name, entry):
                    check(compiled(spec, target, torch.float32, arguments), target)


@pytest.fixture
def only_recorded(monkeypatch):
    """Launches are recorded and neither compiled nor run; the results are uninitialised memory."""
    launched = []
    monkeypatch.setattr(
        launch.Prepared,
        "__call__",
        lambda prepared, *_, **__: launched.append(prepared.kernel.__name__),
    )
    # what launches nothing must not be repeated elsewhere
    with launch.recorded():
        yield launched


def every_call(spec, dtype):
    for sample in spec.workloads(Maker(dtype)):
        compiled(spec, "sm_90", dtype, sample.arguments)
    for sample in spec.samples(Maker(dtype)):
        compiled(spec, "sm_90", dtype, sample.arguments, second=True)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in specs()])
def test_declared_kernels_are_those_launched(spec, only_recorded):
    for dtype in spec.dtypes:
        every_call(spec, dtype)
    # which torch allows of products of matrices only if asked
    with products.allowing_tf32():
        every_call(spec, torch.float32)
    assert set(only_recorded) == {name.partition(".")[2] for name in spec.kernels}


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in specs()])
def test_chosen_configurations_are_in_the_tables(spec, only_recorded):
    """What selection returns has been compiled by the tests above."""
    for dtype in spec.dtypes:
        tables = {}
        for name, entry in configurations.entries(spec, dtype):
            tables.setdefault(name, []).append(entry)
        with launch.choices() as chosen:
            every_call(spec, dtype)
        for name, entry in chosen:
            assert any(entry is other for other in tables.get(name, ())), (name, str(entry))


def accesses(kernel):
    """Global accesses of a compiled kernel: (wide, narrow) loads and stores of a thread."""
    used = dry.resources(kernel)
    loads, stores = used.count("LDG", "LDGSTS"), used.count("STG")
    return {
        "loads": (used.wide_loads, loads - used.wide_loads),
        "stores": (used.wide_stores, stores - used.wide_stores),
    }


def of_vectors():
    return [
        pytest.param(spec, dtype, id=f"{spec.name}-{NAMES[dtype]}")
        for spec in specs()
        for dtype in (torch.float16, torch.float32)
        if spec.name in narrow.OPS
    ]


@pytest.mark.parametrize(("spec", "dtype"), of_vectors())
def test_memory_is_accessed_in_vectors(spec, dtype):
    """Loads and stores of 128 bits, forward and backward, but for what tests/narrow.py explains."""
    found = set()
    for sample in spec.workloads(Maker(dtype)):
        for kernel in compiled(spec, "sm_90", dtype, sample.arguments):
            for kind, (wide, others) in accesses(kernel).items():
                rule = narrow.OF_KERNELS.get((kernel.kernel, kind))
                if others and (rule is None or not rule.allows(wide, others)):
                    found.add((sample.name, kernel.kernel, kind))
    explained = {
        (name, kernel, kind)
        for op, name, kernel, kind, *only in narrow.OF_WORKLOADS
        if op == spec.name and (not only or NAMES[dtype] in only)
    }
    assert found == explained


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("op", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_operands_of_one_order_are_read_in_vectors(op, dtype):
    spec = next(spec for spec in specs() if spec.name == op)
    pair = [
        torch.empty(32, 3, 224, 224, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    arguments = {"input": pair[0], "target": pair[1], "reduction": "none"}
    for kernel in compiled(spec, "sm_90", dtype, arguments):
        assert all(wide and not others for wide, others in accesses(kernel).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
def test_bits_of_batch_norm_are_packed_by_the_threads_that_have_them(dtype):
    """No exchange between threads, and 128 bits of all else: the sums take what they took."""
    x = torch.empty(8, 128, 14, 14, dtype=dtype).to(memory_format=torch.channels_last)
    given = *(torch.empty(128) for _ in range(4)), 1e-5, "relu"
    with dry.compiling_for("sm_90") as recorder:
        output, bits = batch_norm_stages.batch_norm_elemt_bits(x, x, *given)
        for saved in (bits, output):
            batch_norm_stages.batch_norm_backward_reduce(x, saved, x, *given)
    forward, of_bits, of_output = (one for one in recorder.kernels if "norm" in one.kernel)
    # what is loaded ahead comes from shared memory, by the thread that had it brought there
    exchanges = "SHFL", "LDSM", "STS"
    assert dry.resources(forward).count(*exchanges) == 0
    assert accesses(forward)["stores"] == (2, 2)
    after, before = (dry.resources(one) for one in (of_bits, of_output))
    assert after.count(*exchanges) == before.count(*exchanges) > 0
    # one tensor less of three, for each of the stages
    ahead = after.count("LDGSTS"), before.count("LDGSTS")
    assert ahead[0] > 0
    assert 3 * ahead[0] == 2 * ahead[1]
    assert after.wide_stores == before.wide_stores


def test_a_spill_is_reported():
    """The check itself: a tile far too large for its warps must not pass."""
    spec = next(spec for spec in specs() if spec.name == "matmul")
    from tritorch.kernels.matmul import Config

    sizes = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32, "GROUP_M": 8}
    sample = next(iter(spec.workloads(Maker(torch.float16))))
    with launch.override("matmul_config", Config(sizes, num_warps=4, num_stages=2)):
        kernels = compiled(spec, "sm_80", torch.float16, sample.arguments)
    problems = [p for kernel in kernels for p in dry.problems(kernel, "sm_80")]
    assert any("spill" in problem for problem in problems)
