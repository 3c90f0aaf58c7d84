# backward() of more than one number takes one weight for each
import tritorch as torch

x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
out = 3 * x**2

out.backward(torch.tensor([0.1, 1.0, 1.0], dtype=float))
