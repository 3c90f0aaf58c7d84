# a model and its data have to be on the same device
import tritorch as torch

model = torch.nn.Linear(10, 1)

data = torch.randn(100, 10)

if torch.cuda.is_available():
    model = model.to("cuda")
    data = data.to("cuda")

inputs = (data,)
model
