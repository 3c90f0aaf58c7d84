"""Gradients of filters on Hopper whose sums programs share."""

import pytest
import torch

from tests.hopper_convolutions import CASES, gradients, tiles
from tritorch.ops import conv_weight_tma
from tritorch.testing.detectors import detecting

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("programs", [1, 5, 13])
@pytest.mark.parametrize("name", ["3x3", "odd-stride-2", "dilation", "groups", "columns"])
def test_programs_with_equal_shares_of_the_gradient_of_a_filter(name, programs, monkeypatch):
    """They begin and end anywhere in sums of different lengths, for which there are more of them
    than sums or fewer.
    """
    case, chosen = CASES[name], []

    def shares(config, tiles, steps, groups, weights):
        # at least a step for each
        chosen.append(equal_shares(tiles, steps, min(programs, tiles * sum(steps))))
        return chosen[-1]

    monkeypatch.setattr(conv_weight_tma.kernels, "shares", shares)
    *operands, grad = case.make()
    with tiles(case), detecting() as detector:
        _, _, found, _ = gradients(case.run, operands, grad)
    assert detector.findings == []
    assert len(chosen) == 1
    _, _, exact, _ = gradients(case.reference, [o.double() for o in operands], grad.double())
    error = (found.double() - exact).abs().max()
    assert error <= torch.finfo(case.dtype).eps * exact.abs().max()


def equal_shares(tiles, steps, programs):
    return programs, conv_weight_tma.kernels.most_programs(tiles, steps, programs), True


@pytest.mark.parametrize("programs", range(1, 21))
def test_how_many_programs_share_a_sum(programs):
    lengths = [4, 4, 6, 6]
    of_steps = [number for number, length in enumerate(lengths) for _ in range(length)]
    share = [(at * 20 // programs, (at + 1) * 20 // programs) for at in range(programs)]
    sharing = [number for begin, end in share for number in set(of_steps[begin:end])]
    most = max(sharing.count(number) for number in range(4))
    assert equal_shares(2, [4, 6], programs) == (programs, most, True)


def test_which_gradients_of_filters_take_stream_k(monkeypatch):
    """Where sums differ in length, or are a wave of programs and a bit; not where they fill one."""
    weights = conv_weight_tma.kernels
    config = weights.CONV2D_GRAD_WEIGHT_TMA_CONFIGS[2][0]
    of_taps = [each * 4 for each in (36, 42, 36, 42, 49, 42, 36, 42, 36)]
    filters = 512 * 512 * 9
    assert weights.shares(config, 8, of_taps, 1, filters) == (132, 3, True)
    assert weights.shares(config, 12, [49 * 4] * 11, 1, filters) == (132, 1, False)
    # two groups have half of the multiprocessors each
    assert weights.shares(config, 8, of_taps, 2, filters)[0] == 66
    # the kernel must be able to count the steps of all programs
    monkeypatch.setattr("tritorch.kernels.conv_weight_tma.GAIN", float("inf"))
    for times, stream_k in ((1000, True), (2000, False)):
        assert (
            weights.shares(config, 8, [each * times for each in of_taps], 1, filters)[2] == stream_k
        )
