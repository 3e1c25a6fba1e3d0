"""Overhead: the time of a gradient over the bare cost of the same field calls: `python docs/benchmarks/overhead.py`.

Bare cost: as many calls of the field without gradients as the forward pass makes, and as many calls with a vector-Jacobian
product as the backward pass makes, one after another. Rounds alternate between the two, on one thread, in milliseconds of
processor time; the table has medians. The field is a network with two hidden layers, in float32.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import revsolve

METHODS = ("rev_rk4", "reversible_heun", "alf4", "rk4")
BOUNDS = {"tiny": 1.5, "small": 1.15}


@dataclass(frozen=True)
class Size:
    name: str
    batch: int
    dimension: int
    width: int
    num_steps: int
    num_rounds: int


SIZES = (Size("tiny", 1, 2, 16, 200, 9), Size("small", 128, 2, 64, 100, 9), Size("large", 256, 64, 512, 30, 3))


class Field(nn.Module):
    """A network with two hidden layers, which counts its calls."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d, w = size.dimension, size.width
        self.net = nn.Sequential(nn.Linear(d, w), nn.Tanh(), nn.Linear(w, w), nn.Tanh(), nn.Linear(w, d))
        self.num_calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.num_calls += 1
        return self.net(y)


class Contest:
    """One scheme on one size: a gradient through `odeint`, and the same field calls alone."""

    def __init__(self, method: str, size: Size) -> None:
        torch.manual_seed(0)
        self.method, self.size, self.field = method, size, Field(size)
        self.y0 = torch.randn(size.batch, size.dimension).requires_grad_()
        self.t = torch.tensor([0.0, 1.0])
        self.num_forward, self.num_backward = 0, 0
        self.gradient()

    def gradient(self) -> None:
        self.field.num_calls = 0
        options = {"step_size": 1.0 / self.size.num_steps}
        end = revsolve.odeint(self.field, self.y0, self.t, method=self.method, options=options)[-1]
        self.num_forward = self.field.num_calls
        torch.autograd.grad(end.sum(), [self.y0, *self.field.parameters()])
        self.num_backward = self.field.num_calls - self.num_forward

    def bare(self) -> None:
        y, cotangent, parameters = self.y0.detach(), torch.ones_like(self.y0), tuple(self.field.parameters())
        with torch.no_grad():
            for _ in range(self.num_forward):
                self.field(self.t[0], y)
        for _ in range(self.num_backward):
            x = y.detach().requires_grad_()
            torch.autograd.grad(self.field(self.t[0], x), (x, *parameters), cotangent)

    def measured(self) -> tuple[float, float]:
        """Medians of both, in seconds of processor time."""
        rounds = [(seconds(self.gradient), seconds(self.bare)) for _ in range(self.size.num_rounds)]
        ours, floor = (statistics.median(column) for column in zip(*rounds, strict=True))
        return ours, floor


def seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def row(method: str, size: Size) -> str:
    contest = Contest(method, size)
    ours, floor = contest.measured()
    calls = f"{contest.num_forward} + {contest.num_backward}"
    return f"| {size.name} | `{method}` | {calls} | {1e3 * floor:.0f} | {1e3 * ours:.0f} | {ours / floor:.2f} |"


def main() -> None:
    torch.set_num_threads(1)
    for size in SIZES:
        print(
            f"{size.name}: batch {size.batch}, dimension {size.dimension}, width {size.width}, {size.num_steps} steps"
        )
    print(", ".join(f"bound of rev_rk4 on {name}: {bound}" for name, bound in BOUNDS.items()))
    print("\n| size | method | calls | bare calls, ms | gradient, ms | ratio |\n|---|---|---|---|---|---|")
    for size, method in itertools.product(SIZES, METHODS):
        print(row(method, size), flush=True)


if __name__ == "__main__":
    main()
