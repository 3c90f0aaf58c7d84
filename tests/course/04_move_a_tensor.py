# to() moves a tensor to the GPU where there is one
import tritorch as torch

x = torch.tensor([1.0, 2.0])

if torch.cuda.is_available():
    x = x.to("cuda")
