"""Products of batches that broadcast, whose gradients are torch's."""

import pytest
import torch

from tritorch import launch, ops

pytestmark = [pytest.mark.reference, pytest.mark.interpret]


@pytest.mark.parametrize(
    ("input", "other"),
    [
        ((2, 1, 3, 5), (4, 5, 2)),
        ((3, 5), (4, 5, 2)),
        ((5,), (2, 4, 5, 3)),
        ((2, 1, 3, 5), (1, 4, 5, 2)),
        ((2, 3, 5), (1, 5, 2)),
        ((1, 3, 5), (5,)),
        ((0, 1, 3, 5), (4, 5, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("needs", [False, True], ids=["without-gradient", "with-gradient"])
def test_batches_of_products_broadcast(input, other, needs, device, rung):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device) for shape in (input, other))
    a.requires_grad_(needs)
    with launch.recorded() as launches:
        y = ops.matmul(a, b)
    torch.testing.assert_close(y, torch.matmul(a, b))
    broadcasts = len(other) > 2
    taken = rung != "reference" and y.numel() > 0 and not (needs and broadcasts)
    assert bool(launches) == taken
