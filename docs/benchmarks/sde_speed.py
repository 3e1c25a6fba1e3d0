"""Speed of `sdeint` against torchsde, side by side in one process: `python docs/benchmarks/sde_speed.py`.

A training gradient of a diagonal Stratonovich SDE (batch 64, state 4, width 32, 100 steps, float32, one thread) with
reversible Heun, in milliseconds of processor time: the median over rounds in which all contenders take turns. "Bare field"
is the evaluations alone: 101 of f and g without a graph, and 101 with their vector-Jacobian products. "Compiled" is compile=True,
once the programs are there.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torchsde
from contest import milliseconds, start, tiny
from torch import Tensor, nn

from revsolve import BrownianPath, sdeint

BATCH, STATE, WIDTH, STEPS = (2, 2, 4, 4) if tiny() else (64, 4, 32, 100)
ROUNDS = 40
PROGRAMS = {"backend": "eager"} if tiny() else True


class NeuralSDE(nn.Module):
    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self) -> None:
        super().__init__()
        self.drift = nn.Sequential(nn.Linear(STATE, WIDTH), nn.Tanh(), nn.Linear(WIDTH, STATE))
        self.diffusion = nn.Sequential(nn.Linear(STATE, WIDTH), nn.Tanh(), nn.Linear(WIDTH, STATE), nn.Sigmoid())

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.diffusion(y)


def ours(sde: NeuralSDE, y0: Tensor, ts: Tensor, **settings: object) -> None:
    sdeint(sde, y0, ts, dt=1 / STEPS, **settings)[-1].square().mean().backward()


def torchsde_adjoint(sde: NeuralSDE, y0: Tensor, ts: Tensor) -> None:
    bm = torchsde.BrownianInterval(0.0, 1.0, (BATCH, STATE), dt=1 / STEPS)
    method = {"method": "reversible_heun", "adjoint_method": "adjoint_reversible_heun"}
    torchsde.sdeint_adjoint(sde, y0, ts, bm=bm, dt=1 / STEPS, **method)[-1].square().mean().backward()


def bare_field(sde: NeuralSDE, y0: Tensor, ts: Tensor) -> None:
    y, t, parameters = y0.detach(), ts[0], list(sde.parameters())
    with torch.no_grad():
        for _ in range(STEPS + 1):
            sde.f(t, y), sde.g(t, y)
    ones = torch.ones_like(y)
    for _ in range(STEPS + 1):
        leaf = y.detach().requires_grad_()
        torch.autograd.grad((sde.f(t, leaf), sde.g(t, leaf)), (leaf, *parameters), (ones, ones))


def brownian_sweep(path: Callable[[float, float], Tensor], knots: list[float]) -> None:
    for a, b in pairwise(knots):
        path(a, b)
    for a, b in pairwise(knots):
        path(b, a)


def randn_sweep() -> None:
    for _ in range(2 * STEPS):
        torch.randn(BATCH, STATE)


def new_path() -> BrownianPath:
    return BrownianPath(0.0, 1.0, (BATCH, STATE), grid=[n / STEPS for n in range(STEPS + 1)])


def main() -> None:
    start()
    sde, ts = NeuralSDE(), torch.tensor([0.0, 1.0])
    y0 = torch.randn(BATCH, STATE, requires_grad=True)
    knots = [n / STEPS for n in range(STEPS + 1)]
    gradients = milliseconds(
        {
            "revsolve reversible_heun": lambda: ours(sde, y0, ts),
            "revsolve reversible_heun, restarts=32": lambda: ours(sde, y0, ts, restarts=32),
            "revsolve reversible_heun, checkpoint": lambda: ours(sde, y0, ts, gradient="checkpoint"),
            "revsolve reversible_heun, direct": lambda: ours(sde, y0, ts, gradient="direct"),
            "revsolve reversible_heun, compiled": lambda: ours(sde, y0, ts, compile=PROGRAMS),
            "torchsde sdeint_adjoint": lambda: torchsde_adjoint(sde, y0, ts),
            "bare field": lambda: bare_field(sde, y0, ts),
        },
        ROUNDS,
    )
    noise = milliseconds(
        {"BrownianPath": lambda: brownian_sweep(new_path(), knots), "torch.randn": randn_sweep}, 5 * ROUNDS
    )
    print("| training gradient | ms | / torchsde | / bare field |\n|---|---|---|---|")
    for name, ms in gradients.items():
        print(
            f"| {name} | {ms:.1f} | {ms / gradients['torchsde sdeint_adjoint']:.2f} | {ms / gradients['bare field']:.2f} |"
        )
    print("\n| 2 x 100 increments, forward then backward | ms | / randn |\n|---|---|---|")
    for name, ms in noise.items():
        print(f"| {name} | {ms:.2f} | {ms / noise['torch.randn']:.2f} |")


if __name__ == "__main__":
    main()
