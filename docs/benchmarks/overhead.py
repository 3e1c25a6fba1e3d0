"""Overhead: the time of a gradient over the bare cost of the same field calls: `python docs/benchmarks/overhead.py`.

Bare cost: as many calls of the field without gradients as the forward pass makes, and as many calls with a vector-Jacobian
product as the backward pass makes, one after another. Rounds alternate between the two for half a minute, on one thread, in
milliseconds of processor time; the table has medians. The field is a network with two hidden layers, in float32. Wanted are
ratios of at most 1.10, and of 1.35 on the tiny problem, where calls of Python are all there is. Once more without restarts, as
these schemes were published: the difference is what restarts take besides their calls, of which each is a vector-Jacobian
product in the forward pass that the bare cost does not have.
"""

import itertools

import torch
from contest import Field, milliseconds, start, timed, tiny
from sizes import SIZES, Size

import revsolve
from revsolve.schemes.names import scheme

METHODS = ("rev_rk4", "reversible_heun", "alf4", "rk4")
LASTING = 30_000.0  # milliseconds for the rounds of a row, unless fewer than
FEWEST = 7


class Contest:
    """One scheme on one size: a gradient through `odeint`, and the same field calls alone."""

    def __init__(self, method: str, size: Size, **settings: object) -> None:
        torch.manual_seed(0)
        self.method, self.size, self.field, self.settings = method, size, Field(size), settings
        self.y0 = torch.randn(size.batch, size.dimension).requires_grad_()
        self.t = torch.tensor([0.0, 1.0])
        self.num_forward, self.num_backward = 0, 0
        self.gradient()

    def gradient(self) -> None:
        self.field.num_calls = 0
        options = {"step_size": 1.0 / self.size.num_steps}
        end = revsolve.odeint(self.field, self.y0, self.t, method=self.method, options=options, **self.settings)[-1]
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


def row(method: str, name: str, size: Size) -> str:
    contests = [Contest(method, size)]
    if scheme(method).reversible:
        contests.append(Contest(method, size, restarts=None))
    calls = {(i, part): getattr(c, part) for i, c in enumerate(contests) for part in ("gradient", "bare")}
    taken = milliseconds(calls, max(FEWEST, int(LASTING / sum(map(timed, calls.values())))))
    ratios = [f"{taken[i, 'gradient'] / taken[i, 'bare']:.2f}" for i in range(len(contests))]
    count = f"{contests[0].num_forward} + {contests[0].num_backward}"
    times = f"{taken[0, 'bare']:.0f} | {taken[0, 'gradient']:.0f}"
    return f"| {name} | `{method}` | {count} | {times} | {ratios[0]} | {ratios[-1]} |"


def main() -> None:
    start()
    sizes = {"tiny": Size(1, 2, 4, 5)} if tiny() else SIZES
    for name, size in sizes.items():
        print(f"{name}: batch {size.batch}, dimension {size.dimension}, width {size.width}, {size.num_steps} steps")
    print("\n| size | method | calls | bare calls, ms | gradient, ms | ratio | without restarts |")
    print("|---|---|---|---|---|---|---|")
    for (name, size), method in itertools.product(sizes.items(), METHODS):
        print(row(method, name, size), flush=True)


if __name__ == "__main__":
    main()
