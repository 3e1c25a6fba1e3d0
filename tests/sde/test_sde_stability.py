"""Restarts keep the reversible methods as accurate as the plain one where, without, they blow up."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import SDE, BrownianPath, sdeint

WITHIN = 2.0
FINER = 8


class Dissipative(nn.Module):
    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.drift = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
        self.diffusion = nn.Linear(4, 4)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(y) - 2 * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.4 * torch.sigmoid(self.diffusion(y))


def mean_reverting() -> SDE:
    return SDE(lambda t, y: -20 * (y - 1), lambda t, y: 0.5 * torch.ones_like(y))


# End time and step of each: rate times step is 1, and 0.2 with a net on top.
EQUATIONS = {
    "rate 20": (mean_reverting, 5.0, 0.05),
    "rate 20, finer": (mean_reverting, 5.0, 0.02),
    "net": (Dissipative, 50.0, 0.1),
}
CASES = [
    ("rate 20", "reversible_heun"),  # at rate * step = 1 the pairs' backward half is outside any step's stability
    *(("rate 20, finer", method) for method in ("reversible_heun", "rev_heun2", "rev_midpoint", "rev_rk4")),
    *(("net", method) for method in ("reversible_heun", "rev_heun2", "rev_midpoint", "rev_rk4")),
]


@functools.cache
def setting(name: str, dtype: torch.dtype, batch: int) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a solve, and plain Heun's answer with finer steps."""
    make, end, dt = EQUATIONS[name]
    num_fine = round(end / dt) * FINER
    knots = [end * n / num_fine for n in range(num_fine + 1)]
    bm = BrownianPath(0.0, end, (batch, 4), seed=5, dtype=dtype, grid=knots)
    sde = make()
    sde = sde.to(dtype) if isinstance(sde, nn.Module) else sde
    y0 = torch.linspace(-1.0, 1.0, 4 * batch, dtype=dtype).reshape(batch, 4)
    settings = {"sde": sde, "y0": y0, "ts": torch.linspace(0.0, end, 11, dtype=dtype), "bm": bm}
    with torch.no_grad():
        return {**settings, "dt": dt}, sdeint(**settings, dt=dt / FINER, method="heun2")


@torch.no_grad()
def error(name: str, dtype: torch.dtype, batch: int, **method: Any) -> float:
    """Root mean square error; infinite where the solve breaks down."""
    settings, exact = setting(name, dtype, batch)
    try:
        found = sdeint(**settings, **method)
    except RuntimeError:
        return math.inf
    size = float((found - exact).square().mean().sqrt())
    return size if math.isfinite(size) else math.inf


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "method"), CASES)
def test_error_is_within_twice_that_of_plain_heun(name: str, method: str, dtype: torch.dtype, batch: int) -> None:
    case = (name, dtype, batch)
    assert error(*case, method=method) <= WITHIN * error(*case, method="heun2")


@pytest.mark.parametrize("name", ["rate 20", "net"])
def test_without_restarts_it_is_not(name: str) -> None:
    case = (name, torch.float64, 32)
    assert error(*case, method="reversible_heun", restarts=None) > 1e6 * error(*case, method="heun2")


@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun2", "rev_midpoint", "rev_rk4"])
def test_restarts_are_few_where_nothing_decays(method: str) -> None:
    """At most one stored state in 5 steps, of 100, though what a single step leaves between y and z is random."""
    sde = SDE(lambda t, y: torch.sin(y), lambda t, y: 0.5 * torch.cos(y))
    y0 = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).reshape(16, 4)
    out = sdeint(sde, y0, [0.0, 2.0], dt=0.02, method=method, full_output=True)
    assert out.stats.num_restarts <= 20
