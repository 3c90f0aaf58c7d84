# layers: pooling
import tritorch as torch

kernel_size = 2
inputs = (torch.randn(2, 3, 6, 5),)

torch.nn.MaxPool2d(kernel_size, stride=None, padding=0)
