"""`make build` runs this in a fresh environment that holds only the wheel and what it depends on."""

import math
from importlib.metadata import version
from importlib.resources import files

import torch

import revsolve

assert "site-packages" in revsolve.__file__, f"imported {revsolve.__file__}, not the wheel"
assert files("revsolve").joinpath("py.typed").is_file(), "type checkers look for py.typed"

y0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
t = torch.tensor([0.0, 1.0], dtype=torch.float64)
y = revsolve.odeint(lambda t, y: -y, y0, t, method="rev_rk4", options={"step_size": 0.01})
y[-1].sum().backward()

# RK4's own error over a hundred steps of h = 0.01 is h^4 / 120 = 1e-10.
decay = math.exp(-1.0)
torch.testing.assert_close(y[-1].detach(), y0.detach() * decay, rtol=1e-9, atol=0)
torch.testing.assert_close(y0.grad, torch.full_like(y0, decay), rtol=1e-9, atol=0)
print(f"revsolve {version('revsolve')} works as installed in {files('revsolve')}")
