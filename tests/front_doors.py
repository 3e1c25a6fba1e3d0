"""The four front doors, each solving something with the same kind of field: a module that maps (batch, 3) to (batch, 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revsolve import fixed_point, odeint, sdeint
from revsolve.cde import cdeint
from revsolve.paths.control import LinearPath

SIZE, BATCH = 3, 4
Field = Callable[[Tensor], Tensor]


def through_odeint(field: Field, y0: Tensor, **settings: Any) -> Tensor:
    t = torch.linspace(0.0, 1.0, 3)
    settings = {"method": "rev_rk4", "options": {"step_size": 0.1}, **settings}
    return odeint(lambda t, y: field(y), y0, t, **settings)


def through_sdeint(field: Field, y0: Tensor, noise: float = 0.3, **settings: Any) -> Tensor:
    t = torch.linspace(0.0, 1.0, 3)
    return sdeint((lambda t, y: field(y), lambda t, y: noise * (1 + 0.3 * y)), y0, t, **{"dt": 0.1, **settings})


def through_cdeint(field: Field, y0: Tensor, **settings: Any) -> Tensor:
    t = torch.linspace(0.0, 1.0, 11)
    data = torch.stack([t, torch.sin(3 * t)], -1).to(y0)
    path = LinearPath(data.expand(len(y0), *data.shape), t.to(y0))
    slopes = torch.tensor([1.0, -0.5], dtype=y0.dtype, device=y0.device)
    settings = {"method": "rev_heun_euler", "options": {"step_size": 0.1}, **settings}
    out = cdeint(path, lambda t, z: field(z).unsqueeze(-1) * slopes, y0, [0.0, 0.5, 1.0], **settings)
    return out.movedim(-2, 0) if isinstance(out, Tensor) else out  # times first, as the others have them


class Products:
    """A field of a CDE that gives its products with slopes of the path, in an object that is no callable."""

    def __init__(self, field: Field) -> None:
        self.field = field

    def prod(self, t: Tensor, z: Tensor, dx: Tensor) -> Tensor:
        return self.field(z) * (dx[..., :1] - 0.5 * dx[..., 1:])


def through_products(field: Field, y0: Tensor, **settings: Any) -> Tensor:
    t = torch.linspace(0.0, 1.0, 11)
    data = torch.stack([t, torch.sin(3 * t)], -1).to(y0)
    settings = {"method": "rev_heun_euler", "options": {"step_size": 0.1}, **settings}
    path = LinearPath(data.expand(len(y0), *data.shape), t.to(y0))
    return cdeint(path, Products(field), y0, t[[0, 10]], **settings)


def in_pieces(field: Field, y0: Tensor, **settings: Any) -> Tensor:
    """A method that evaluates drift and diffusion where it needs them alone."""
    return through_sdeint(field, y0, method="rev_slowrk", **settings)


def through_fixed_point(field: Field, y0: Tensor, **settings: Any) -> Tensor:
    settings = {"beta": 0.5, "tol": 0.0, "max_steps": 5, **settings}
    return fixed_point(lambda z: 0.5 * torch.tanh(field(z)) + 0.1, y0, **settings)


DOORS = {
    "odeint": through_odeint,
    "sdeint": through_sdeint,
    "cdeint": through_cdeint,
    "fixed_point": through_fixed_point,
}

EVALUATED_LATER = {"cdeint of products": through_products, "sdeint in pieces": in_pieces}


class Net(nn.Module):
    """A field with parameters, and whatever module in its middle."""

    def __init__(self, *middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(SIZE, width), nn.Sequential(*middle), nn.Linear(width, SIZE)

    def forward(self, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(y))))


def make_net(*middle: Callable[[], nn.Module], device: torch.device | str = "cpu") -> Net:
    torch.manual_seed(0)
    return Net(*(make() for make in middle)).double().to(device)


def make_y0(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    numbers = torch.linspace(-1.0, 1.0, SIZE * BATCH, dtype=dtype).view(BATCH, SIZE)
    return numbers.to(device).requires_grad_()


def gradients(door: Callable[..., Any], field: nn.Module, y0: Tensor, **settings: Any) -> list[Tensor]:
    """Of a nonlinear function of all outputs, with respect to the initial state and all parameters of the field."""
    torch.manual_seed(1)  # noise of the equation, and of the field
    loss = door(field, y0, **settings).square().sum()
    return list(torch.autograd.grad(loss, [y0, *(p for p in field.parameters() if p.requires_grad)]))


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The relative difference of all together: some may be zero but for rounding, a bias before a normalisation say."""
    a, b = (torch.cat([x.detach().reshape(-1) for x in tensors]) for tensors in (found, wanted))
    return float((a - b).norm() / b.norm())
