# containers: a list of modules
import tritorch as torch

torch.nn.ModuleList(modules=None)
