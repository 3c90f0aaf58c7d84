"""ConvNeXt: Liu et al., A ConvNet for the 2020s, CVPR 2022.

Names of parameters are torchvision's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def per_pixel(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the channels of images (N, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class StochasticDepth(nn.Module):
    """Drops the whole of an image with probability `p`, in training: Huang et al., ECCV 2016."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


class Block(nn.Module):
    """A depthwise 7x7 convolution, then two linear layers on each pixel's channels."""

    def __init__(self, channels: int, layer_scale: float, dropped: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.stochastic_depth = StochasticDepth(dropped)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class Stem(nn.Sequential):
    def __init__(self, channels: int) -> None:
        conv = nn.Conv2d(3, channels, 4, stride=4)
        super().__init__(conv, nn.LayerNorm(channels, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return per_pixel(norm, conv(x))


class Downsampling(nn.Sequential):
    def __init__(self, channels_in: int, channels: int) -> None:
        conv = nn.Conv2d(channels_in, channels, 2, stride=2)
        super().__init__(nn.LayerNorm(channels_in, eps=1e-6), conv)

    def forward(self, x: Tensor) -> Tensor:
        norm, conv = self
        return conv(per_pixel(norm, x))


class Head(nn.Sequential):
    def __init__(self, channels: int, num_classes: int) -> None:
        norm = nn.LayerNorm(channels, eps=1e-6)
        super().__init__(norm, nn.Flatten(1), nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        norm, flatten, linear = self
        return linear(flatten(per_pixel(norm, x)))


class ConvNeXt(nn.Module):
    """`blocks` is how many each of the stages has, `width` the channels of the first.

    `dropped` is the probability with which the last block is dropped; it rises linearly from 0.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int = 1000,
        width: int = 96,
        layer_scale: float = 1e-6,
        dropped: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [Stem(width)]
        step = dropped / max(sum(blocks) - 1, 1)
        before = 0
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            if stage > 0:
                layers.append(Downsampling(channels // 2, channels))
            drops = [step * (before + index) for index in range(count)]
            layers.append(nn.Sequential(*(Block(channels, layer_scale, p) for p in drops)))
            before += count
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Head(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


def convnext_tiny(
    blocks: Sequence[int] = (3, 3, 9, 3),
    num_classes: int = 1000,
    width: int = 96,
    layer_scale: float = 1e-6,
    dropped: float = 0.1,
) -> ConvNeXt:
    return ConvNeXt(blocks, num_classes, width, layer_scale, dropped)
