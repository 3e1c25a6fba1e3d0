"""Adaptive solves of a small network on a GPU beside torchdiffeq: `python docs/benchmarks/gpu_adaptive.py`.

Launch-bound: batch 256, dimension 8, width 64, `dopri5` at tolerances of 1e-5 and 1e-7, float32. Medians of wall-clock
milliseconds around a synchronised device, all contenders in turns: of a solve without gradient, and of one with that of every
parameter. Without a GPU there is nothing to measure, and the script says so.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torchdiffeq
from contest import Field, medians, start, tiny
from cuda_graphs import synchronised
from sizes import Size
from torch import Tensor

import revsolve

SIZE = Size(256, 8, 64, 0)  # the steps are chosen by the tolerances
TOLERANCES, ROUNDS = (1e-5, 1e-7), 15
Solve = Callable[[Field, Tensor, Tensor, float], Tensor]
SOLVES: dict[str, Solve] = {
    "torchdiffeq dopri5, backprop": lambda f, y0, t, tol: torchdiffeq.odeint(f, y0, t, rtol=tol, atol=tol),
    "torchdiffeq dopri5, adjoint": lambda f, y0, t, tol: torchdiffeq.odeint_adjoint(f, y0, t, rtol=tol, atol=tol),
    **{
        f"revsolve {method}, {gradient}": lambda f, y0, t, tol, method=method, gradient=gradient: revsolve.odeint(
            f, y0, t, method=method, gradient=gradient, rtol=tol, atol=tol
        )
        for method, gradient in (("dopri5", "direct"), ("dopri5", "checkpoint"), ("rev_dopri5", "reversible"))
    },
}


def forward(solve: Solve, field: Field, y0: Tensor, t: Tensor, tol: float) -> None:
    with torch.no_grad():
        solve(field, y0, t, tol)


def training(solve: Solve, field: Field, y0: Tensor, t: Tensor, tol: float) -> None:
    torch.autograd.grad(solve(field, y0, t, tol)[-1].square().mean(), list(field.parameters()))


def main() -> None:
    start()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured.")
        return
    field, y0 = Field(SIZE).cuda(), torch.randn(SIZE.batch, SIZE.dimension, device="cuda")
    t, tolerances = torch.tensor([0.0, 1.0], device="cuda"), TOLERANCES[:1] if tiny() else TOLERANCES
    turns = {
        (name, tol, kind.__name__): partial(synchronised, partial(kind, solve, field, y0, t, tol))
        for (name, solve), tol, kind in itertools.product(SOLVES.items(), tolerances, (forward, training))
    }
    taken = medians(turns, ROUNDS)
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    columns = list(itertools.product(tolerances, (forward.__name__, training.__name__)))
    print("| ms | " + " | ".join(f"{kind}, tol {tol:g}" for tol, kind in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name in SOLVES:
        print(f"| {name} | " + " | ".join(f"{taken[name, tol, kind]:.2f}" for tol, kind in columns) + " |")


if __name__ == "__main__":
    main()
