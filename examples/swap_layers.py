"""Converts a model to tritorch's layers and trains it beside its torch.nn twin."""

import argparse
import copy

import torch

import tritorch


class Digits(torch.nn.Module):
    """An ordinary PyTorch model: nothing in it knows of tritorch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        )
        self.dropout = torch.nn.Dropout2d(0.0)
        self.head = torch.nn.Linear(8 * 4 * 4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(images)).flatten(1))


def train(model: torch.nn.Module, steps: int, device: str) -> list[float]:
    """The losses of a few steps on random images with random labels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    images = torch.randn(16, 1, 8, 8, device=device)
    labels = torch.randint(10, (16,), device=device)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Digits().to(options.device)
    twin = copy.deepcopy(model)
    tritorch.convert(model, inplace=True)
    print(tritorch.conversion_report(model))

    ours = train(model, options.steps, options.device)
    theirs = train(twin, options.steps, options.device)
    print("step  tritorch  torch.nn")
    for step, losses in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"{step:4}  {losses[0]:8.5f}  {losses[1]:8.5f}")

    # a checkpoint of either loads into the other
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(tritorch.revert(model).state_dict(), twin.state_dict())


if __name__ == "__main__":
    main()
