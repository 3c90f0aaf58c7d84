# layers: linear
import tritorch as torch

in_features, out_features = 4, 3
inputs = (torch.randn(5, in_features),)

torch.nn.Linear(in_features, out_features, bias=True)
