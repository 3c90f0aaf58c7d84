"""What stops kernels on GPUs that are not there, and host code that only compiles them."""

from __future__ import annotations

import textwrap

import pytest
import torch
import triton
import triton.language as tl

from tests import limited
from tests.lab import corpus
from tests.limited import autotuned, line_of, product, square, square_kernel
from tritorch.testing import dry, gpu_limits, parts, requests
from tritorch.testing.gpu_limits import limits
from tritorch.testing.hosting import hosted, load

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("no_gpu")]


def test_a_kernel_within_the_limits_has_no_findings():
    def call():
        assert square(SIZE=32, BLOCK_K=32, num_stages=2).is_cuda

    assert limits(call, ["sm_80", "sm_90", "sm_100", "gfx942"]) == []


def test_shared_memory_is_compared_with_each_gpu():
    # 64 KiB a stage
    findings = limits(
        lambda: square(SIZE=128, BLOCK_K=128, num_warps=8, num_stages=4), ["sm_80", "gfx942"]
    )
    a100, mi300 = sorted(findings, key=lambda finding: finding.message, reverse=True)
    for finding, name, limit in ((a100, "sm_80: ", 166912), (mi300, "gfx942: ", 65536)):
        assert finding.kind == "resources"
        assert finding.message.startswith(f"{name}SIZE=128, BLOCK_K=128, P=ieee, num_warps=8")
        assert finding.message.endswith(f" has {limit}")
        assert (finding.kernel, finding.file) == ("square_kernel", limited.__file__)
        assert finding.line == line_of(square_kernel, "def square_kernel")
        assert finding.source.startswith("def square_kernel(")
    needed = int(a100.message.split("needs ")[1].split()[0])
    with dry.compiling_for("sm_80") as recorder:
        square_kernel[(1,)](
            *torch.empty(3, 1 << 16, dtype=torch.float16),
            256,
            128,
            128,
            "ieee",
            num_warps=8,
            num_stages=4,
        )
    assert needed == recorder.launches[0].compiled.metadata.shared > 166912


def test_each_configuration_without_autotune_is_judged_by_itself():
    def call():
        for size in (32, 128):
            for stages in (2, 5):
                square(SIZE=size, BLOCK_K=128, num_warps=8, num_stages=stages)

    (finding,) = limits(call, ["sm_90"])
    assert finding.message.startswith("sm_90: SIZE=128, BLOCK_K=128, P=ieee, num_warps=8, num_st")
    assert finding.message.endswith("H100 SXM has 232448")


def test_a_kernel_that_was_warmed_up_is_judged():
    def call():
        arguments = (*torch.empty(3, 1 << 16, dtype=torch.float16), 256)
        settings = {"SIZE": 128, "BLOCK_K": 128, "P": "ieee", "num_stages": 5}
        kernel = square_kernel.warmup(*arguments, **settings, grid=(1,))
        kernel[(1, 1, 1)](*arguments, 128, 128, "ieee")

    (finding,) = limits(call, ["sm_90"])
    assert finding.kernel == "square_kernel"
    assert finding.message.endswith("H100 SXM has 232448")


def test_each_configuration_that_autotune_would_discard_is_told():
    kernel = autotuned((32, 32, 4, 2), (128, 128, 8, 4), (128, 128, 4, 5))
    findings = limits(lambda: square(kernel), ["sm_80"])
    assert [finding.kind for finding in findings] == ["resources"] * 2
    for finding, settings in zip(
        findings, ("num_warps=8, num_stages=4", "num_warps=4, num_stages=5"), strict=True
    ):
        assert finding.message.startswith(f"sm_80: SIZE=128, BLOCK_K=128, {settings} needs ")
        assert finding.message.endswith("A100 has 166912; autotune discards it")
        assert gpu_limits.is_discarded(finding)


def test_all_configurations_failing_is_one_finding():
    kernel = autotuned((128, 128, 8, 4), (128, 128, 4, 5))
    (finding,) = limits(lambda: square(kernel), ["sm_80"])
    assert "sm_80: none of the 2 configurations launches; SIZE=128" in finding.message
    assert "num_stages=4 needs" in finding.message
    assert not gpu_limits.is_discarded(finding)


def test_a_single_configuration_is_never_tuned():
    (finding,) = limits(lambda: square(autotuned((128, 128, 8, 4))), ["sm_80"])
    assert finding.message.endswith(
        "num_stages=4 needs 196608 bytes of shared memory, A100 has 166912"
    )


def test_the_first_configuration_alone_can_be_asked_for():
    kernel = autotuned((32, 32, 4, 2), (128, 128, 8, 4))
    assert limits(lambda: square(kernel), ["sm_80"], configurations="first") == []


def test_every_compilation_is_told_before_it_begins():
    heard = []
    kernel = autotuned((32, 32, 4, 2), (24, 32, 4, 2))

    def call():
        square(kernel)
        square(SIZE=32, BLOCK_K=32, num_stages=2)
        heard.append("launched")

    limits(call, ["sm_80", "gfx942"], on_compile=heard.append)
    for target in ("sm_80", "gfx942"):
        configs = [f"SIZE={n}, BLOCK_K=32, num_warps=4, num_stages=2" for n in (32, 24)]
        for said in (*configs, None):
            of_kernel = "square_kernel" if said is None else f"square_kernel, {said}"
            assert heard.pop(0) == f"{target}, {of_kernel}"
        assert heard.pop(0) == "launched"
    assert heard == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tf32_is_found_at_the_product(target):
    def call():
        square(dtype=torch.float32, precision="tf32", SIZE=32, BLOCK_K=32, num_stages=2)

    (finding,) = limits(call, [target])
    assert finding.kind == "tf32"
    assert finding.message.startswith(f"{target}: tl.dot multiplies float32 as TF32")
    assert (finding.kernel, finding.file) == ("square_kernel", limited.__file__)
    assert finding.line == line_of(product, "tl.dot")
    assert limits(call, [target], contract="tf32") == []


@triton.jit
def mixed_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + offs)
    half = tl.dot(x.to(tl.float16), x.to(tl.float16))
    tl.store(y_ptr + offs, tl.dot(half, x))


def test_a_product_of_halves_beside_one_of_float32_is_no_tf32():
    def call():
        for dtype in (torch.float32, torch.float64):
            mixed_kernel[(1,)](torch.empty(32, 32), torch.empty(32, 32, dtype=dtype), 32)

    (finding,) = limits(call, ["sm_80", "gfx942"])
    assert finding.message.startswith("sm_80, gfx942: tl.dot")
    assert finding.line == line_of(mixed_kernel, "tl.dot(half, x)")


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.float16, "tf32")],
    ids=str,
)
def test_what_keeps_the_bits_of_float32_is_no_tf32(dtype, precision):
    assert (
        limits(lambda: square(dtype=dtype, precision=precision, SIZE=32, BLOCK_K=32), ["sm_90"])
        == []
    )


def test_spills_are_told_where_every_configuration_has_them():
    spilling = triton.Config({"SIZE": 64, "BLOCK_K": 32}, num_stages=2, maxnreg=32)
    fine = triton.Config({"SIZE": 32, "BLOCK_K": 32}, num_stages=2)
    kernel = triton.autotune([spilling], key=[])(square_kernel)
    (finding,) = limits(lambda: square(kernel), ["sm_80"])
    assert finding.kind == "resources"
    assert "num_stages=2, maxnreg=32 spills " in finding.message
    assert finding.line == line_of(square_kernel, "def square_kernel")
    kernel = triton.autotune([spilling, fine], key=[])(square_kernel)
    assert limits(lambda: square(kernel), ["sm_80"]) == []


@triton.jit
def cosine_kernel(x_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(x_ptr + offs, tl.cos(tl.load(x_ptr + offs)))


def test_an_array_in_local_memory_is_no_spill():
    assert limits(lambda: cosine_kernel[(1,)](torch.empty(64), 64), ["sm_90", "gfx942"]) == []


def test_hooks_leave_what_the_first_configuration_did():
    configs = [
        triton.Config(
            {"SIZE": 32, "BLOCK_K": k}, num_stages=2, pre_hook=lambda a: seen.append(a["BLOCK_K"])
        )
        for k in (32, 64)
    ]
    kernel, seen = triton.autotune(configs, key=["K"])(square_kernel), []
    assert limits(lambda: square(kernel), ["sm_80"]) == []
    assert seen == [32, 64, 32]
    assert kernel.best_config is configs[0]


def test_a_target_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="expects one of sm_80"):
        limits(lambda: None, ["sm_1"])


def test_host_code_is_told_of_the_gpu_that_is_compiled_for():
    with dry.compiling_for("sm_80"), hosted():
        assert torch.cuda.get_device_capability() == (8, 0)
        active = triton.runtime.driver.active
        assert active.get_active_torch_device() == torch.empty(1, device="cuda").device
        known = active.utils.get_device_properties(0)
        assert (known["max_shared_mem"], known["multiprocessor_count"]) == (166912, 108)
        # which is not refused: the limit is for host code, not for the compiler
        square(SIZE=128, BLOCK_K=128, num_warps=8, num_stages=4)
        kernel = square_kernel.warmup(
            *[torch.float16] * 3, 256, SIZE=32, BLOCK_K=32, P="ieee", grid=(1,)
        )
        kernel._init_handles()
        assert kernel.n_regs == dry.resources(kernel).registers > 0
    with dry.compiling_for("gfx942"), hosted():
        assert triton.runtime.driver.active.get_current_target().backend == "hip"


def test_one_configuration_compiles():
    kernel = autotuned((32, 32, 4, 2), (32, 64, 4, 2))
    for choice, block in ((None, 32), (1, 64)):
        with dry.compiling_for("sm_80") as recorder, hosted(choice) as host:
            square(kernel)
        (launch,) = recorder.launches
        assert launch.constexprs["BLOCK_K"] == block
        assert len(host.configurations["square_kernel"]) == 2


def test_a_script_that_launches_and_tests_itself_is_loaded(tmp_path):
    path = tmp_path / "limits_script.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch
            import triton
            import triton.language as tl

            @triton.jit
            def one_kernel(x_ptr):
                tl.store(x_ptr, 1.0)

            def one():
                x = torch.zeros(1, device=triton.runtime.driver.active.get_active_torch_device())
                one_kernel[(1,)](x)
                return x

            assert one().item() == 1
            """
        )
    )
    function = load(f"{path}:one")
    assert limits(function) == []
    with dry.compiling_for("sm_80") as recorder, hosted():
        function()
    assert recorder.launches[0].kernel == "one_kernel"


def test_a_check_is_told_of_every_compilation():
    request = requests.Request(f"{corpus.ROOT}/tests/lab/broken/tuned_atomics.py:tuned_atomics")
    heard = []

    def say(event, **fields):
        heard.append(fields["case"]) if event == "doing" else None

    parts.compile_part(request, requests.find(request), say)
    for target in ("sm_80", "sm_90"):
        for block in (32, 64):
            config = f"BLOCK_M={block}, num_warps=4, num_stages=3"
            for dtype in ("float32", "float16", "bfloat16"):
                case = f"M=256 N=256, {dtype}, {target}, column_sum_kernel, {config}"
                assert heard.count(case) == 1
