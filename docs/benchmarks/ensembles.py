"""Exact gradients of ensembles: `python docs/benchmarks/ensembles.py [--device cuda]`.

Lorenz systems, 1 to 100,000 of them, over half a unit of time in float64, as gradsolve compares solvers (arXiv 2609.02876): the
mean square of the last states is differentiated with respect to all first states and the three coefficients. First 50 steps of
RK4; then adaptive steps of dopri5 with tolerances of 1e-6, the same steps for all members ("shared"), or for each its own. Each
cell says milliseconds of processor time and the most megabytes allocated at once: by torch's allocator, and for JAX the temporary
memory of XLA's program. Medians of rounds in which all take turns, one thread; on a GPU wall-clock time around a synchronised
device. A gradient that would need over 2 GB is left out. torchdiffeq's adjoint is the gradient of another equation; all others
are exact. Compiled solves (and JAX, as always) are timed once they are there.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torchdiffeq
from contest import medians, most_held, start, timed, tiny
from cuda_graphs import synchronised
from peers import JAX, Worker
from sizes import Size
from torch import Tensor, nn

import revsolve

try:
    import torchode
except ImportError:
    torchode = None

DEVICE = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cpu"
NUM_STEPS, END, TOLERANCE = (4, 0.04, 1e-3) if tiny() else (50, 0.5, 1e-6)
MEMBERS = (1, 2) if tiny() else (1, 10, 100, 1000, 10_000, 100_000)
COMPILED = (1,) if tiny() else (1, 1000, 100_000)  # every size is compiled anew, which takes half a minute
ROUNDS = {1000: 5, 10_000: 3, 100_000: 1}
MOST = 2e9  # bytes
LARGEST = {"dopri5, steps of each": 10_000}  # more take minutes
FIXED = {"options": {"step_size": END / NUM_STEPS}}
ADAPTIVE = {"rtol": TOLERANCE, "atol": TOLERANCE}
EACH = {**ADAPTIVE, "options": {"steps_of_each": True}}
Solve = Callable[[nn.Module, Tensor], Tensor]


class Lorenz(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64, device=DEVICE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        sigma, rho, beta = self.coefficients
        a, b, c = y.unbind(-1)
        return torch.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], -1)


def solve(solver: Any, each: bool = False, **settings: Any) -> Solve:
    def end(field: nn.Module, y0: Tensor) -> Tensor:
        t = torch.tensor([0.0, END], dtype=y0.dtype, device=DEVICE)
        return solver(field, y0, t[:, None].expand(2, len(y0)) if each else t, **settings)[-1]

    return end


def by_torchode(field: nn.Module, y0: Tensor) -> Tensor:
    term, times = torchode.ODETerm(field), torch.tensor([[0.0, END]], dtype=y0.dtype, device=DEVICE).expand(len(y0), 2)
    control = torchode.IntegralController(TOLERANCE, TOLERANCE, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), control, backprop_through_step_size_control=False)
    return solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times)).ys[:, -1]


ours, theirs = partial(solve, revsolve.odeint), partial(solve, torchdiffeq.odeint)
compiled = {"compile": {"backend": "eager"} if tiny() else True}
CONTENDERS: Mapping[str, Mapping[str, Solve]] = {
    f"RK4, {NUM_STEPS} steps": {
        "`rev_rk4`": ours(method="rev_rk4", **FIXED),
        "`reversible_heun4`": ours(method="reversible_heun4", **FIXED),
        "`rk4`, checkpoint": ours(method="rk4", gradient="checkpoint", **FIXED),
        "`rk4`, direct": ours(method="rk4", gradient="direct", **FIXED),
        "`rk4`, checkpoint, compiled": ours(method="rk4", **compiled, **FIXED),
        "`rev_rk4`, compiled": ours(method="rev_rk4", **compiled, **FIXED),
        "torchdiffeq, backpropagation": theirs(method="rk4", **FIXED),
        "torchdiffeq, adjoint": solve(torchdiffeq.odeint_adjoint, method="rk4", **FIXED),
    },
    "dopri5, shared steps": {
        "`rev_dopri5`": ours(method="rev_dopri5", **ADAPTIVE),
        "`dopri5`, checkpoint": ours(method="dopri5", gradient="checkpoint", **ADAPTIVE),
        "`dopri5`, direct": ours(method="dopri5", gradient="direct", **ADAPTIVE),
        "`dopri5`, checkpoint, compiled": ours(method="dopri5", **compiled, **ADAPTIVE),
        "torchdiffeq, backpropagation": theirs(method="dopri5", **ADAPTIVE),
        "torchdiffeq, adjoint": solve(torchdiffeq.odeint_adjoint, method="dopri5", **ADAPTIVE),
    },
    "dopri5, steps of each": {
        "`rev_dopri5`": ours(True, method="rev_dopri5", **EACH),
        "`dopri5`, checkpoint": ours(True, method="dopri5", gradient="checkpoint", **EACH),
        "`dopri5`, direct": ours(True, method="dopri5", gradient="direct", **EACH),
        **({} if torchode is None else {"torchode, backpropagation": by_torchode}),
    },
}
IN_JAX = {
    f"RK4, {NUM_STEPS} steps": "Lorenz fixed",
    "dopri5, shared steps": "Lorenz shared",
    "dopri5, steps of each": "Lorenz each",
}


def gradient(field: nn.Module, y0: Tensor, end: Solve) -> None:
    torch.autograd.grad(end(field, y0).square().mean(), [y0, *field.parameters()])


def bytes_of(call: Callable[[], None]) -> float:
    if DEVICE == "cpu":
        return most_held(call)
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def measured(kind: str, jax: Worker | None) -> dict[str, dict[int, tuple[float, float]]]:
    """Milliseconds and bytes, by contender and number of members."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    clock = timed if DEVICE == "cpu" else synchronised
    for members in (n for n in MEMBERS if n <= LARGEST.get(kind, n)):
        field, size = Lorenz(), Size(members, 3, 0, NUM_STEPS)
        y0 = (torch.randn(members, 3, dtype=torch.float64, device=DEVICE) * 8 + 1).requires_grad_()
        turns: dict[str, Callable[[], float]] = {}
        memory: dict[str, float] = {}
        for name, end in CONTENDERS[kind].items():
            *_, (n, (_, held)) = {1: (0.0, 0.0), **found.get(name, {})}.items()
            if held * members / n > MOST or ("compiled" in name and (members not in COMPILED or not COMPILES)):
                continue
            call = partial(gradient, field, y0, end)
            call()
            turns[name], memory[name] = partial(clock, call), bytes_of(call)
        if jax is not None:
            label = f"diffrax {IN_JAX[kind]}"
            turns[label], memory[label] = partial(jax, size, label), jax(size, f"bytes of {label}")
        for name, ms in medians(turns, ROUNDS.get(members, 7)).items():
            found.setdefault(name, {})[members] = ms, memory[name]
    return found


def table(kind: str, found: Mapping[str, Mapping[int, tuple[float, float]]]) -> None:
    print(f"\n| {kind}; ms, MB | " + " | ".join(f"{members:,}" for members in MEMBERS) + " |")
    print("|---" * (1 + len(MEMBERS)) + "|")
    for name, row in found.items():
        cells = (f"{row[n][0]:.3g}, {row[n][1] / 1e6:.2g}" if n in row else "" for n in MEMBERS)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


COMPILES = DEVICE == "cpu" and (tiny() or shutil.which("g++") is not None)


def main() -> None:
    start()
    os.environ["JAX_ENABLE_X64"] = "1"  # for the worker
    jax = Worker(JAX) if JAX.exists() and not tiny() and DEVICE == "cpu" else None
    print("JAX has no environment here (`make bench` makes one): left out" if jax is None else jax.versions)
    if torchode is None:
        print("torchode is not installed: left out")
    for kind in CONTENDERS:
        table(kind, measured(kind, jax))


if __name__ == "__main__":
    main()
