"""Which matrix products take descriptors on Hopper, and in which configuration."""

import pytest
import torch

from tests.hopper_products import KERNEL, configs, empty
from tritorch import backend, launch, ops, tuned
from tritorch.ops import matmul_tma
from tritorch.ops.strided import Layout
from tritorch.testing import dry, products


@pytest.mark.compile
def test_what_descriptors_do_not_take(monkeypatch):
    """Everything else has the portable kernels."""
    names = []

    def launched(prepared, on, *tensors, floats=()):
        names.append(prepared.kernel.__name__)

    monkeypatch.setattr(launch.Prepared, "__call__", launched)

    def takes(op, *operands, target="sm_90"):
        names.clear()
        # what launches nothing must not be repeated elsewhere
        with launch.recorded(), backend.use("triton"), backend.strict(), dry.compiling_for(target):
            op(*operands)
        return names[0] == KERNEL

    a, b = empty(256, 512), empty(512, 384)
    for dtype in (torch.float16, torch.bfloat16):
        assert takes(ops.matmul, a.to(dtype), b.to(dtype))
    for target in ("sm_80", "sm_100", "gfx942"):
        assert not takes(ops.matmul, a, b, target=target), target
    assert not takes(ops.matmul, empty(64, 64), empty(64, 64))
    # float32 as TF32 alone, along the inner axis alone
    single, weight = empty(256, 512, dtype=torch.float32), empty(384, 512, dtype=torch.float32)
    assert not takes(ops.linear, single, weight)
    with products.allowing_tf32():
        assert takes(ops.linear, single, weight)
        assert takes(ops.matmul, single, weight.mT)
        assert not takes(ops.matmul, single, weight.view(512, 384))
        assert not takes(ops.matmul, single.view(512, 256).mT, weight.mT)
        assert not takes(ops.linear, single.view(-1)[: 250 * 510].view(250, 510), weight[:, :510])
        assert not takes(ops.matmul, single.double(), weight.double().mT)
        for target in ("sm_80", "sm_100", "gfx942"):
            assert not takes(ops.linear, single, weight, target=target), target
    # nor is a column by a row, of which either axis lies along memory
    column = empty(8192, 1, dtype=torch.float32)
    with products.allowing_tf32():
        assert not takes(ops.matmul, column, column.mT)
    # rows that do not begin on 16 bytes, an address that does not, no axis along memory, one row
    # that is all rows
    assert not takes(ops.matmul, empty(256, 500), empty(500, 384))
    assert not takes(ops.matmul, a, empty(512, 380))
    assert not takes(ops.matmul, empty(256 * 512 + 4)[4:].view(256, 512), b)
    assert not takes(ops.matmul, empty(256, 1024)[:, ::2], b)
    assert not takes(ops.matmul, empty(1, 512).expand(256, 512), b)
    # but a row within a longer one, and batches
    assert takes(ops.matmul, empty(256, 1024)[:, :512], b)
    assert takes(ops.matmul, empty(3, 256, 512), empty(3, 512, 384).mT.contiguous().mT)

    x, w = empty(64, 64, 28, 28), empty(128, 64, 1, 1)
    for options, taken in (
        ((), True),
        ((2,), True),
        ((3,), False),
        ((1, 1), False),
        ((1, 0, 1, 2), False),
    ):
        groups = options[3] if len(options) == 4 else 1
        filters = empty(128, 64 // groups, 1, 1)
        assert takes(ops.conv2d, x, filters, None, *options) == taken, options
    assert not takes(ops.conv2d, x.contiguous(), w)
    assert not takes(ops.conv2d, empty(64, 64, 27, 28), w, None, 2)
    assert not takes(ops.conv2d, x, empty(128, 64, 3, 3), None, 1, 1)


@pytest.mark.reference
@pytest.mark.parametrize(("k", "batch", "shared"), [(64, 1, True), (65, 1, True), (64, 4, False)])
def test_a_chosen_configuration_fits_its_product(k, batch, shared):
    """For any sizes: a tile of b is kept where one slice is the whole sum, and b one matrix."""
    for m in (1, 33, 3000, 900000):
        for n in (8, 64, 1000):
            config = configs.matmul_tma_config(m, n, k, batch, shared, 2)
            if config.kwargs["FORM"] == "stationary":
                assert shared
                assert k <= config.kwargs["BLOCK_K"]


def form_of(form, *blocks):
    """The first entry of this form and tile."""
    for entry in configs.MATMUL_TMA_CONFIGS[2]:
        sizes = entry.kwargs
        if (sizes["FORM"], *(sizes[f"BLOCK_{axis}"] for axis in "MNK")) == (form, *blocks):
            return entry
    raise ValueError(f"no entry is {form} {blocks}")


@pytest.mark.reference
@pytest.mark.parametrize(("k", "stages"), [(64, 2), (104, 3), (192, 4), (4096, 4)])
def test_stages_that_no_slice_comes_to_are_left_to_other_programs(k, stages):
    a, b = Layout((8192, k), (k, 1), 2), Layout((k, 1024), (1, k), 2)
    for form, expected in (("tile", stages), ("persistent", 4)):
        blocks = (64, 128, 64) if form == "tile" else (128, 128, 64)
        with launch.override("matmul_tma_config", form_of(form, *blocks)):
            plan = matmul_tma.plan_matmul(a, b, 132, None)
        assert plan.config.num_stages == expected
        assert plan.config.kwargs == form_of(form, *blocks).kwargs


@pytest.mark.compile
def test_a_product_of_one_slice_leaves_room_for_others():
    """Four programs of 64x128 on a multiprocessor, as its registers allow."""
    a, b = empty(4096, 64), empty(256, 64)
    config = form_of("tile", 64, 128, 64)
    with (
        launch.override("matmul_tma_config", config),
        backend.use("triton"),
        backend.strict(),
        dry.compiling_for("sm_90") as recorder,
    ):
        ops.linear(a, b)
    (kernel,) = recorder.kernels
    used = dry.resources(kernel)
    assert (kernel.kernel, kernel.num_stages) == (KERNEL, 2)
    assert dry.problems(kernel, "sm_90") == []
    assert min(used.count("HGMMA"), used.count("UTMALDG"), used.count("UTMASTG")) > 0
    fitted = configs.without_idle_stages(config, 1)
    assert configs.residents(fitted, 2) == 4
    assert (used.shared + 1024) * 4 <= 228 * 1024
    assert used.registers * 32 * kernel.num_warps * 4 <= 65536


@pytest.mark.reference
def test_no_estimate_replaces_what_was_measured_or_is_forced():
    """By programs that share tiles, where those were neither."""
    a, b = (Layout(shape, (shape[1], 1), 2) for shape in ((1024, 8192), (8192, 2560)))
    one, stream_k = configs.MATMUL_TMA_CONFIGS[2][1], configs.MATMUL_TMA_STREAM_K_CONFIGS[2][1]
    sizes = 1024, 2560, 8192, 1, True, 2
    row, shares = ("matmul_tma_config", sizes), ("matmul_tma_stream_k_config", sizes)

    def form(count=132):
        return matmul_tma.plan_matmul(a, b, count, None).config.kwargs["FORM"]

    assert [form(), form(131)] == ["stream-k", "tile"]
    for table, expected in (
        ({}, "stream-k"),
        ({row: one}, "tile"),
        ({shares: stream_k}, "stream-k"),
        ({row: one, shares: stream_k}, "stream-k"),
    ):
        with tuned.using(table):
            assert form() == expected
    with launch.override("matmul_tma_config", one):
        assert form() == "tile"
        with launch.override("matmul_tma_stream_k_config", stream_k):
            assert form() == "stream-k"
    with launch.override("matmul_tma_stream_k_config", None):
        assert form() == "tile"


@pytest.mark.reference
def test_a_row_that_nobody_can_launch_leaves_the_choice_to_the_estimate():
    """Of a kernel with other numbers, told once, or of a tile that no multiprocessor has room for,
    whatever the kernel itself would choose.
    """
    stream_k = configs.MATMUL_TMA_STREAM_K_CONFIGS[2][0]
    lacking = type(stream_k)(
        {name: value for name, value in stream_k.kwargs.items() if name != "PIECES"}, num_warps=8
    )
    large = type(stream_k)(stream_k.kwargs | {"PIECES": 1}, num_warps=8, num_stages=4)
    assert configs.residents(large, 2) == 0

    def form(m, n, k):
        a, b = Layout((m, k), (k, 1), 2), Layout((k, n), (1, k), 2)
        return matmul_tma.plan_matmul(a, b, 132, None).config.kwargs["FORM"]

    for m, n, k, own in ((1024, 2560, 8192, "stream-k"), (4096, 4096, 4096, "persistent")):
        key = "matmul_tma_stream_k_config", (m, n, k, 1, True, 2)
        assert form(m, n, k) == own
        for row in (key, ("matmul_tma_config", key[1])):
            table = {row: lacking}
            with tuned.using(table), pytest.warns(UserWarning, match="has no PIECES") as told:
                assert form(m, n, k) == own
            assert len(told) == 1
        with tuned.using({key: large}):
            assert form(m, n, k) != "stream-k"


@pytest.mark.reference
def test_sums_of_rows_pay_where_reading_them_again_takes_longer():
    def pays(rows, outputs, inputs):
        plain = configs.matmul_tma_config(outputs, inputs, rows, 1, True, 2)
        return configs.sums_pay(plain, configs.for_sums(plain), outputs, inputs, rows)

    assert pays(4096, 4096, 1024)
    assert pays(8192, 4096, 4096)
    # one wave of tiles waits for those of the first column
    assert not pays(8192, 768, 3072)
