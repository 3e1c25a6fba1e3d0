"""Controlled equations that depend on something in every way they can, and the gradients of their solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchcde
from torch import Tensor, nn

from revsolve.cde import cdeint
from revsolve.paths.control import HermitePath, LinearPath, NaturalCubicPath
from revsolve.paths.log_ode import LogODEField
from revsolve.paths.logsignature import LogSignaturePath
from tests.equations import loss_of

BATCH, LENGTH, CHANNELS, HIDDEN = 2, 7, 3, 4
KNOTS = torch.tensor([0.0, 0.7, 1.0, 1.6, 2.5, 2.6, 3.5], dtype=torch.float64)
WINDOWS = KNOTS[[0, 2, 4, 6]]
FORWARD = (0.0, 0.9, 2.5 - 0.125, 3.5)
BACKWARD = (3.5, 2.0, 1.2, 0.0)


class MatrixField(nn.Module):
    """A matrix of tanh of a linear map, which depends on the time as well."""

    def __init__(self, channels: int = CHANNELS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.map = nn.Linear(hidden, hidden * channels).double()
        self.channels = channels

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.map(z) + torch.cos(t)).view(*z.shape, self.channels)


class ProductField(MatrixField):
    """The same, but as a product with dX only."""

    def prod(self, t: Tensor, z: Tensor, dx: Tensor) -> Tensor:
        return torch.einsum("...hc,...c->...h", self.forward(t, z), dx)

    __call__ = None  # type: ignore[assignment]


class Wave:
    """A smooth path that is known in closed form, without knots: (t, a sin t, b cos 2t)."""

    def __init__(self, amplitudes: Tensor) -> None:
        self.amplitudes, self.interval = amplitudes, KNOTS[[0, -1]]

    def evaluate(self, t: Tensor) -> Tensor:
        return torch.stack([t, torch.sin(t), torch.cos(2 * t)]) * self.amplitudes

    def derivative(self, t: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(t), torch.cos(t), -2 * torch.sin(2 * t)]) * self.amplitudes


def gappy(x: Tensor) -> Tensor:
    """The data with a quarter of the values missing."""
    holes = torch.arange(x.numel()).view(x.shape) % 4 == 1
    return torch.where(holes, torch.nan, x)


CONTROLS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda x: LinearPath(x, KNOTS),
    "linear with gaps": lambda x: LinearPath(gappy(x), KNOTS, lengths=[7, 5]),
    "rectilinear": lambda x: LinearPath(x, torch.linspace(0, 3.5, 13, dtype=x.dtype), rectilinear=0),
    "hermite": lambda x: HermitePath(x, KNOTS),
    "hermite with gaps": lambda x: HermitePath(gappy(x), KNOTS, lengths=[7, 5]),
    "natural": lambda x: NaturalCubicPath(x, KNOTS),
    "torchcde linear": lambda x: torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x, KNOTS), KNOTS),
    "torchcde cubic": lambda x: torchcde.CubicSpline(
        torchcde.hermite_cubic_coefficients_with_backward_differences(x, KNOTS), KNOTS
    ),
    "no knots": lambda x: Wave(x[:, 0]),
}
FORMS = ("derivative", "increment")


def data() -> Tensor:
    return torch.randn(BATCH, LENGTH, CHANNELS, dtype=torch.float64).requires_grad_()


def gradients(control: Callable[[Tensor], Any], times: tuple[float, ...], **solve: Any) -> dict[str, Tensor]:
    """The gradient of a loss with respect to the data, the initial state, the parameters and the times."""
    torch.manual_seed(0)
    x, z0, func = data(), torch.randn(BATCH, HIDDEN, dtype=torch.float64).requires_grad_(), MatrixField()
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    zs = cdeint(control(x), func, z0, t if solve.pop("moving", False) else t.detach(), **solve)
    return gradients_of(zs, {"x": x, "z0": z0, "t": t, **dict(func.named_parameters())})


def gradients_of(zs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss_of(zs), list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def log_ode(
    depth: int, x: Tensor, func: Callable[..., Tensor], t: Tensor = KNOTS, windows: Tensor = WINDOWS
) -> tuple[LogSignaturePath, LogODEField]:
    """Path and field of the log-ODE method."""
    return LogSignaturePath(x, depth, windows, t), LogODEField(func, depth)


def random_walk(length: int, channels: int, batch: int = 16) -> Tensor:
    """Brownian motion on [0, 1], seen at `length` times."""
    steps = torch.randn(batch, length - 1, channels, dtype=torch.float64) / math.sqrt(length - 1)
    return torch.cat([torch.zeros(batch, 1, channels, dtype=torch.float64), steps.cumsum(1)], 1)
