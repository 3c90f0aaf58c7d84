"""DenseNet-BC: Huang et al., Densely connected convolutional networks, CVPR 2017.

Names of parameters are torchvision's.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """`growth` more channels from all that there are."""

    def __init__(self, channels: int, growth: int, bottleneck: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(x)))
        return self.dropout(self.conv2(self.relu2(self.norm2(x))))


class DenseBlock(nn.ModuleDict):
    def __init__(
        self, layers: int, channels: int, growth: int, bottleneck: int, dropout: float
    ) -> None:
        super().__init__()
        for index in range(layers):
            layer = DenseLayer(channels + index * growth, growth, bottleneck, dropout)
            self[f"denselayer{index + 1}"] = layer

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """`blocks` is how many layers each dense block has, `width` the channels of the stem."""

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int = 1000,
        growth: int = 32,
        width: int = 64,
        bottleneck: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        features: OrderedDict[str, nn.Module] = OrderedDict()
        features["conv0"] = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        features["norm0"] = nn.BatchNorm2d(width)
        features["relu0"] = nn.ReLU(inplace=True)
        features["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for number, layers in enumerate(blocks, 1):
            block = DenseBlock(layers, channels, growth, bottleneck, dropout)
            features[f"denseblock{number}"] = block
            channels += layers * growth
            if number < len(blocks):
                features[f"transition{number}"] = Transition(channels, channels // 2)
                channels //= 2
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(features)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.features(x))
        return self.classifier(self.avgpool(x).flatten(1))


def densenet121(
    blocks: Sequence[int] = (6, 12, 24, 16),
    num_classes: int = 1000,
    growth: int = 32,
    width: int = 64,
) -> DenseNet:
    return DenseNet(blocks, num_classes, growth, width)
