"""The choice between kernels and reference path: who decides, what is counted, what raises."""

import pytest
import torch
from torch.autograd import forward_ad

from tritorch import backend, launch, ops

pytestmark = pytest.mark.reference


@pytest.fixture(autouse=True)
def fresh_counts():
    backend.reset()
    yield
    backend.reset()


def test_cpu_tensors_take_the_reference_path_uncounted():
    with launch.recorded() as launches:
        y = ops.relu(torch.tensor([-1.0, 2.0]))
    assert y.tolist() == [0.0, 2.0]
    assert launches == []
    assert backend.explain() == {}


def test_a_declined_call_is_counted_with_its_reason():
    with backend.use("triton"):
        for _ in range(2):
            y = ops.relu(torch.tensor([-1, 2]))
        ops.matmul(torch.ones(2, 1, 2, 3, requires_grad=True), torch.ones(4, 3, 2))
    assert y.tolist() == [0, 2]
    assert backend.explain() == {
        "matmul": {"batches that broadcast": 1},
        "relu": {"dtype int64": 2},
    }
    backend.reset()
    assert backend.explain() == {}


def test_strict_turns_a_fallback_into_an_error():
    with (
        backend.use("triton"),
        backend.strict(),
        pytest.raises(backend.FallbackError, match=r"relu: the kernels do not take.*dtype int64"),
    ):
        ops.relu(torch.tensor([1]))
    with backend.use("triton"):
        assert ops.relu(torch.tensor([1])).tolist() == [1]


def test_use_is_a_switch_and_a_block():
    assert backend.current() == "auto"
    with backend.use("reference"):
        assert backend.current() == "reference"
        with backend.use("triton"):
            assert backend.current() == "triton"
        assert backend.current() == "reference"
    assert backend.current() == "auto"
    backend.use("reference")
    assert backend.current() == "reference"
    backend.use("auto")
    with pytest.raises(ValueError, match="expects 'auto', 'triton' or 'reference', received 'gpu'"):
        backend.use("gpu")
    assert backend.current() == "auto"


def test_a_cpu_launch_outside_the_interpreter_says_what_is_missing():
    with (
        backend.use("triton"),
        pytest.raises(RuntimeError, match=r"needs a CUDA tensor, or TRITON_INTERPRET=1.*cpu"),
    ):
        ops.relu(torch.tensor([1.0]))


def test_func_transforms_take_the_reference_path():
    x = torch.tensor([-1.0, 2.0])
    with backend.use("triton"):
        grad = torch.func.grad(lambda t: ops.relu(t).sum())(x)
    assert grad.tolist() == [0.0, 1.0]
    assert backend.explain() == {"relu": {"a torch.func transform is active": 1}}


def test_forward_mode_takes_the_reference_path():
    with backend.use("triton"), forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tangent = forward_ad.unpack_dual(ops.relu(dual)).tangent
    assert tangent.tolist() == [0.0, 4.0]
    assert backend.explain() == {"relu": {"forward-mode differentiation is active": 1}}


def test_override_forces_one_configuration_and_ends():
    def some_config(size: int) -> int:
        return size

    with launch.override("some_config", 7), launch.choices() as chosen:
        assert launch.config(some_config, 3) == 7
        with launch.override("some_config", 8):
            assert launch.config(some_config, 3) == 8
        assert launch.config(some_config, 3) == 7
    assert launch.config(some_config, 3) == 3
    assert chosen == [("some_config", 7), ("some_config", 8), ("some_config", 7)]
    # None as well, whose kernel is not launched
    with launch.override("some_config", None):
        with launch.override("some_config", 8):
            assert launch.config(some_config, 3) == 8
        assert launch.config(some_config, 3) is None
    assert launch.config(some_config, 3) == 3
