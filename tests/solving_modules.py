"""Modules whose forward solves, where other processes can import them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revsolve import BrownianPath, LinearPath, cdeint, fixed_point, odeint, sdeint
from tests.front_doors import BATCH, SIZE, make_net, make_y0

Device = torch.device | str


class Flow(nn.Module):
    """From an initial state to that at t = 1."""

    def __init__(self, method: Any = "rev_rk4", restarts: Any = 4, device: Device = "cpu") -> None:
        super().__init__()
        self.net, self.method, self.restarts = make_net(device=device), method, restarts

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def forward(self, y0: Tensor) -> Tensor:
        settings = {"options": {"step_size": 0.1}, "restarts": "auto" if self.restarts is None else self.restarts}
        return odeint(self.field, y0, (0.0, 1.0), method=self.method, **settings)[-1]


class Diffusion(nn.Module):
    """The same with noise, along a path of its own."""

    def __init__(self, device: Device = "cpu") -> None:
        super().__init__()
        self.net = make_net(device=device)
        shape = {"size": (BATCH, SIZE), "dtype": torch.float64, "device": device}
        self.path = BrownianPath(0.0, 1.0, seed=0, dt=0.1, **shape)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * torch.cos(y)

    def forward(self, y0: Tensor) -> Tensor:
        return sdeint((self.f, self.g), y0, (0.0, 1.0), bm=self.path, dt=0.1, restarts=4)[-1]


class Controlled(nn.Module):
    """Along a path made of data."""

    def __init__(self, device: Device = "cpu") -> None:
        super().__init__()
        self.net = make_net(device=device)
        y = make_y0(device=device).detach()
        self.path = LinearPath(torch.stack([y, 2 * y, y], dim=1))

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([self.net(z), z, torch.cos(z)], dim=-1)

    def forward(self, z0: Tensor) -> Tensor:
        settings = {"method": "rev_rk4", "options": {"step_size": 0.25}, "restarts": 4}
        return cdeint(self.path, self.field, z0, (0.0, 2.0), **settings)[..., -1, :]


class Equilibrium(nn.Module):
    """The fixed point that belongs to an input."""

    def __init__(self, device: Device = "cpu") -> None:
        super().__init__()
        self.net = make_net(device=device)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.net(z)) + x

    def forward(self, x: Tensor) -> Tensor:
        return fixed_point(self.f, torch.zeros_like(x), args=x, tol=0.0, max_steps=5, beta=0.5)


MODULES: dict[str, type[nn.Module]] = {
    "odeint": Flow,
    "sdeint": Diffusion,
    "cdeint": Controlled,
    "fixed_point": Equilibrium,
}


class Injected(nn.Module):
    """A contraction towards something that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.linear(z)) + x


def final_state(module: nn.Module) -> list[list[float]]:
    return module(make_y0()).tolist()
