"""What a step costs, the noise twins, and the rows of a GPU, whose clock is replaced here."""

import copy
import dataclasses

import pytest
import torch

from tritorch.data import Digits, split
from tritorch.training import report, twins
from tritorch.training.train import curves_of, run
from tritorch.training.twins import Lenet8, NoiseTwin, Settings, Twin

pytestmark = pytest.mark.reference


class Event:
    """A clock that moves by 250 microseconds at each record."""

    now = 0.0

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 0.25
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def twin():
    torch.manual_seed(0)
    return Twin(Lenet8(), Settings())


def images(count):
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 10


def test_gpu_time_is_that_of_its_events(twin, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before = copy.deepcopy(twin.model.linear.weight)
    assert twins._microseconds_on_gpu(twin, *images(4)) == 250.0
    assert not torch.equal(twin.model.linear.weight, before)


def test_gpu_memory_is_the_state_and_the_peak_above_it(twin, monkeypatch):
    for name, value in (("memory_allocated", 1000), ("max_memory_allocated", 1700)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    tensors = [*twin.model.parameters(), *twin.model.buffers()]
    assert twins._memory_on_gpu(twin, *images(4)) == sum(t.nbytes for t in tensors) + 700


def test_cpu_memory_grows_by_what_an_image_keeps(twin):
    twin.step(*images(4))
    four, eight = (twins._memory(twin, *images(count)) for count in (4, 8))
    floats = 64 + 2 * 16 * 64 + 16 * 16 + 2 * 32 * 16 + 10
    indices = 16 * 16 + 1
    assert eight - four == 4 * (4 * floats + 8 * indices)


def test_noise_twin_keeps_the_upper_bits():
    torch.manual_seed(0)
    twin = NoiseTwin(Lenet8(), Settings(), 6)
    twin.step(*images(4))
    for parameter in twin.model.parameters():
        assert not (parameter.detach().view(torch.int32) & 0b111111).any()


def test_gap_beyond_three_times_the_noise_is_beyond_the_limit():
    noise = 1e-3
    losses = torch.tensor([[1.0, 0.5], [1.0, 0.5 + 2.9 * noise], [1.0, 0.5 + noise], [1.0, 0.5]])
    losses = losses.double()
    assert curves_of(losses, torch.float32).share_of_limit < 1
    losses[1, 1] = 0.5 + 3.1 * noise
    assert curves_of(losses, torch.float32).share_of_limit > 1
    losses[1, 1] = float("nan")
    assert curves_of(losses, torch.float32).share_of_limit == float("inf")


def test_another_order_of_summation_agrees(monkeypatch):
    train, test = split(3)
    train = Digits(train.images[:512], train.labels[:512])
    step = Twin.step

    def reordered(self, images, labels):
        if type(self) is Twin and type(self.model.conv1) is not torch.nn.Conv2d:
            order = torch.arange(len(labels)).roll(len(labels) // 3)
            images, labels = images[order], labels[order]
        return step(self, images, labels)

    monkeypatch.setattr(Twin, "step", reordered)
    settings = Settings(epochs=2, replay_steps=0)
    result = run(settings, torch.device("cpu"), train=train, test=test)
    assert result.curves.gap[-1] > 0
    assert result.failures == []


def test_gpu_result_has_a_row_of_its_time():
    train, test = split(0)
    few = Digits(train.images[:64], train.labels[:64])
    settings = Settings(epochs=1, batch=32, replay_steps=0)
    result = run(settings, torch.device("cpu"), train=few, test=test)
    assert [row["pass"] for row in report.rows(result)] == ["epoch"]
    torchs, ours = (dataclasses.replace(result.cost_torch, median_us=us) for us in (300.0, 200.0))
    found = dataclasses.replace(
        result, device=torch.device("cuda"), cost_torch=torchs, cost_tritorch=ours
    )
    row = report.rows(found)[-1]
    assert (row["op"], row["pass"], row["shape"]) == ("lenet8", "train_step", "32x1x8x8")
    assert (row["median_us"], row["speedup"], row["verified"]) == (200.0, 1.5, True)
    wrong = dataclasses.replace(found, failures=["the losses differ"])
    assert report.rows(wrong)[-1]["verified"] is False
