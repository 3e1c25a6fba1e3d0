"""Time of a gradient against its accuracy: `python docs/benchmarks/work_precision.py`.

A smooth neural field (two hidden layers of width 64, weights twice those of torch, batch 128, dimension 2, five units of time,
float64, one thread; torchdiffeq's rk4 is the 3/8 rule, here `rk4_38`); errors are relative, in the 2-norm, of the last state and
of the gradient with respect to the parameters, against 400 steps of order 8. Every method has a ladder of steps; times are
medians of processor time of rounds in which all take turns, and between two rungs error and time are interpolated as powers.
"held" is the most numbers that autograd keeps at any time, forward or backward, on the first rung that reaches the accuracy.
"""

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchdiffeq
from contest import Field, milliseconds, start, tiny
from sizes import Size
from torch import Tensor

import revsolve

sys.path.append(str(Path(__file__).parents[1] / "figures"))
from meter import Meter

SIZE, DURATION, GAIN = Size(128, 2, 64, 0), 5.0, 2.0
TARGET = 1e-6
ROUNDS, FINER = 3, 1.6


class Contender(NamedTuple):
    """A method, how its gradient is taken, and the steps of its middle rung: about what an error of 1e-6 needs."""

    method: str
    gradient: str
    num_steps: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.gradient}"

    def ladder(self) -> list[int]:
        if tiny():
            return [2, 4]
        return sorted({max(2, round(self.num_steps * FINER**rung)) for rung in range(-3, 2)})


BOUNDED = (
    Contender("rev_rk4", "reversible", 44),
    Contender("rev_dopri5", "reversible", 17),
    Contender("rev_dopri8", "reversible", 9),
    Contender("alf4", "reversible", 19),
    Contender("alf6", "reversible", 13),
    Contender("reversible_heun4", "reversible", 20),
    Contender("reversible_heun", "reversible", 900),
    Contender("alf", "reversible", 900),
    Contender("rk4", "checkpoint", 44),
    Contender("tsit5", "checkpoint", 15),
    Contender("dopri8", "checkpoint", 9),
)
KEEPING_ALL = (
    Contender("rk4", "direct", 44),
    Contender("tsit5", "direct", 15),
    Contender("rk4_38", "direct", 40),
    Contender("alf4", "direct", 19),
    Contender("torchdiffeq rk4", "backprop", 44),
    Contender("torchdiffeq rk4", "adjoint", 44),
)


class Point(NamedTuple):
    """One rung: steps, relative errors of the state and of the gradient, milliseconds."""

    num_steps: int
    error: float
    grad_error: float
    ms: float


class Problem:
    """The field, where it starts, and the reference."""

    def __init__(self) -> None:
        self.field = Field(SIZE).double()
        with torch.no_grad():
            for p in self.field.parameters():
                p.mul_(GAIN)
        self.y0 = torch.randn(SIZE.batch, SIZE.dimension, dtype=torch.float64, requires_grad=True)
        self.exact = self.solved(Contender("dopri8", "checkpoint", 0), 20 if tiny() else 400)

    def solved(self, by: Contender, num_steps: int) -> tuple[Tensor, Tensor]:
        """The last state and the gradient of its mean square with respect to the parameters."""
        t, options = torch.tensor([0.0, DURATION], dtype=torch.float64), {"step_size": DURATION / num_steps}
        if by.method.startswith("torchdiffeq"):
            solve = torchdiffeq.odeint if by.gradient == "backprop" else torchdiffeq.odeint_adjoint
            end = solve(self.field, self.y0, t, method="rk4", options=options)[-1]
        else:
            end = revsolve.odeint(self.field, self.y0, t, method=by.method, gradient=by.gradient, options=options)[-1]
        _, *grads = torch.autograd.grad(end.square().mean(), [self.y0, *self.field.parameters()])
        return end.detach(), torch.cat([g.flatten() for g in grads])

    def errors(self, by: Contender, num_steps: int) -> tuple[float, float]:
        found = self.solved(by, num_steps)
        return tuple(float((a - b).norm() / b.norm()) for a, b in zip(found, self.exact, strict=True))

    def held(self, by: Contender, num_steps: int) -> int:
        meter = Meter([*self.field.parameters(), self.y0])
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda packed: packed[0]):
            self.solved(by, num_steps)
        return meter.peak


def measured(problem: Problem) -> dict[Contender, list[Point]]:
    rungs = [(c, n) for c in (*BOUNDED, *KEEPING_ALL) for n in c.ladder()]
    calls: dict[str, Callable[[], object]] = {f"{c.name} {n}": partial(problem.solved, c, n) for c, n in rungs}
    taken = milliseconds(calls, ROUNDS)
    points: dict[Contender, list[Point]] = {}
    for c, n in rungs:
        points.setdefault(c, []).append(Point(n, *problem.errors(c, n), taken[f"{c.name} {n}"]))
    return points


def time_at(points: list[Point], target: float, error: Callable[[Point], float]) -> float:
    """Milliseconds for this error, between the two rungs around it; nan if the ladder does not reach it."""
    for a, b in itertools.pairwise(points):
        if error(a) >= target >= error(b):
            share = math.log(target / error(a)) / math.log(error(b) / error(a)) if error(b) < error(a) else 0.0
            return a.ms * (b.ms / a.ms) ** share
    return math.nan


def table(points: dict[Contender, list[Point]], held: dict[Contender, int]) -> None:
    at = {c: time_at(rungs, TARGET, lambda p: p.error) for c, rungs in points.items()}
    by_name = {c.name: ms for c, ms in at.items()}
    pair, theirs = by_name["rev_rk4, reversible"], by_name["torchdiffeq rk4, backprop"]
    print(f"| at {TARGET:.0e} | of the state, ms | / rev_rk4 | / torchdiffeq | of the gradient, ms | held |")
    print("|---|---|---|---|---|---|")
    for c, rungs in points.items():
        grad = time_at(rungs, TARGET, lambda p: p.grad_error)
        print(f"| {c.name} | {at[c]:.0f} | {at[c] / pair:.2f} | {at[c] / theirs:.2f} | {grad:.0f} | {held[c]:,} |")
    print("\n| steps: errors of state and gradient, ms |" + " |" * len(rungs) + "\n|---|" + "---|" * len(rungs))
    for c, rungs in points.items():
        cells = [f"{p.num_steps}: {p.error:.0e}, {p.grad_error:.0e}, {p.ms:.0f}" for p in rungs]
        print(f"| {c.name} | {' | '.join(cells)} |")


def main() -> None:
    start()
    problem = Problem()
    points = measured(problem)
    held = {}
    for c, rungs in points.items():
        reached = next((p.num_steps for p in rungs if p.error <= TARGET), rungs[-1].num_steps)
        held[c] = problem.held(c, reached)
    table(points, held)


if __name__ == "__main__":
    main()
