# layers: convolution
import tritorch as torch

in_channels, out_channels, kernel_size = 3, 4, 3
inputs = (torch.randn(2, in_channels, 6, 5),)

torch.nn.Conv2d(in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True)
