"""U-Net: Ronneberger et al., U-Net: convolutional networks for biomedical image segmentation,
MICCAI 2015.

As it is mostly used since: convolutions are padded, so that the output is as large as the input,
and followed by batch norm.
"""

import torch
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    """Twice as large, half as many channels, joined with what the way down left at that size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
        self.conv = DoubleConv(channels, channels // 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], 1))


class UNet(nn.Module):
    """Logits of every pixel.  `width` is the channels at full size, `depth` how often it is halved.

    Images (N, channels, H, W), H and W divisible by 2^depth; logits (N, num_classes, H, W).
    """

    def __init__(
        self, channels: int = 1, num_classes: int = 2, width: int = 64, depth: int = 4
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = DoubleConv(channels, width)
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(DoubleConv(w, 2 * w) for w in widths[:-1])
        self.up = nn.ModuleList(Up(w) for w in reversed(widths[1:]))
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(self.pool(skips[-1])))
        x = skips.pop()
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)
