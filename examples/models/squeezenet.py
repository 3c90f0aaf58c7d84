"""SqueezeNet 1.1: Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and
<0.5MB model size, 2016.

Names of parameters are torchvision's.
"""

import torch
from torch import Tensor, nn


class Fire(nn.Module):
    """Squeezes the channels, then expands them by 1x1 and by 3x3 convolutions side by side."""

    def __init__(self, channels_in: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        ones = self.expand1x1_activation(self.expand1x1(x))
        threes = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat([ones, threes], 1)


class SqueezeNet(nn.Module):
    """`width` is the channels that the first two fire modules squeeze to."""

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, width: int = 16) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            nn.Conv2d(3, 4 * w, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(4 * w, w, 4 * w),
            Fire(8 * w, w, 4 * w),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(8 * w, 2 * w, 8 * w),
            Fire(16 * w, 2 * w, 8 * w),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(16 * w, 3 * w, 12 * w),
            Fire(24 * w, 3 * w, 12 * w),
            Fire(24 * w, 4 * w, 16 * w),
            Fire(32 * w, 4 * w, 16 * w),
        )
        last = nn.Conv2d(32 * w, num_classes, 1)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), last, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is last:
                    nn.init.normal_(module.weight, 0, 0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


def squeezenet1_1(num_classes: int = 1000, dropout: float = 0.5, width: int = 16) -> SqueezeNet:
    return SqueezeNet(num_classes, dropout, width)
