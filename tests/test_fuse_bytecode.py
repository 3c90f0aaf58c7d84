"""Forwards that their code shows to do what a record would not, and others that it does not."""

import contextlib
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import tritorch
from tests.fusing import place_of
from tests.test_fuse_declined import Model, both, images

pytestmark = pytest.mark.reference


class Trying(Model):
    """Takes what can be a view as one."""

    def forward(self, x):
        try:
            y = x.view(-1, 3, 4, 5)
        except RuntimeError:
            y = x.reshape(-1, 3, 4, 5)
        return F.relu(self.bn(y))


class Bare(Model):
    def forward(self, x):
        try:
            return F.relu(self.bn(x.view(-1, 3, 4, 5)))
        except:  # noqa: E722  what this class is for
            return self.bn(x)


class Ending(Model):
    def forward(self, x):
        x = F.relu(self.bn(x))
        try:
            return x
        finally:
            x.mul_(2)


class Printing(Model):
    def forward(self, x):
        print("images")  # noqa: T201  what this class is for
        return F.relu(self.bn(x))


class Seeding(Model):
    def forward(self, x):
        torch.manual_seed(0)
        return F.relu(self.bn(x)) + torch.rand_like(x)


class Suppressing(Model):
    def forward(self, x):
        with contextlib.suppress(RuntimeError):
            x = x.view(-1, 3, 4, 5) * 2
        return F.relu(self.bn(x))


class Identifying(Model):
    def forward(self, x):
        y = F.relu(self.bn(x))
        return y * 2 if x.dtype is torch.float64 else y


class Optional(Model):
    def forward(self, x):
        y = F.relu(self.bn(x))
        return y if self.compute is None else y * 2


class Matching(Model):
    def forward(self, x):
        match x.shape:
            case (_, _, _, _):
                return F.relu(self.bn(x))
        return self.bn(x)


def wrapped(forward):
    @functools.wraps(forward)
    def call(self, x):
        return forward(self, x)

    return call


class Decorated(Model):
    @wrapped
    def forward(self, x):
        try:
            return F.relu(self.bn(x.view(-1, 3, 4, 5)))
        except RuntimeError:
            return self.bn(x)


class Forking(Model):
    def forward(self, x):
        with torch.random.fork_rng():
            noise = torch.rand_like(x)
        return F.relu(self.bn(x)) + noise


TRIES = "it has a try or match statement: a record has one branch only"
# with the line that the report names, of a try statement the first one that handles something
WRITTEN = {
    Trying: (TRIES, "except RuntimeError"),
    Bare: (TRIES, "except:"),
    Ending: (TRIES, "x.mul_(2)"),
    Printing: ("it may call print, which a record does not repeat", "print("),
    Seeding: ("it may call manual_seed, which a record does not repeat", "manual_seed"),
    Identifying: ("it compares by `is` with something other than None", " is torch.float64"),
    Suppressing: ("it may call suppress, which a record does not repeat", "suppress"),
    Matching: (TRIES, "case"),
    Decorated: (TRIES, "except RuntimeError"),
    Forking: ("it may call fork_rng, which a record does not repeat", "fork_rng"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_a_forward_does_besides_it_does_each_time(kind, capsys):
    converted, fused = both(kind(None))
    state = torch.get_rng_state()
    reason, text = WRITTEN[kind]
    assert tritorch.fusion_report(fused).kept[""] == f"{reason} ({place_of(kind, text)})"
    assert torch.equal(torch.get_rng_state(), state)
    capsys.readouterr()
    found, printed = [], []
    # a view of it has other strides than the shape asks for
    x = images().transpose(2, 3).contiguous().transpose(2, 3)
    for model in (converted, fused):
        torch.manual_seed(3)
        found.append([model(x), torch.rand(2)])
        printed.append(capsys.readouterr().out)
    assert_close(found[1], found[0])
    assert printed[1] == printed[0] == ("images\n" if kind is Printing else "")


class Told(nn.Module):
    """What a forward does not reach."""

    def load_state_dict(self, *given, **named):
        try:
            return super().load_state_dict(*given, **named)
        except RuntimeError:
            return None

    @property
    def device(self):
        try:
            return next(self.parameters()).device
        except StopIteration:
            return torch.device("cpu")

    def summary(self):
        print(self)  # noqa: T201  what this class is for

    def reset(self):
        torch.manual_seed(0)


class Telling(Model, Told):
    def forward(self, x):
        return super().forward(x)


def test_what_a_forward_does_not_reach_is_no_part_of_it():
    converted, fused = both(Telling(lambda m, x: F.relu(m.bn(x))))
    assert tritorch.fusion_report(fused).fused == {"bn": "relu"}
    assert_close(fused(images()), converted(images()))


# of a value what torch's functions take as a size, a dtype, a device or an operand
TAKEN = {
    "reshape": lambda m, x: torch.reshape(F.relu(m.bn(x)), x.shape),
    "ones": lambda m, x: F.relu(m.bn(x)) + torch.ones(x.shape, dtype=x.dtype, device=x.device),
    "softmax": lambda m, x: F.softmax(F.relu(m.bn(x)), -1, dtype=x.dtype),
    "matmul": lambda m, x: torch.matmul(F.relu(m.bn(x)), x.mT),
    "matmul of it": lambda m, x: torch.matmul(x.mT, F.relu(m.bn(x))),
    "cat": lambda m, x: torch.cat([F.relu(m.bn(x)), x.mT.mT]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_attributes_of_a_value_are_given_to_functions(case):
    converted, fused = both(Model(TAKEN[case]))
    assert tritorch.fusion_report(fused).fused == {"bn": "relu"}
    x = images()
    assert_close(fused(x), converted(x))
    assert_close(fused(x[:1, :, 1:]), converted(x[:1, :, 1:]))


def test_threads_that_draw_change_nothing():
    ends = threading.Event()

    def draw():
        while not ends.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        model = tritorch.convert(Model(lambda m, x: F.relu(m.bn(x))))
        found = [tritorch.fusion_report(tritorch.fuse(model)).fused for _ in range(20)]
    finally:
        ends.set()
        thread.join()
    assert found == [{"bn": "relu"}] * 20


def test_models_of_fake_tensors_are_recorded():
    with FakeTensorMode():
        fused = tritorch.fuse(Model(lambda m, x: F.relu(m.bn(x))))
        assert tritorch.fusion_report(fused).fused == {"bn": "relu"}


class Within(Model):
    """A block that ends nothing but itself."""

    def forward(self, x):
        with contextlib.nullcontext():
            return F.relu(self.bn(x))


@pytest.mark.parametrize("kind", [Within, Optional])
def test_blocks_are_no_try_statements_and_none_is_itself(kind):
    converted, fused = both(kind(None))
    assert tritorch.fusion_report(fused).fused == {"bn": "relu"}
    assert_close(fused(images()), converted(images()))
