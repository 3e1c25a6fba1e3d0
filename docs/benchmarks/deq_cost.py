"""What a reversible equilibrium costs beside torchdeq's: `python docs/benchmarks/deq_cost.py`.

Time: a training gradient of an implicit ResNet cell (32 channels, 8 x 8, batch 64, float32, one thread), 12 iterations, that
is 24 evaluations forward for every contender; the shortest processor time of rounds in which all take turns. "Bare cell" is the
evaluations alone: 24 without a graph, and 24 with their vector-Jacobian products. Error: of the gradient, against that of the
exact fixed point.

Memory: growth of the resident set over forward and backward of one loss on CIFAR-shaped states, each contender in a process of
its own; and the numbers that autograd saves, which do not depend on the machine.
"""

import argparse
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq import get_deq

import revsolve.torchdeq  # noqa: F401 (registers the core)
from revsolve import fixed_point

Contender = Callable[[nn.Module, Tensor], Tensor]  # cell, x -> z

CHANNELS, EVALUATIONS, ROUNDS = 32, 24, 6
MEMORY_BATCH, MEMORY_SIZE = 64, 32
TORCHDEQ = {"f_tol": 0.0, "f_max_iter": EVALUATIONS, "b_tol": 0.0, "b_max_iter": EVALUATIONS}


def ours(**options: Any) -> Contender:
    return lambda cell, x: fixed_point(cell, torch.zeros_like(x), args=x, tol=0, max_steps=EVALUATIONS // 2, **options)


def core(name: str, **keys: Any) -> Contender:
    deq = get_deq(core=name, **TORCHDEQ, **keys)
    return lambda cell, x: deq(lambda z: cell(z, x), torch.zeros_like(x))[0][-1]


CONTENDERS: dict[str, Contender] = {
    "fixed_point, beta 0.5": ours(beta=0.5),
    "fixed_point, beta 0.8": ours(beta=0.8),
    "the same, float32 pair": ours(beta=0.8, pair_dtype=torch.float32),
    "the same, unrolled": ours(beta=0.8, gradient="direct"),
    "torchdeq, reversible": core("reversible", beta=0.8, on_failure="ignore"),
    "torchdeq, one step": core("sliced"),
    "torchdeq, phantom 5": core("sliced", grad=5, tau=0.5),
    "torchdeq, phantom 12": core("sliced", grad=12, tau=0.5),
    "torchdeq, ift": core("sliced", ift=True),
}


class Cell(nn.Module):
    """norm(relu(z / 4 + x + norm(conv(norm(relu(conv(z))))) / 4)), an implicit ResNet cell that contracts."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(channels // 16, channels) for _ in range(3)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second, last = self.norms
        return last(torch.relu(0.25 * z + x + 0.25 * second(self.outer(first(torch.relu(self.inner(z)))))))


def gradient(name: str, cell: Cell, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(CONTENDERS[name](cell, x)), [*cell.parameters(), x]))


def loss(z: Tensor) -> Tensor:
    """A component in a random direction: the norm of z tells nothing, for the cell normalises it."""
    return (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)).mean()


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
    return vector(list(torch.autograd.grad(loss(z), [*wide.parameters(), x])))


def numbers_saved(name: str, cell: Cell, x: Tensor) -> int:
    """How many float32 numbers autograd saves for the backward pass besides parameters and x."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = CONTENDERS[name](cell, x)
    own = {t.untyped_storage().data_ptr() for t in [*cell.parameters(), x]}
    del z
    return sum(t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in own)


def megabytes(name: str) -> float:
    """How far the resident set grows during one gradient (called in a fresh process, on Linux)."""
    cell, x = Cell(), torch.randn(MEMORY_BATCH, CHANNELS, MEMORY_SIZE, MEMORY_SIZE, requires_grad=True)
    gradient(name, cell, torch.randn(1, CHANNELS, 4, 4, requires_grad=True))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = kilobytes("VmRSS")
    gradient(name, cell, x)
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(entry: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(entry)))


def main() -> None:
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(64, CHANNELS, 8, 8, requires_grad=True)
    truth = exact(cell, x)
    calls: dict[str, Callable[[], object]] = {"bare cell": lambda: bare(cell, x)}
    for name in CONTENDERS:
        calls[name] = functools.partial(gradient, name, cell, x)
    taken = milliseconds(calls)
    print(f"{'':<26}{'ms':>8}{'of bare':>9}{'error':>10}{'saved':>12}{'peak MB':>9}")
    print(f"{'bare cell':<26}{taken['bare cell']:>8.0f}{1.0:>9.2f}")
    for name in CONTENDERS:
        error = ((vector(gradient(name, cell, x)) - truth).norm() / truth.norm()).item()
        peak = subprocess.run(
            [sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True
        ).stdout
        row = f"{taken[name]:>8.0f}{taken[name] / taken['bare cell']:>9.2f}{error:>10.1e}{numbers_saved(name, cell, x):>12,}"
        print(f"{name:<26}{row}{float(peak):>9.0f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", choices=list(CONTENDERS))
    wanted = parser.parse_args().memory
    if wanted is None:
        main()
    else:
        print(megabytes(wanted))
