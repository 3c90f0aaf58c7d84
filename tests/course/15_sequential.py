# containers: one module after another
import tritorch as torch

args = [torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)]
inputs = (torch.randn(5, 4),)

torch.nn.Sequential(*args)
