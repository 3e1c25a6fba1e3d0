"""Problems held out: no constant of the default restarts was chosen on them, but the length of the first segment (on enzyme)."""

import math

import torch
from torch import Tensor

from tests.problems import Classical, Field


def henon_heiles(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[2], y[3], -y[0] - 2 * y[0] * y[1], -y[1] - y[0] ** 2 + y[1] ** 2])


def lorenz96(t: Tensor, y: Tensor) -> Tensor:
    return (y.roll(-1) - y.roll(2)) * y.roll(1) - y + 8


def pendulum_chain(t: Tensor, y: Tensor) -> Tensor:
    """Five pendulums, springs between neighbours, a little friction."""
    angle, speed = y[:5], y[5:]
    padded = torch.cat([angle[:1], angle, angle[-1:]])
    return torch.cat([speed, 3 * (padded[2:] - 2 * angle + padded[:-2]) - torch.sin(angle) - 0.05 * speed])


def stiff_linear(t: Tensor, y: Tensor) -> Tensor:
    """Not normal: rates of 1, 10 and 40, each mode driven by the slower ones."""
    return torch.stack([-y[0], 20 * y[0] - 10 * y[1], 30 * y[0] + 30 * y[1] - 40 * y[2]])


def network(gain: float, size: int = 8, width: int = 32) -> Field:
    generator = torch.Generator().manual_seed(11)
    inner = torch.randn(width, size, dtype=torch.float64, generator=generator) * gain / math.sqrt(size)
    outer = torch.randn(size, width, dtype=torch.float64, generator=generator) * gain / math.sqrt(width)
    return lambda t, y: torch.tanh(y @ inner.to(y).T) @ outer.to(y).T


def mixed_scales(t: Tensor, y: Tensor) -> Tensor:
    """A slow oscillator of size 1e6 that drives a damped one of size 1."""
    return torch.stack([y[1], -y[0], y[3], -9 * y[2] - 3 * y[3] + 1e-6 * y[0]])


def damping_ends(t: Tensor, y: Tensor) -> Tensor:
    """Decay to a forced motion, and undamped oscillation from t = 5 on."""
    return torch.stack([y[1], -9 * y[0] - 8 * (1 - torch.tanh(4 * (t - 5))) * y[1] + torch.cos(2 * t)])


def kink(t: Tensor, y: Tensor) -> Tensor:
    """An oscillator that is nine times as stiff on one side."""
    return torch.stack([y[1], -y[0] - 8 * torch.relu(y[0]) - 0.1 * y[1]])


def enzyme(t: Tensor, y: Tensor) -> Tensor:
    """Michaelis-Menten kinetics: enzyme, substrate, complex, product."""
    bound, released, made = 10 * y[0] * y[1], y[2], 2 * y[2]
    return torch.stack([released + made - bound, released - bound, bound - released - made, made])


def hindmarsh_rose(t: Tensor, y: Tensor) -> Tensor:
    fast = y[1] - y[0] ** 3 + 3 * y[0] ** 2 - y[2] + 2
    return torch.stack([fast, 1 - 5 * y[0] ** 2 - y[1], 0.006 * (4 * (y[0] + 1.6) - y[2])])


def kuramoto(t: Tensor, y: Tensor) -> Tensor:
    """Six phases, which grow without bound."""
    rate = torch.linspace(0.5, 2, 6, dtype=y.dtype)
    return rate + torch.sin(y[None] - y[:, None]).mean(1)


def thomas(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y.roll(-1)) - 0.2 * y


def chua(t: Tensor, y: Tensor) -> Tensor:
    """With the piecewise linear diode."""
    diode = -0.7 * y[0] - 0.2 * ((y[0] + 1).abs() - (y[0] - 1).abs())
    return torch.stack([9 * (y[1] - y[0] - diode), y[0] - y[1] + y[2], -14 * y[1]])


def rosenbrock_flow(t: Tensor, y: Tensor) -> Tensor:
    """Down the gradient into a curved valley: fast at first, then along it."""
    slope = 20 * (y[1] - y[0] ** 2)
    return torch.stack([1 - y[0] + 2 * y[0] * slope, -slope])


def autocatalator(t: Tensor, y: Tensor) -> Tensor:
    made = y[0] * (0.1 + y[1] ** 2)
    return torch.stack([0.6 - made, (made - y[1]) / 0.2])


def double_well(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], y[0] - y[0] ** 3 - 4 * y[1]])


def swept(t: Tensor, y: Tensor) -> Tensor:
    """Relaxation to a moving target at a rate that swells and fades."""
    rate = 12 * torch.sin(t) ** 2
    return torch.stack([rate * (torch.cos(t) - y[0]), 3 * (y[0] - y[1])])


HELD_OUT = {
    problem.name: problem
    for problem in (
        Classical("henon_heiles", henon_heiles, (0.0, 0.1, 0.45, 0.05), 20, 400),
        Classical("lorenz96", lorenz96, (8.0, 8.5, 8.0, 7.0, 8.0, 8.0, 9.0, 8.0), 3, 400),
        Classical("pendulum_chain", pendulum_chain, (2.0, 0.5, 0.0, -1.0, 0.3, *[0.0] * 5), 20, 400),
        Classical("stiff_linear", stiff_linear, (1.0, 1.0, 1.0), 2, 400),
        Classical("network1", network(1), (0.5, -0.5, 0.3, 1.0, -1.0, 0.2, 0.8, -0.1), 10, 400),
        Classical("network4", network(4), (0.5, -0.5, 0.3, 1.0, -1.0, 0.2, 0.8, -0.1), 2, 400),
        Classical("mixed_scales", mixed_scales, (1e6, 0.0, 1.0, 0.0), 20, 400),
        Classical("damping_ends", damping_ends, (1.0, 0.0), 20, 400),
        Classical("kink", kink, (1.0, 0.0), 20, 400),
        Classical("enzyme", enzyme, (1.0, 2.0, 0.1, 0.1), 5, 400),
        Classical("hindmarsh_rose", hindmarsh_rose, (-1.0, -3.0, 1.5), 20, 400),
        Classical("kuramoto", kuramoto, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), 20, 400),
        # picked after enzyme had made the first segment shorter
        Classical("thomas", thomas, (1.0, 0.5, -0.3), 20, 400),
        Classical("chua", chua, (0.7, 0.0, 0.0), 8, 400),
        Classical("rosenbrock_flow", rosenbrock_flow, (-0.8, 1.0), 5, 400),
        Classical("autocatalator", autocatalator, (1.0, 0.5), 20, 400),
        Classical("double_well", double_well, (0.1, 2.0), 10, 400),
        Classical("swept", swept, (2.0, 0.0), 10, 400),
    )
}
