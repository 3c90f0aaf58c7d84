"""What the properties of a GPU find, on fakes of its graphs and streams."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch

from tritorch.registry import Sample, Subject
from tritorch.testing import battery_gpu, cases, examine, schedule
from tritorch.testing.trials import Case

pytestmark = pytest.mark.reference

CASE = Case("typical", torch.float32)


def scaled_rows(input, weight):
    return input * weight


SUBJECT = Subject(
    name="scaled_rows",
    op=scaled_rows,
    reference=scaled_rows,
    gradients=("input", "weight"),
    samples=lambda make: iter([Sample("typical", input=make(6, 5), weight=make(5))]),
    accuracy="composite",
)


def kinds(findings):
    return [finding.kind for finding in findings]


class Gpu:
    """Streams that run at once, and graphs that do again what an op told them to."""

    def __init__(self):
        self.capturing = False
        self.steps = []
        self.delayed = []

    def launch(self, compute, *tensors):
        """The result of `compute`, which a replay of the graph computes again in its place."""
        output = compute(*tensors)
        if self.capturing:
            self.steps.append(lambda: output.copy_(compute(*tensors)))
        return output

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        yield
        self.capturing = False

    def replay(self):
        for step in self.steps:
            step()


class Stream:
    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    found = Gpu()
    replacements = {
        "CUDAGraph": lambda: found,
        "graph": found.graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "_sleep": found.delayed.append,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return found


def recorded(gpu):
    """The op as a GPU runs it: its kernels are what a graph replays."""

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input, weight):
            ctx.save_for_backward(input, weight)
            return gpu.launch(torch.mul, input, weight)

        @staticmethod
        def backward(ctx, grad):
            input, weight = ctx.saved_tensors
            to_weight = gpu.launch(lambda g, x: (g * x).sum(0), grad, input)
            return gpu.launch(torch.mul, grad, weight), to_weight

    return Rows.apply


def test_a_graph_of_kernels_replays(gpu):
    assert battery_gpu.cuda_graph(replace(SUBJECT, op=recorded(gpu)), CASE) == []
    assert len(gpu.steps) == 3


def test_a_number_that_a_graph_keeps_is_told(gpu):
    op = recorded(gpu)
    subject = replace(SUBJECT, op=lambda input, weight: op(input, weight) * 1.0)
    found = battery_gpu.cuda_graph(subject, CASE)
    assert set(kinds(found)) == {"cuda graph"}
    assert found[0].message.startswith("replayed, output 0: C1 element")
    assert found[0].argument == "output 0"


def synchronizing(gpu):
    def op(input, weight):
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return input * weight

    return replace(SUBJECT, op=op)


def test_a_call_that_cannot_be_captured_is_refused(gpu):
    with pytest.raises(battery_gpu.NotCaptured) as refused:
        battery_gpu.cuda_graph(synchronizing(gpu), CASE)
    assert str(refused.value).startswith(
        "the call cannot be captured in a CUDA graph: RuntimeError: operation not permitted when "
        f"stream is capturing at {__file__}:"
    )


def test_a_capture_that_fails_at_its_end_is_no_mistake_of_the_checks(gpu, monkeypatch):
    @contextlib.contextmanager
    def graph(graph):
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(battery_gpu.NotCaptured, match="failed due to a previous error"):
        battery_gpu.cuda_graph(SUBJECT, CASE)


def test_what_cannot_be_captured_is_a_note_of_an_examination(gpu):
    subject = synchronizing(gpu)
    examination = examine.Examination(subject, device="cuda")
    run = partial(battery_gpu.cuda_graph, subject, CASE)
    assert examination.watched(schedule.Step("CUDA graphs", CASE, run)) == []
    (note,) = examination.notes
    assert note.startswith("the call cannot be captured in a CUDA graph: RuntimeError: ")


def test_a_late_argument_is_waited_for(gpu):
    assert battery_gpu.side_stream(SUBJECT, CASE) == []
    assert len(gpu.delayed) == 1


def test_work_on_another_stream_is_told(gpu):
    first = {}

    def op(input, weight):
        # what another stream reads while this one waits
        if gpu.delayed:
            return first.setdefault("late", torch.full_like(input, float("nan"))) * weight
        return input * weight

    found = battery_gpu.side_stream(replace(SUBJECT, op=op, gradients=()), CASE)
    assert kinds(found) == ["stream"]
    assert "on a side stream, output 0: C0 NaN" in found[0].message


@pytest.mark.parametrize("layout", [None, *cases.LAYOUTS])
def test_bands_leave_a_right_function_alone(layout):
    case = CASE if layout is None else replace(CASE, layout=("input", layout))
    assert battery_gpu.guard_bands(SUBJECT, case) == []


def has_bands(tensor):
    """Whether there is memory beside a tensor that a test may touch."""
    return tensor.untyped_storage().nbytes() > 4096


def test_bands_show_what_is_written_beside_a_tensor():
    def op(input, weight):
        output = input * weight
        if has_bands(input):
            torch.as_strided(input, (1,), (1,), input.storage_offset() + 30).zero_()
        return output

    (found,) = battery_gpu.guard_bands(replace(SUBJECT, op=op, gradients=()), CASE)
    assert (found.kind, found.argument) == ("guard band", "input")
    assert found.message == "memory beside input was written"


def test_bands_show_what_is_read_beside_a_tensor():
    def op(input, weight):
        if not has_bands(input):
            return input * weight
        return input * weight + 0 * torch.as_strided(input, (1,), (1,), input.storage_offset() + 30)

    (found,) = battery_gpu.guard_bands(replace(SUBJECT, op=op, gradients=()), CASE)
    assert found.kind == "guard band"
    assert "with NaN beside the arguments, output 0: C0 NaN" in found.message


def test_arguments_that_a_call_writes_are_compared():
    def op(input, weight):
        input.mul_(weight)

    subject = replace(SUBJECT, op=op, reference=op, gradients=(), mutates=("input",))
    assert battery_gpu.guard_bands(subject, CASE) == []
