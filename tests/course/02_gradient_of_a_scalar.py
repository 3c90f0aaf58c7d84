# backward() fills in .grad, the derivative of the sum by every element
import tritorch as torch

x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

y = 3 * x**2

z = y.sum()

z.backward()

print(x.grad)
