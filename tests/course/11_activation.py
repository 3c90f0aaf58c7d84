# layers: activation
import tritorch as torch

inputs = (torch.randn(5, 4),)

torch.nn.ReLU(inplace=False)
