# losses: binary cross entropy
import tritorch as torch

inputs = torch.rand(5, 4), torch.rand(5, 4)

torch.nn.BCELoss()
