# a tensor can be made on the GPU in the first place
import tritorch as torch

if torch.cuda.is_available():
    x = torch.tensor([1.0, 2.0], device="cuda")
