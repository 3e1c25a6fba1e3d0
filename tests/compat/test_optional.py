"""Packages whose objects are taken, but which need not be installed."""

import subprocess
import sys

OPTIONAL = ("scipy", "torchsde", "torchcde", "torchdeq", "torchdiffeq")
PROGRAM = f"""
import sys

sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one of these raises

import torch
import revsolve


class Brownian:
    shape, dtype, device, levy_area_approximation = (2, 3), torch.float32, "cpu", "none"

    def __call__(self, ta, tb):
        return torch.full((2, 3), tb - ta)


class Line:
    interval = (0.0, 1.0)

    def evaluate(self, t):
        return t.reshape(1).expand(2, 1)

    def derivative(self, t):
        return torch.ones(2, 1)


y0 = torch.ones(2, 3)
ys = revsolve.sdeint((lambda t, y: 0 * y, lambda t, y: torch.ones_like(y)), y0, [0.0, 1.0], dt=0.1, bm=Brownian())
torch.testing.assert_close(ys[-1], y0 + 1)
foreign = revsolve.cdeint(Line(), lambda t, z: -z[..., None], y0, [0.0, 1.0], method="rev_rk4", options={{"step_size": 0.1}})
x = torch.linspace(0, 1, 3)[:, None].expand(2, 3, 1)
for path in (revsolve.LinearPath, revsolve.HermitePath, revsolve.NaturalCubicPath):
    own = revsolve.cdeint(path(x), lambda t, z: -z[..., None], y0, [0.0, 2.0], method="rev_rk4")
    torch.testing.assert_close(own, foreign, rtol=1e-3, atol=1e-3)
"""


def test_nothing_needs_the_packages_whose_objects_are_taken() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=300)
