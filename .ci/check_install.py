"""`make build` runs this in a fresh environment that holds only the wheel and what it depends on."""

import math
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec

import torch

import revsolve

assert "site-packages" in revsolve.__file__, f"imported {revsolve.__file__}, not the wheel"
assert files("revsolve").joinpath("py.typed").is_file(), "type checkers look for py.typed"
for optional in ("scipy", "torchsde", "torchcde", "torchdeq"):
    assert find_spec(optional) is None, f"{optional} was installed with the wheel, which does not need it"

y0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
t = torch.tensor([0.0, 1.0], dtype=torch.float64)
y = revsolve.odeint(lambda t, y: -y, y0, t, method="rev_rk4", options={"step_size": 0.01})
y[-1].sum().backward()

# RK4's own error over a hundred steps of h = 0.01 is h^4 / 120 = 1e-10.
decay = math.exp(-1.0)
torch.testing.assert_close(y[-1].detach(), y0.detach() * decay, rtol=1e-9, atol=0)
torch.testing.assert_close(y0.grad, torch.full_like(y0, decay), rtol=1e-9, atol=0)

y0 = torch.ones(3, 2, requires_grad=True)
X = revsolve.LinearPath(torch.linspace(0.0, 1.0, 5)[:, None].expand(3, 5, 1))
solves = {
    "sdeint": revsolve.sdeint((lambda t, y: -y, lambda t, y: 0.1 * y), y0, [0.0, 1.0], dt=0.1),
    "cdeint": revsolve.cdeint(X, lambda t, z: -z[..., None], y0, X.interval, method="reversible_heun"),
    "fixed_point": revsolve.fixed_point(lambda z: 0.5 * torch.tanh(z) + y0, torch.zeros(3, 2)),
}
for name, value in solves.items():
    (grad,) = torch.autograd.grad(value.sum(), y0)
    assert grad.isfinite().all() and (grad != 0).all(), f"{name} has the gradient {grad}"

print(f"revsolve {version('revsolve')} works as installed in {files('revsolve')}")
