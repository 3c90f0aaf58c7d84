"""Losses where only a GPU can tell: autocast of its own, and a host that does not wait."""

import pytest
import torch

from tritorch import ops

pytestmark = pytest.mark.cuda


def test_binary_cross_entropy_is_refused_under_autocast_of_a_gpu():
    x = torch.rand(3, device="cuda")
    with (
        torch.autocast("cuda"),
        pytest.raises(RuntimeError, match="use binary_cross_entropy_with_logits"),
    ):
        ops.binary_cross_entropy(x, x)


# torch calls the mode a prototype, once
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_losses_do_not_wait_for_the_gpu():
    x = torch.rand(8, 5, device="cuda", requires_grad=True)
    y = torch.rand(8, 5, device="cuda")
    classes = torch.arange(8, device="cuda") % 5
    calls = [
        lambda: ops.cross_entropy(x, classes, ignore_index=1, label_smoothing=0.1),
        lambda: ops.mse_loss(x, y, weight=y),
        lambda: ops.binary_cross_entropy(x, y),
        lambda: ops.binary_cross_entropy_with_logits(x, y),
    ]
    # the first round compiles and loads, which may wait
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for call in calls:
                call().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
