"""SDEs that the tests share: one neural SDE for every noise type, and equations whose solutions are known."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revsolve import SDE

DIM = 3
CHANNELS = {"diagonal": DIM, "scalar": 1, "additive": 2, "general": 2}


class NeuralSDE(nn.Module):
    """Drift, diffusion and prior drift depend on time, the state and parameters; `scale` is a closed-over tensor."""

    def __init__(self, noise_type: str, sde_type: str = "stratonovich", scale: Tensor | float = 0.3) -> None:
        super().__init__()
        self.noise_type, self.sde_type, self.scale = noise_type, sde_type, scale
        self.drift = nn.Linear(DIM, DIM)
        self.mixing = nn.Linear(DIM, DIM if noise_type == "diagonal" else DIM * CHANNELS[noise_type])

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.drift(y)) * torch.cos(t) - y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise_type == "diagonal":
            return self.scale * (1.5 + torch.sin(self.mixing.bias * y + t))
        if self.noise_type == "additive":
            matrix = self.mixing.weight[:, 0].reshape(DIM, 2)
            return self.scale * (matrix * torch.cos(t)).expand(*y.shape, 2)
        return self.scale * torch.sin(self.mixing(y) + t).reshape(*y.shape, CHANNELS[self.noise_type])

    def h(self, t: Tensor, y: Tensor) -> Tensor:
        return -0.5 * y


def noise_size(noise_type: str, batch: int) -> tuple[int, int]:
    return batch, CHANNELS[noise_type]


@dataclass(frozen=True)
class Solved:
    """An SDE with its solution at time 1 as a function of y0 and W(1); None where only a fine reference is at hand."""

    sde: SDE
    dim: int
    channels: int
    solution: Callable[[Tensor, Tensor], Tensor] | None = None


def _linear_general(t: Tensor, y: Tensor) -> Tensor:
    """Two linear fields whose matrices do not commute: (..., 2, 2)."""
    a, b = y[..., 0], y[..., 1]
    return torch.stack((torch.stack((b, 0.5 * a), -1), torch.stack((0.0 * a, -0.5 * b), -1)), -2)


def _commuting(t: Tensor, y: Tensor) -> Tensor:
    """A rotation and a dilation, which commute: (..., 2, 2)."""
    a, b = y[..., 0], y[..., 1]
    return 0.5 * torch.stack((torch.stack((-b, a), -1), torch.stack((a, b), -1)), -2)


PROBLEMS = {
    # dy = y dt / 10 + y o dW / 2, so y(1) = y0 exp(1/10 + W(1)/2).
    "geometric": Solved(
        SDE(lambda t, y: 0.1 * y, lambda t, y: 0.5 * y), 1, 1, lambda y0, W: y0 * torch.exp(0.1 + 0.5 * W)
    ),
    "commutative": Solved(SDE(lambda t, y: torch.sin(y) - y, _commuting, "general"), 2, 2),
    "non-commutative": Solved(SDE(lambda t, y: -0.2 * y, _linear_general, "general"), 2, 2),
    # dy = sqrt(1 + y^2) (0.3 dt + 0.4 o dW), so y(1) = sinh(arcsinh y0 + 0.3 + 0.4 W(1)).
    "hyperbolic": Solved(
        SDE(lambda t, y: 0.3 * (1 + y.square()).sqrt(), lambda t, y: 0.4 * (1 + y.square()).sqrt()),
        1,
        1,
        lambda y0, W: torch.sinh(torch.asinh(y0) + 0.3 + 0.4 * W),
    ),
    # Noise large enough for its share of the error, of order 3/2, to show beside that of the drift, of order 2.
    "additive": Solved(
        SDE(
            lambda t, y: torch.sin(2 * y) - 0.2 * y.roll(1, -1),
            lambda t, y: (torch.tensor([[1.2, 0.4], [-0.6, 1.0]]).to(y) * (1 + 0.2 * t)).expand(*y.shape, 2),
            "additive",
        ),
        2,
        2,
    ),
}
