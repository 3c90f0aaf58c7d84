# containers: modules by name
import tritorch as torch

torch.nn.ModuleDict(modules=None)
