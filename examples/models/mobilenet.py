"""MobileNetV2: Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018.

Names of parameters are torchvision's.
"""

from collections.abc import Sequence

from torch import Tensor, nn

# expansion, channels, blocks and stride of the first block, stage by stage
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def divisible(channels: float, by: int) -> int:
    """The nearest multiple that takes away at most a tenth."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded if rounded >= 0.9 * channels else rounded + by


class ConvNormActivation(nn.Sequential):
    def __init__(
        self, channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(
                channels_in, channels, size, stride, (size - 1) // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(channels_in, hidden, 1))
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.is_residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """`width` is the paper's multiplier of channels, `divisor` what divides them all.

    `last` is the channels of the last convolution, which are multiplied only by more than 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        stages: Sequence[tuple[int, int, int, int]] = STAGES,
        divisor: int = 8,
        last: int = 1280,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels = divisible(32 * width, divisor)
        last = divisible(last * max(1.0, width), divisor)
        layers: list[nn.Module] = [ConvNormActivation(3, channels, 3, stride=2)]
        for expansion, base, blocks, first_stride in stages:
            wider = divisible(base * width, divisor)
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, wider, stride, expansion))
                channels = wider
        layers.append(ConvNormActivation(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v2(
    num_classes: int = 1000,
    width: float = 1.0,
    stages: Sequence[tuple[int, int, int, int]] = STAGES,
    divisor: int = 8,
    last: int = 1280,
    dropout: float = 0.2,
) -> MobileNetV2:
    return MobileNetV2(num_classes, width, stages, divisor, last, dropout)
