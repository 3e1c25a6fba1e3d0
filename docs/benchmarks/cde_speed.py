"""Speed of `cdeint` and of paths from data with gaps against torchcde: `python docs/benchmarks/cde_speed.py`.

A training gradient of a neural CDE (batch 64, 100 knots, 4 channels, hidden 32, field 32-64-128, float32, one thread), in
milliseconds of processor time: the median over rounds in which all contenders take turns. torchcde runs its adjoint with rk4 from
knot to knot. "Bare field" is the evaluations alone, and their vector-Jacobian products: once with and once without a graph for
each evaluation of the scheme. "Compiled" is compile=True, once the programs are there.
"""

from collections.abc import Callable
from functools import partial

import torch
import torchcde
from contest import milliseconds, start, tiny
from torch import Tensor, nn

from revsolve import HermitePath, LinearPath, NaturalCubicPath, cdeint

BATCH, LENGTH, CHANNELS, HIDDEN, WIDTH = (2, 5, 2, 3, 4) if tiny() else (64, 100, 4, 32, 64)
ROUNDS = 15
PROGRAMS = {"backend": "eager"} if tiny() else True


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, HIDDEN * CHANNELS), nn.Tanh())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layers(z).view(*z.shape, CHANNELS)


def gradient(solve: Callable[..., Tensor], X: object, func: Field, z0: Tensor) -> None:
    t = torch.tensor([0.0, LENGTH - 1.0])
    solve(X, func, z0.detach().requires_grad_(), t)[:, -1].square().mean().backward()


def bare_field(evaluations: int, func: Field, z0: Tensor, dX: Tensor) -> None:
    """Evaluations in chains of four, as the stages of rk4 are."""
    parameters = list(func.parameters())

    def chain(z: Tensor, length: int) -> Tensor:
        for _ in range(length):
            z = z + torch.bmm(func(0.0, z), dX).squeeze(-1)
        return z

    length = min(4, evaluations)
    for _ in range((LENGTH - 1) * evaluations // length):
        with torch.no_grad():
            chain(z0, length)
        leaf = z0.detach().requires_grad_()
        torch.autograd.grad(chain(leaf, length), (leaf, *parameters), z0)


def training_gradients() -> dict[str, float]:
    x, z0, func = torch.randn(BATCH, LENGTH, CHANNELS).cumsum(1) / 10, torch.randn(BATCH, HIDDEN), Field()
    linear = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
    cubic = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x))
    theirs = partial(torchcde.cdeint, method="rk4", options={"step_size": 1.0})
    rk4, heun = partial(cdeint, method="rev_rk4"), partial(cdeint, method="reversible_heun")
    second = partial(heun, options={"step_size": 2.0})
    dX = x.diff(dim=1)[:, 0].unsqueeze(-1)
    solves = {
        "torchcde rk4 adjoint, Hermite cubic": (theirs, cubic),
        "torchcde rk4 adjoint, linear": (theirs, linear),
        "revsolve rev_rk4, Hermite cubic": (rk4, HermitePath(x)),
        "revsolve rev_rk4, linear": (rk4, LinearPath(x)),
        "revsolve reversible_heun, increments": (heun, LinearPath(x)),
        "revsolve reversible_heun, increments over 2 knots": (second, LinearPath(x)),
        "revsolve rev_rk4, Hermite cubic, checkpoint": (partial(rk4, gradient="checkpoint"), HermitePath(x)),
        "revsolve rk4, Hermite cubic, checkpoint": (partial(cdeint, method="rk4"), HermitePath(x)),
        "revsolve reversible_heun, increments, checkpoint": (partial(heun, gradient="checkpoint"), LinearPath(x)),
        "revsolve rev_rk4, Hermite cubic, compiled": (partial(rk4, compile=PROGRAMS), HermitePath(x)),
        "revsolve rev_rk4, linear, compiled": (partial(rk4, compile=PROGRAMS), LinearPath(x)),
        "revsolve reversible_heun, increments, compiled": (partial(heun, compile=PROGRAMS), LinearPath(x)),
    }
    contenders = {name: partial(gradient, *solve, func, z0) for name, solve in solves.items()}
    contenders["bare field of rev_rk4"] = partial(bare_field, 8, func, z0, dX)
    contenders["bare field of reversible_heun"] = partial(bare_field, 1, func, z0, dX)
    return milliseconds(contenders, ROUNDS)


def interpolation() -> dict[str, tuple[float, float]]:
    """Milliseconds of torchcde and ours, from data of batch 32, length 100, 5 channels, 30 % of it missing."""
    x = torch.randn(32, max(30, LENGTH), 5)
    x = x.masked_fill(torch.rand(x.shape) < 0.3, torch.nan)
    pairs = {
        "linear": (torchcde.linear_interpolation_coeffs, LinearPath),
        "Hermite cubic": (torchcde.hermite_cubic_coefficients_with_backward_differences, HermitePath),
        "natural cubic": (torchcde.natural_cubic_coeffs, NaturalCubicPath),
    }
    theirs = milliseconds({name: partial(pair[0], x) for name, pair in pairs.items()}, 3)
    ours = milliseconds({name: partial(pair[1], x) for name, pair in pairs.items()}, 50)
    return {name: (theirs[name], ours[name]) for name in pairs}


def main() -> None:
    start()
    taken = training_gradients()
    cubic, linear = (taken[f"torchcde rk4 adjoint, {path}"] for path in ("Hermite cubic", "linear"))
    print("| training gradient | ms | / torchcde cubic | / torchcde linear |\n|---|---|---|---|")
    for name, ms in taken.items():
        print(f"| {name} | {ms:.1f} | {ms / cubic:.2f} | {ms / linear:.2f} |")
    print("\n| path from data, 30 % missing | torchcde ms | revsolve ms | ratio |\n|---|---|---|---|")
    for name, (theirs, ours) in interpolation().items():
        print(f"| {name} | {theirs:.1f} | {ours:.2f} | {theirs / ours:.0f} |")


if __name__ == "__main__":
    main()
