"""VGG with batch norm: Simonyan and Zisserman, Very deep convolutional networks for large-scale
image recognition, ICLR 2015.

Names of parameters are torchvision's.
"""

from collections.abc import Sequence

from torch import Tensor, nn

# channels of each convolution in units of the width, "M" for a max pool
VGG11 = (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M")


class VGG(nn.Module):
    """`width` is the channels of the first convolution, `size` the side of what the head sees."""

    def __init__(
        self,
        layout: Sequence[int | str],
        num_classes: int = 1000,
        dropout: float = 0.5,
        width: int = 64,
        size: int = 7,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in layout:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(channels, entry * width, 3, padding=1)
            channels = entry * width
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(size)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(channels * size * size, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


def vgg11_bn(num_classes: int = 1000, dropout: float = 0.5, width: int = 64, size: int = 7) -> VGG:
    return VGG(VGG11, num_classes, dropout, width, size)
