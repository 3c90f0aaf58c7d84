"""Times tritorch beside torch, in one run on one GPU, on every layer shape of ResNet-50.

    python -m tritorch.bench.resnet50 --json FILE [--sections conv,matmul] [--batch 256]

bfloat16, channels_last, random data, a cold L2 cache.  The two sides take turns, three rounds each;
a row's time is the median of its rounds' medians.  torch chooses its convolutions by
`cudnn.benchmark`.  A speed-up is written only for a row whose values were verified, and every row
is kept as soon as it is measured, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tritorch
from tritorch import ops
from tritorch.bench.environment import write_result
from tritorch.testing import tolerances

# name, how often ResNet-50 has it, channels in and out, kernel, stride, height and width of images
CONVOLUTIONS = (
    ("stem", 1, 3, 64, 7, 2, 224),
    ("s1b0.conv1", 1, 64, 64, 1, 1, 56),
    ("s1.conv2", 3, 64, 64, 3, 1, 56),
    ("s1.conv3", 4, 64, 256, 1, 1, 56),
    ("s1.conv1", 2, 256, 64, 1, 1, 56),
    ("s2b0.conv1", 1, 256, 128, 1, 1, 56),
    ("s2b0.conv2", 1, 128, 128, 3, 2, 56),
    ("s2.conv3", 4, 128, 512, 1, 1, 28),
    ("s2b0.downsample", 1, 256, 512, 1, 2, 56),
    ("s2.conv1", 3, 512, 128, 1, 1, 28),
    ("s2.conv2", 3, 128, 128, 3, 1, 28),
    ("s3b0.conv1", 1, 512, 256, 1, 1, 28),
    ("s3b0.conv2", 1, 256, 256, 3, 2, 28),
    ("s3.conv3", 6, 256, 1024, 1, 1, 14),
    ("s3b0.downsample", 1, 512, 1024, 1, 2, 28),
    ("s3.conv1", 5, 1024, 256, 1, 1, 14),
    ("s3.conv2", 5, 256, 256, 3, 1, 14),
    ("s4b0.conv1", 1, 1024, 512, 1, 1, 14),
    ("s4b0.conv2", 1, 512, 512, 3, 2, 14),
    ("s4.conv3", 3, 512, 2048, 1, 1, 7),
    ("s4b0.downsample", 1, 1024, 2048, 1, 2, 14),
    ("s4.conv1", 2, 2048, 512, 1, 1, 7),
    ("s4.conv2", 2, 512, 512, 3, 1, 7),
)
# channels, height and width of the activations between them
ACTIVATIONS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
SECTIONS = ("conv", "matmul", "batch_norm", "pool", "elementwise", "host", "train")
ROUNDS = 3


@dataclass
class Case:
    """One op on one shape: `ours` and `torchs` compute the same from the same tensors.

    `passes`: the positions of the tensors whose gradients a pass computes, by its name.
    """

    op: str
    shape: list[int]
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    passes: Mapping[str, tuple[int, ...]]
    flops: int = 0
    bytes: int = 0
    name: str = ""
    count: int = 1


class Bench:
    """Collects rows and keeps them."""

    def __init__(self, path: Path | None, rounds: int, part: tuple[int, int]) -> None:
        self.path, self.rounds, self.part = path, rounds, part
        self.rows: list[dict[str, Any]] = []
        self.seen = 0

    def skips(self) -> bool:
        """Whether the next case belongs to another part of the run."""
        self.seen += 1
        return self.seen % self.part[1] != self.part[0]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(*(shown.get(k) for k in _SHOWN), flush=True)
        if self.path is not None:
            write_result(self.path, "bench", self.rows, overwrite=True)

    def case(self, case: Case) -> None:
        """Times the forward pass and each gradient of a case."""
        if self.skips():
            return
        with torch.no_grad():
            like = case.torchs(*case.tensors)
        # of torch's memory format, as a layer above would send it
        grad = torch.randn_like(like)
        for which, positions in {"forward": (), **case.passes}.items():
            calls = [_call(f, case.tensors, positions, grad) for f in (case.ours, case.torchs)]
            if self.rounds == 0:
                # compiles, for a run that follows
                calls[0]()
                continue
            singles = tuple(t.float() if t.is_floating_point() else t for t in case.tensors)
            # the search for the fastest algorithm is not worth it for one call
            torch.backends.cudnn.benchmark = False
            truth = _call(case.torchs, singles, positions, grad.float())().double()
            torch.backends.cudnn.benchmark = True
            verdict = tolerances.compare(calls[0](), truth, baseline=calls[1]())
            del truth, singles
            self.add(self.row(case, which, calls, verdict))

    def row(
        self,
        case: Case,
        which: str,
        calls: list[Callable[[], Tensor]],
        verdict: tolerances.Verdict,
    ) -> dict[str, Any]:
        rounds = [[_microseconds(call) for call in calls] for _ in range(self.rounds)]
        ours, torchs = ([pair[side] for pair in rounds] for side in (0, 1))
        us, baseline_us = statistics.median(ours), statistics.median(torchs)
        return {
            "op": case.op,
            "name": case.name,
            "count": case.count,
            "shape": case.shape,
            "dtype": str(case.tensors[0].dtype).removeprefix("torch."),
            "layout": "channels_last" if case.tensors[0].dim() == 4 else "contiguous",
            "pass": which,
            "implementation": "tritorch",
            "baseline": "torch",
            "median_us": us,
            "baseline_us": baseline_us,
            "rounds_us": ours,
            "baseline_rounds_us": torchs,
            "speedup": baseline_us / us if verdict.accepted else None,
            "verified": verdict.accepted,
            "headroom": min(verdict.headroom, 1e9),
            "failure": verdict.failure,
            "tflops": case.flops / us / 1e6,
            "gbps": case.bytes / us / 1e3,
        }


_SHOWN = ("op", "name", "shape", "pass", "median_us", "baseline_us", "speedup", "verified")


def _microseconds(call: Callable[[], object]) -> float:
    import triton

    return float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median")) * 1e3


def _call(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    positions: tuple[int, ...],
    grad: Tensor,
) -> Callable[[], Tensor]:
    """A pass to time: the function itself, or the gradients of the tensors at `positions`."""
    if not positions:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    leaves = [t.detach().requires_grad_(i in positions) for i, t in enumerate(tensors)]
    wanted = [leaves[i] for i in positions]
    y = function(*leaves)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)[0]


def images(n: int, c: int, h: int, w: int) -> Tensor:
    x = torch.randn(n, c, h, w, device="cuda", dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def conv(batch: int) -> Iterator[Case]:
    for name, count, c, k, kernel, stride, size in CONVOLUTIONS:
        x = images(batch, c, size, size)
        w = images(k, c, kernel, kernel) * (c * kernel * kernel) ** -0.5
        padding = kernel // 2
        p = (size + 2 * padding - kernel) // stride + 1
        passes = {"grad_input": (0,), "grad_weight": (1,)} if c > 3 else {"grad_weight": (1,)}
        yield Case(
            op="conv2d",
            shape=[batch, c, size, size, k, kernel, stride],
            ours=lambda x, w, s=stride, p=padding: ops.conv2d(x, w, None, s, p),
            torchs=lambda x, w, s=stride, p=padding: F.conv2d(x, w, None, s, p),
            tensors=(x, w),
            passes=passes,
            flops=2 * batch * p * p * k * c * kernel * kernel,
            bytes=2 * (x.numel() + w.numel() + batch * k * p * p),
            name=name,
            count=count,
        )


def matmul(batch: int) -> Iterator[Case]:
    def case(name: str, count: int, m: int, n: int, k: int) -> Case:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
        return Case(
            op="linear",
            shape=[m, n, k],
            ours=lambda x, w: ops.linear(x, w),
            torchs=F.linear,
            tensors=(x, w),
            passes={"grad_input": (0,), "grad_weight": (1,)},
            flops=2 * m * n * k,
            bytes=2 * (m * k + n * k + m * n),
            name=name,
            count=count,
        )

    for size in (1024, 2048, 4096, 8192):
        yield case(f"square-{size}", 1, size, size, size)
    yield case("fc", 1, batch, 1000, 2048)
    for name, count, c, k, kernel, stride, size in CONVOLUTIONS:
        if kernel == stride == 1:
            yield case(name, count, batch * size * size, k, c)


def batch_norm(batch: int) -> Iterator[Case]:
    def plain(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: f(x, None, None, w, b, True)

    def torch_fused(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, w, b, True))

    def torch_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return F.relu(F.batch_norm(x, None, None, w, b, True) + r)

    def fused(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
        return ops.batch_norm(x, None, None, w, b, True, activation="relu", residual=r)

    for c, size in ACTIVATIONS:
        x = images(batch, c, size, size)
        vectors = torch.rand(2, c, device="cuda") + 0.5
        numbers = 2 * x.numel()
        shape = list(x.shape)
        backward = {"backward": (0, 1, 2)}
        yield Case(
            "batch_norm", shape, plain(ops.batch_norm), plain(F.batch_norm), (x, *vectors),
            backward, bytes=3 * numbers,
        )  # fmt: skip
        yield Case(
            "batch_norm_relu", shape, fused, torch_fused, (x, *vectors), backward,
            bytes=3 * numbers,
        )  # fmt: skip
        yield Case(
            "batch_norm_add_relu", shape, fused, torch_residual,
            (x, *vectors, torch.randn_like(x)), {"backward": (0, 1, 2, 3)}, bytes=4 * numbers,
        )  # fmt: skip


def pool(batch: int) -> Iterator[Case]:
    max_pool: Any = functools.partial(ops.max_pool2d, kernel_size=3, stride=2, padding=1)
    x = images(batch, 64, 112, 112)
    yield Case(
        "max_pool2d", list(x.shape), max_pool, lambda x: F.max_pool2d(x, 3, 2, 1),
        (x,), {"backward": (0,)}, bytes=5 * x.numel() // 2,
    )  # fmt: skip
    yield Case(
        "avg_pool2d", list(x.shape), lambda x: ops.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2),
        (x,), {"backward": (0,)}, bytes=5 * x.numel() // 2,
    )  # fmt: skip
    x = images(batch, 2048, 7, 7)
    yield Case(
        "avg_pool2d", list(x.shape), lambda x: ops.avg_pool2d(x, 7), lambda x: F.avg_pool2d(x, 7),
        (x,), {"backward": (0,)}, bytes=2 * x.numel(),
    )  # fmt: skip


def elementwise(batch: int) -> Iterator[Case]:
    for c, size in ACTIVATIONS:
        x = images(batch, c, size, size)
        yield Case(
            "relu", list(x.shape), ops.relu, F.relu, (x,), {"backward": (0,)}, bytes=4 * x.numel()
        )
    logits = torch.randn(batch, 1000, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(1000, (batch,), device="cuda")
    yield Case(
        "cross_entropy", list(logits.shape), ops.cross_entropy, F.cross_entropy, (logits, target),
        {"backward": (0,)}, bytes=2 * logits.numel(),
    )  # fmt: skip


def host(bench: Bench) -> None:
    """Host time of one call that the GPU finishes sooner than Python prepares it."""
    x = images(8, 64, 8, 8)
    w = images(64, 64, 3, 3)
    a = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    scale, shift = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "relu": (lambda: ops.relu(x), lambda: F.relu(x)),
        "matmul": (lambda: ops.matmul(a, a), lambda: torch.matmul(a, a)),
        "linear": (lambda: ops.linear(a, a), lambda: F.linear(a, a)),
        "conv2d": (lambda: ops.conv2d(x, w, None, 1, 1), lambda: F.conv2d(x, w, None, 1, 1)),
        "max_pool2d": (lambda: ops.max_pool2d(x, 2), lambda: F.max_pool2d(x, 2)),
        "avg_pool2d": (lambda: ops.avg_pool2d(x, 2), lambda: F.avg_pool2d(x, 2)),
        "batch_norm": (
            lambda: ops.batch_norm(x, None, None, scale, shift, True),
            lambda: F.batch_norm(x, None, None, scale, shift, True),
        ),
    }
    for op, pair in calls.items():
        if bench.rounds == 0:
            pair[0]()
            continue
        us = [statistics.median(_host_microseconds(c) for _ in range(bench.rounds)) for c in pair]
        bench.add(
            {
                "op": op,
                "name": "host",
                "shape": [],
                "dtype": "bfloat16",
                "layout": "",
                "pass": "host",
                "implementation": "tritorch",
                "baseline": "torch",
                "median_us": us[0],
                "baseline_us": us[1],
                "speedup": None,
                "verified": False,
            }
        )


def _host_microseconds(call: Callable[[], object], calls: int = 300) -> float:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def train(bench: Bench, batch: int) -> None:
    """Whole train steps of torchvision's ResNet-50 and of its converted twin, under autocast."""
    resnet50 = importlib.import_module("torchvision.models").resnet50

    x = images(batch, 3, 224, 224).float()
    target = torch.randint(1000, (batch,), device="cuda")

    def stepper(model: torch.nn.Module, loss_of: Any, optimizer: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss: Tensor = loss_of(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    torch.manual_seed(0)
    theirs = resnet50().cuda().to(memory_format=torch.channels_last)
    twin = tritorch.convert(resnet50().cuda().to(memory_format=torch.channels_last))
    twin.load_state_dict(theirs.state_dict())
    steps = {
        "tritorch": stepper(
            twin, ops.cross_entropy, tritorch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
        ),
        "torch": stepper(
            theirs, F.cross_entropy, torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
        ),
    }
    if bench.rounds == 0:
        steps["tritorch"]()
        return
    # the first step's loss, of equal weights; later ones drift apart as any two roundings do
    first = {name: float(step()) for name, step in steps.items()}
    verified = abs(first["tritorch"] - first["torch"]) < 2**-6 * abs(first["torch"])
    for step in steps.values():
        for _ in range(4):
            step()
    rounds = [[_microseconds(step) for step in steps.values()] for _ in range(bench.rounds)]
    us, baseline_us = (statistics.median(pair[side] for pair in rounds) for side in (0, 1))
    bench.add(
        {
            "op": "resnet50",
            "name": "train_step",
            "shape": list(x.shape),
            "dtype": "bfloat16",
            "layout": "channels_last",
            "pass": "train_step",
            "implementation": "tritorch",
            "baseline": "torch",
            "median_us": us,
            "baseline_us": baseline_us,
            "speedup": baseline_us / us if verified else None,
            "verified": verified,
            "first_loss": first,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
    )


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
    "conv": conv,
    "matmul": matmul,
    "batch_norm": batch_norm,
    "pool": pool,
    "elementwise": elementwise,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where the rows are kept")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0: only compile")
    parser.add_argument("--part", default="0/1", help="every N-th case alone, from I: I/N")
    options = parser.parse_args()
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: unknown {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = "ieee"
    index, parts = (int(number) for number in options.part.split("/"))
    bench = Bench(options.json, options.rounds, (index, parts))
    for section in options.sections.split(","):
        start = time.perf_counter()
        try:
            if section in CASES:
                for case in CASES[section](options.batch):
                    bench.case(case)
            elif section == "host":
                host(bench)
            else:
                for batch in (32, options.batch):
                    train(bench, batch)
        except Exception as error:
            # what was measured is kept, and the other sections still run
            print(f"{section} stopped: {error!r}"[:2000], flush=True)
        print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
