"""Matrix products on descriptors, in tiles small enough for an interpreter, and their gradients."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from tritorch import backend, hardware, launch
from tritorch.ops import matmul_tma, stream_k
from tritorch.testing.detectors import detecting

configs = matmul_tma.configs
last = torch.channels_last
KERNEL, SUM, PARTS = "matmul_tma_kernel", "many_splits_sum_kernel", "matmul_tma_parts_kernel"


@contextlib.contextmanager
def taking(config):
    """Where tiles may be shared, a configuration of that form; elsewhere one of any other."""
    stream_k = config.kwargs["FORM"] == "stream-k"
    blocks = [config.kwargs[f"BLOCK_{axis}"] for axis in "MNK"]
    alike = [
        entry
        for table in configs.MATMUL_TMA_CONFIGS.values()
        for entry in table
        if entry.kwargs["FORM"] == "tile"
        and [entry.kwargs[f"BLOCK_{axis}"] for axis in "MNK"] == blocks
    ]
    other = (*alike, configs.MATMUL_TMA_CONFIGS[2][1])[0] if stream_k else config
    with (
        launch.override("matmul_tma_stream_k_config", config if stream_k else None),
        launch.override("matmul_tma_config", other),
    ):
        yield


@contextlib.contextmanager
def tiles(form, *blocks, pieces=2):
    """Everything on descriptors through this tile, in strict mode; the kernels launched."""
    config = configs._tile(form, *blocks, 4, 2, pieces)
    with (
        hardware.pretend(90),
        taking(config),
        backend.use("triton"),
        backend.strict(),
        launch.recorded() as names,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(matmul_tma, "_MIN_PRODUCTS", 0)
        # few programs, so that one has several tiles
        chosen = matmul_tma.processors
        patched.setattr(matmul_tma, "processors", lambda *given: min(1, chosen(*given)))
        patched.setattr(configs, "sums_pay", lambda *_: True)
        if form == "stream-k":
            patched.setattr(configs, "MULTIPROCESSORS", 1)
            # no more than there are slices
            patched.setattr(stream_k, "num_programs", lambda *_: 3)
            patched.setattr(stream_k, "COLUMNS", 8)
        yield names


@pytest.fixture(autouse=True)
def hopper(request, device):
    """On a GPU the kernels are chosen by what it is, and no interpreter pretends."""
    if device == "cuda" and request.node.get_closest_marker("interpret"):
        major, minor = torch.cuda.get_device_capability()
        if major != 9:
            pytest.skip(f"kernels for compute capability 9, this GPU has {major}.{minor}")


@contextlib.contextmanager
def watched(device):
    """Every access, where it can be seen."""
    if device == "cuda":
        yield
        return
    with detecting() as detector:
        yield
    assert detector.findings == []


def made(device, *shape, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return values.contiguous(memory_format=last) if len(shape) == 4 else values


def assert_close(found, exact, terms=1):
    """Sums are kept in float32: what is lost is the rounding of each of the terms."""
    assert found.isfinite().all()
    limit = terms * torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= limit


def along(matrix, columns):
    """The same values with the other axis along memory."""
    return matrix.mT.contiguous().mT if columns else matrix


def with_residual(op, activation=None, **options):
    """Ours, or torch's with the rest of it behind."""
    function = getattr(F, activation or "", lambda y: y)

    def run(*operands):
        *given, residual = operands
        if op.__module__.startswith("tritorch"):
            return op(*given, activation=activation, residual=residual, **options)
        return function(op(*given, **options) + residual)

    return run


def gradients(run, operands):
    leaves = [o.detach().clone().requires_grad_() for o in operands]
    y = run(*leaves)
    grad = made(y.device, *y.shape, seed=1).to(y.dtype)
    return (y, *torch.autograd.grad(y, leaves, grad))


def empty(*shape, dtype=torch.bfloat16):
    values = torch.empty(shape, dtype=dtype)
    return values.contiguous(memory_format=last) if len(shape) == 4 else values
