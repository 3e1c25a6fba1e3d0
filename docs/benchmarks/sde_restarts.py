"""Strong errors of `reversible_heun` with its default restarts, over those of the best fixed interval and of no restarts.

    python docs/benchmarks/sde_restarts.py

Root mean square errors over 256 paths against plain Heun with eight times as many steps, in float64. The first three equations
are those of notebooks/02_neural_sde.ipynb, the fourth is like its network; the rate of decay times the step is up
to 1 in the last two. Without restarts the method is torchsde's.
"""

import math
from typing import Any

import torch
from contest import start, tiny
from torch import Tensor, nn

from revsolve import SDE, BrownianPath, sdeint

PATHS, FINER = (4, 2) if tiny() else (256, 8)
INTERVALS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, None)


class Network(nn.Module):
    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.size, self.decay = size, decay
        self.drift = nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, size)).double()
        self.diffusion = nn.Linear(size, size).double()

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(y) - self.decay * y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.4 * torch.sigmoid(self.diffusion(y))


def commuting(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return 0.5 * torch.stack((torch.stack((-b, a), -1), torch.stack((a, b), -1)), -2)


def not_commuting(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack((torch.stack((b, 0.5 * a), -1), torch.stack((0 * a, -0.5 * b), -1)), -2)


def additive(t: Tensor, y: Tensor) -> Tensor:
    return (torch.tensor([[1.2, 0.4], [-0.6, 1.0]], dtype=y.dtype) * (1 + 0.2 * t)).expand(*y.shape, 2)


# The equation, the size of its state, the end time and numbers of steps.
EQUATIONS: dict[str, tuple[Any, int, float, tuple[int, ...]]] = {
    "commutative noise": (SDE(lambda t, y: torch.sin(y) - y, commuting, "general"), 2, 1.0, (8, 16, 64)),
    "noise that does not commute": (SDE(lambda t, y: -0.2 * y, not_commuting, "general"), 2, 1.0, (8, 16, 64)),
    "additive noise": (SDE(lambda t, y: torch.sin(2 * y) - 0.2 * y.roll(1, -1), additive, "additive"), 2, 1.0, (8, 64)),
    "network": (Network(3, 1.0), 3, 1.0, (10, 20, 100)),
    "mean-reverting, rate 20": (
        SDE(lambda t, y: -20 * (y - 1), lambda t, y: 0.5 + 0 * y),
        4,
        5.0,
        (100, 125, 250, 500),
    ),
    "network that decays": (Network(4, 2.0), 4, 50.0, (400, 1000)),
}


@torch.no_grad()
def row(name: str, num_steps: int) -> str:
    sde, size, end, _ = EQUATIONS[name]
    knots = [end * n / (num_steps * FINER) for n in range(num_steps * FINER + 1)]
    bm = BrownianPath(0.0, end, (PATHS, size), seed=5, dtype=torch.float64, grid=knots)
    y0 = torch.linspace(-1.0, 1.0, size * PATHS, dtype=torch.float64).reshape(PATHS, size)
    settings: dict[str, Any] = {"sde": sde, "y0": y0, "ts": torch.linspace(0.0, end, 3, dtype=torch.float64), "bm": bm}
    exact = sdeint(**settings, dt=end / num_steps / FINER, method="heun2")

    def error(restarts: Any) -> tuple[float, int]:
        try:
            found = sdeint(
                **settings, dt=end / num_steps, method="reversible_heun", restarts=restarts, full_output=True
            )
        except RuntimeError:  # the solution has grown beyond all numbers
            return math.inf, 0
        return float((found.ys - exact).square().mean().sqrt()), found.stats.num_restarts

    errors = {interval: error(interval)[0] for interval in INTERVALS}
    best = min(errors, key=lambda interval: errors[interval])
    own, num_restarts = error("auto")
    ratios = f"{own / errors[best]:.2f} ({best}) | {own / errors[None]:.2g} | {num_steps / (num_restarts + 1):.1f}"
    return f"| {name} | {num_steps} | {ratios} |"


def main() -> None:
    start()
    print(
        "| equation | steps | over the best interval (which) | over no restarts | steps of a segment |\n|---|---|---|---|---|"
    )
    for name, (*_, counts) in EQUATIONS.items():
        for num_steps in counts[:1] if tiny() else counts:
            print(row(name, num_steps), flush=True)


if __name__ == "__main__":
    main()
