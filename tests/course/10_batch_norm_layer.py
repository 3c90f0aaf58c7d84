# layers: batch normalisation
import tritorch as torch

num_features = 3
inputs = (torch.randn(2, num_features, 6, 5),)

torch.nn.BatchNorm2d(num_features)
