"""Classical problems, with reference solutions from a method of order 8 at tolerances that rounding hardly allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
NUM_OUTPUTS = 11


@dataclass(frozen=True)
class Classical:
    """y' = field(t, y) from y0 at t = 0 to `end`, in `num_steps` steps with which classical methods do well."""

    name: str
    field: Field
    y0: tuple[float, ...]
    end: float
    num_steps: int

    @property
    def step(self) -> float:
        return self.end / self.num_steps

    def times(self) -> Tensor:
        return torch.linspace(0, self.end, NUM_OUTPUTS, dtype=torch.float64)

    def start(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.y0, dtype=dtype)

    def reference(self) -> Tensor:
        """The states at `times()`, (NUM_OUTPUTS, len(y0)), in float64."""
        return _reference(self)


@cache
def _reference(problem: Classical) -> Tensor:
    def field(t: float, y: np.ndarray) -> np.ndarray:
        return problem.field(torch.tensor(t, dtype=torch.float64), torch.from_numpy(y)).numpy()

    times = problem.times().numpy()
    solved = solve_ivp(field, times[[0, -1]], problem.y0, "DOP853", times, rtol=1e-12, atol=1e-13)
    return torch.from_numpy(solved.y.T.copy())


def decay(rate: float) -> Field:
    return lambda t, y: -rate * y


def van_der_pol(mu: float) -> Field:
    return lambda t, y: torch.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def lorenz(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]])


NUM_CELLS = 50


def heat(t: Tensor, y: Tensor) -> Tensor:
    """The heat equation on (0, 1) with zero ends, on NUM_CELLS inner points."""
    padded = torch.nn.functional.pad(y, (1, 1))
    return (padded[2:] - 2 * padded[1:-1] + padded[:-2]) * (NUM_CELLS + 1) ** 2


def heat_start() -> tuple[float, ...]:
    x = [math.pi * i / (NUM_CELLS + 1) for i in range(1, NUM_CELLS + 1)]
    return tuple(math.sin(s) + 0.3 * math.sin(5 * s) for s in x)


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[0] * (1.5 - y[1]), y[1] * (y[0] - 1)])


def kepler(t: Tensor, y: Tensor) -> Tensor:
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return torch.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])


def kepler_start(eccentricity: float) -> tuple[float, ...]:
    """At the point nearest to the centre."""
    return (1 - eccentricity, 0.0, 0.0, math.sqrt((1 + eccentricity) / (1 - eccentricity)))


def oscillator(damping: float) -> Field:
    return lambda t, y: torch.stack([y[1], -y[0] - damping * y[1]])


def logistic(t: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -torch.sin(y[0]) - 0.1 * y[1]])


def duffing(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], y[0] - y[0] ** 3 - 0.3 * y[1] + 0.5 * torch.cos(1.2 * t)])


def brusselator(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([1 + y[0] ** 2 * y[1] - 4 * y[0], 3 * y[0] - y[0] ** 2 * y[1]])


def fitzhugh_nagumo(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([3 * (y[0] - y[0] ** 3 / 3 + y[1]), -(y[0] - 0.2 + 0.2 * y[1]) / 3])


def forced_relaxation(t: Tensor, y: Tensor) -> Tensor:
    return -5 * (y - torch.cos(t))


def roessler(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-y[1] - y[2], y[0] + 0.2 * y[1], 0.2 + y[2] * (y[0] - 5.7)])


def rigid_body(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]])


def epidemic(t: Tensor, y: Tensor) -> Tensor:
    infected, recovered = 1.5 * y[0] * y[1], 0.5 * y[1]
    return torch.stack([-infected, infected - recovered, recovered])


def growth(t: Tensor, y: Tensor) -> Tensor:
    return y


def tanh_network() -> Field:
    generator = torch.Generator().manual_seed(1)
    inner = torch.randn(16, 4, dtype=torch.float64, generator=generator)
    outer = torch.randn(4, 16, dtype=torch.float64, generator=generator) / 4
    return lambda t, y: torch.tanh(y @ inner.to(y).T) @ outer.to(y).T - y


CLASSICAL = {
    problem.name: problem
    for problem in (
        Classical("decay1", decay(1), (1.0, 0.5), 20, 400),
        Classical("decay10", decay(10), (1.0, 0.5), 3, 300),
        Classical("decay20", decay(20), (1.0, 0.5), 5, 200),
        Classical("van_der_pol2", van_der_pol(2), (2.0, 0.0), 20, 400),
        Classical("van_der_pol5", van_der_pol(5), (2.0, 0.0), 20, 2000),
        Classical("lorenz", lorenz, (1.0, 1.0, 1.0), 5, 500),
        Classical("heat", heat, heat_start(), 0.1, 600),
        Classical("lotka_volterra", lotka_volterra, (1.0, 0.5), 20, 400),
        *(Classical(f"kepler{e}", kepler, kepler_start(e), 20, n) for e, n in ((0, 1000), (0.3, 1000), (0.5, 1000))),
        Classical("kepler0.7", kepler, kepler_start(0.7), 20, 2000),
        Classical("oscillator", oscillator(0), (1.0, 0.0), 20, 400),
        Classical("damped_oscillator", oscillator(0.5), (1.0, 0.0), 20, 400),
        Classical("logistic", logistic, (0.1,), 20, 400),
        Classical("pendulum", pendulum, (2.0, 0.0), 20, 400),
        Classical("duffing", duffing, (1.0, 0.0), 20, 400),
        Classical("brusselator", brusselator, (1.5, 3.0), 20, 800),
        Classical("fitzhugh_nagumo", fitzhugh_nagumo, (-1.0, 1.0), 20, 400),
        Classical("forced_relaxation", forced_relaxation, (0.0,), 20, 400),
        Classical("roessler", roessler, (1.0, 1.0, 0.0), 20, 800),
        Classical("rigid_body", rigid_body, (0.0, 1.0, 1.0), 20, 400),
        Classical("epidemic", epidemic, (0.99, 0.01, 0.0), 40, 400),
        Classical("growth", growth, (0.01,), 5, 100),
        Classical("tanh_network", tanh_network(), (0.5, -0.5, 0.3, 1.0), 20, 400),
    )
}
