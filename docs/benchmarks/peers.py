"""Gradients of an ODE beside torchdiffeq and diffrax: `python docs/benchmarks/peers.py`.

The gradient of a solve through a network with two hidden layers, float32, one thread, in milliseconds of processor time: medians
of rounds in which all contenders take turns. Every method evaluates the field as often on its way forward as RK4 does in the
steps that are stated (four times a step; the coupled pair needs twice that), so this table compares speed only: what accuracy
a method has for its evaluations is said by `work_precision.py`. "adjoint" is torchdiffeq's continuous adjoint, whose gradient
is not that of the discrete solve; all others are exact. JAX runs in a process of its own, compiled.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchdiffeq
from contest import Field, medians, start, timed, tiny
from sizes import SIZES, Size

import revsolve

HERE = Path(__file__).parent
JAX = Path(os.environ.get("PEER_JAX", HERE.parents[1] / "build" / "peer-jax" / "bin" / "python"))
STAGES = 4  # evaluations of a step of RK4
PYTORCH = (
    ("rev_rk4", "reversible", 4),  # method, gradient, evaluations a step that are counted
    ("alf4", "reversible", 10),
    ("alf", "reversible", 1),
    ("reversible_heun", "reversible", 1),
    ("rk4", "checkpoint", 4),
    ("rk4", "direct", 4),
)
COMPILED = ("rev_rk4", "alf4")  # as programs too; that takes tens of seconds each, the first time
IN_JAX = (
    "diffrax rk4, checkpointed",
    "diffrax rk4, direct",
    "diffrax reversible pair of RK4",
    "JAX reversible pair of RK4",
)
WIDTHS = {f"width {width}": Size(128, 16, width, 30) for width in (16, 64, 128, 256, 512)}
ROUNDS = {"tiny": 9, "small": 7, "large": 3}


class Worker:
    """A process with another Python that times one gradient of JAX per question."""

    def __init__(self, python: Path) -> None:
        command = [str(python), str(HERE / "diffrax_peer.py"), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.answer()

    def __call__(self, size: Size, contender: str) -> float:
        assert self.process.stdin is not None
        print(*size, contender, file=self.process.stdin, flush=True)
        return float(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("diffrax_peer.py ended without an answer; its message stands above.")
        return line.strip()


def gradient(solve: Callable[..., torch.Tensor], field: Field, size: Size, num_steps: int) -> None:
    y0, t = torch.ones(size.batch, size.dimension, requires_grad=True), torch.tensor([0.0, 1.0])
    end = solve(field, y0, t, options={"step_size": 1.0 / num_steps})[-1]
    torch.autograd.grad(end.sum(), [y0, *field.parameters()])


def contenders(size: Size, jax: Worker | None, compiles: bool) -> dict[str, Callable[[], float]]:
    """What takes part, by name; each returns the milliseconds of one gradient."""
    field, calls = Field(size), {}
    for method, mode, evaluations in PYTORCH:
        solve = partial(revsolve.odeint, method=method, gradient=mode)
        num_steps = max(1, size.num_steps * STAGES // evaluations)
        calls[f"revsolve {method}, {mode}"] = partial(gradient, solve, field, size, num_steps)
        if compiles and method in COMPILED:
            solve = partial(solve, compile=True)
            calls[f"revsolve {method}, {mode}, compiled"] = partial(gradient, solve, field, size, num_steps)
    for name in ("odeint", "odeint_adjoint"):
        solve = partial(getattr(torchdiffeq, name), method="rk4")
        label = "backprop" if name == "odeint" else "adjoint"
        calls[f"torchdiffeq rk4, {label}"] = partial(gradient, solve, field, size, size.num_steps)
    turns: dict[str, Callable[[], float]] = {name: partial(timed, call) for name, call in calls.items()}
    return turns | ({name: partial(jax, size, name) for name in IN_JAX} if jax is not None else {})


def measured(sizes: dict[str, Size], jax: Worker | None, compiles: bool = False) -> dict[str, dict[str, float]]:
    """Milliseconds by contender and size."""
    taken: dict[str, dict[str, float]] = {}
    for label, size in sizes.items():
        for name, ms in medians(contenders(size, jax, compiles), ROUNDS.get(label, 3)).items():
            taken.setdefault(name, {})[label] = ms
    return taken


def table(taken: dict[str, dict[str, float]], sizes: dict[str, Size]) -> None:
    print("| gradient, ms | " + " | ".join(sizes) + " |\n|---|" + "---|" * len(sizes))
    for name, row in taken.items():
        print(f"| {name} | " + " | ".join(f"{row[label]:.{1 if row[label] < 100 else 0}f}" for label in sizes) + " |")


def main() -> None:
    start()
    sizes = {"tiny": Size(1, 2, 4, 5)} if tiny() else SIZES
    widths = {"width 4": Size(1, 2, 4, 5)} if tiny() else WIDTHS
    jax = Worker(JAX) if JAX.exists() and not tiny() else None
    for label, size in sizes.items():
        print(
            f"{label}: batch {size.batch}, dimension {size.dimension}, width {size.width}, {size.num_steps} RK4 steps"
        )
    print("JAX has no environment here (`make bench` makes one): left out" if jax is None else jax.versions)
    compiles = not tiny() and shutil.which("g++") is not None
    if not compiles:
        print("no C++ compiler here, or no time for it: compiled solves are left out")
    print()
    table(measured(sizes, jax, compiles), sizes)
    print("\nbatch 128, dimension 16, 30 steps, by width:\n")
    table(measured(widths, jax), widths)


if __name__ == "__main__":
    main()
