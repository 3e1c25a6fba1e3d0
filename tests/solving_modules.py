"""Modules whose forward solves, where other processes can import them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revsolve import odeint
from tests.front_doors import SIZE, make_net, make_y0


class Flow(nn.Module):
    """From an initial state to that at t = 1."""

    def __init__(self, method: Any, restarts: Any = "auto") -> None:
        super().__init__()
        self.net, self.method, self.restarts = make_net(), method, restarts

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def forward(self, y0: Tensor) -> Tensor:
        settings = {"options": {"step_size": 0.1}, "restarts": "auto" if self.restarts is None else self.restarts}
        return odeint(self.field, y0, (0.0, 1.0), method=self.method, **settings)[-1]


class Injected(nn.Module):
    """A contraction towards something that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.linear(z)) + x


def final_state(flow: Flow) -> list[list[float]]:
    return flow(make_y0()).tolist()
