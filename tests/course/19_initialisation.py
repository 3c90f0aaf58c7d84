# initialisation of parameters
import tritorch as torch
import tritorch.nn.init as init

tensor = torch.empty(3, 5)

init.uniform_(tensor, a=0.0, b=1.0)

init.normal_(tensor, mean=0.0, std=1.0)
