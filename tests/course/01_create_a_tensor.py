# a tensor whose history is recorded
import tritorch as torch

x = torch.ones(2, 2, requires_grad=True)
