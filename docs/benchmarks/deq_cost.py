"""What a reversible equilibrium costs beside torchdeq's: `python docs/benchmarks/deq_cost.py`.

Time: a training gradient of an implicit ResNet cell (32 channels, 8 x 8, batch 64, float32, one thread), 12 iterations, that
is 24 evaluations forward for every contender; the shortest processor time of rounds in which all take turns. "Bare cell" is the
evaluations alone: 24 without a graph, and 24 with their vector-Jacobian products. Error: of the gradient, against that of the
exact fixed point.

Memory: growth of the resident set over forward and backward of one loss on CIFAR-shaped states, each contender in a process of
its own; and the numbers that autograd saves, which do not depend on the machine.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchdeq import get_deq

import revsolve.torchdeq  # noqa: F401 (registers the core)
from revsolve import fixed_point

CHANNELS, EVALUATIONS, ROUNDS = 32, 24, 15
MEMORY_BATCH, MEMORY_SIZE = 256, 32
FIXED = {"f_tol": 0.0, "f_max_iter": EVALUATIONS, "b_tol": 0.0, "b_max_iter": EVALUATIONS, "on_failure": "ignore"}
CORES = {
    "reversible": {"core": "reversible", "beta": 0.8},
    "reversible, beta 0.5": {"core": "reversible", "beta": 0.5},
    "reversible, float32 pair": {"core": "reversible", "beta": 0.5, "pair_dtype": torch.float32},
    "torchdeq, one step": {"core": "sliced"},
    "torchdeq, phantom 5": {"core": "sliced", "grad": 5, "tau": 0.5},
    "torchdeq, phantom 12": {"core": "sliced", "grad": 12, "tau": 0.5},
    "torchdeq, ift": {"core": "sliced", "ift": True},
}


class Cell(nn.Module):
    """norm(relu(z + norm(x + conv(norm(relu(conv(z))))))), its convolutions scaled so that it contracts."""

    def __init__(self, channels: int = CHANNELS, scale: float = 0.5) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(channels // 16, channels) for _ in range(3)])
        with torch.no_grad():
            self.norms[1].weight.mul_(scale)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second, last = self.norms
        return last(torch.relu(0.5 * z + second(x + self.outer(first(torch.relu(self.inner(z)))))))


def run(name: str, cell: Cell, x: Tensor) -> list[Tensor]:
    keys = {**FIXED, **CORES[name]}
    if CORES[name]["core"] != "reversible":
        del keys["on_failure"]
    states, _ = get_deq(**keys)(lambda z: cell(z, x), torch.zeros_like(x))
    return list(torch.autograd.grad(states[-1].square().mean(), [*cell.parameters(), x]))


def bare(cell: Cell, x: Tensor) -> None:
    z, inputs = torch.zeros_like(x), [*cell.parameters(), x]
    with torch.no_grad():
        for _ in range(EVALUATIONS):
            z = cell(z, x)
    ones = torch.ones_like(z)
    for _ in range(EVALUATIONS):
        leaf = z.detach().requires_grad_()
        torch.autograd.grad(cell(leaf, x), [leaf, *inputs], ones)


def milliseconds(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Shortest processor time of each; they take turns, and other programs on the machine can only lengthen it."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            start = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - start))
    return {name: min(times) for name, times in taken.items()}


def vector(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def exact(cell: Cell, x: Tensor) -> Tensor:
    """The gradient at the fixed point itself, by implicit differentiation in float64."""
    wide = Cell().double()
    wide.load_state_dict(cell.state_dict())
    x = x.detach().double().requires_grad_()
    options = {"b_tol": 1e-11, "b_max_steps": 300}
    z = fixed_point(wide, torch.zeros_like(x), args=x, method="anderson", tol=1e-11, max_steps=300, options=options)
    return vector(list(torch.autograd.grad(z.square().mean(), [*wide.parameters(), x])))


def numbers_saved(name: str, cell: Cell, x: Tensor) -> int:
    """How many float32 numbers autograd saves for the backward pass besides parameters and x."""
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        states, _ = get_deq(**{k: v for k, v in {**FIXED, **CORES[name]}.items() if k != "on_failure"})(
            lambda z: cell(z, x), torch.zeros_like(x)
        )
    own = {t.untyped_storage().data_ptr() for t in [*cell.parameters(), x]}
    del states
    return sum(t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in own)


def megabytes(name: str) -> float:
    """Growth of the largest resident set over one gradient (called in a fresh process)."""
    cell, x = Cell(), torch.randn(MEMORY_BATCH, CHANNELS, MEMORY_SIZE, MEMORY_SIZE, requires_grad=True)
    run(name, cell, torch.randn(1, CHANNELS, 4, 4, requires_grad=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(name, cell, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(64, CHANNELS, 8, 8, requires_grad=True)
    truth = exact(cell, x)
    calls: dict[str, Callable[[], object]] = {"bare cell": lambda: bare(cell, x)}
    for name in CORES:
        calls[name] = lambda name=name: run(name, cell, x)
    taken = milliseconds(calls)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread, {time.strftime('%Y-%m-%d')}")
    print(f"{'':<26}{'ms':>8}{'of bare':>9}{'error':>10}{'saved':>12}{'peak MB':>9}")
    print(f"{'bare cell':<26}{taken['bare cell']:>8.0f}{1.0:>9.2f}")
    for name in CORES:
        error = ((vector(run(name, cell, x)) - truth).norm() / truth.norm()).item()
        peak = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True).stdout
        row = f"{taken[name]:>8.0f}{taken[name] / taken['bare cell']:>9.2f}{error:>10.1e}{numbers_saved(name, cell, x):>12,}"
        print(f"{name:<26}{row}{float(peak):>9.0f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", choices=list(CORES))
    wanted = parser.parse_args().memory
    if wanted is None:
        main()
    else:
        print(megabytes(wanted))
