"""Training steps as CUDA graphs: `python docs/benchmarks/cuda_graphs.py`.

A launch-bound problem: batch 256, dimension 8, width 64, 1000 steps, float32; a training step is a solve, its gradient and a
step of gradient descent. A captured step is recorded once, forward and backward and the change of the parameters, and replayed
with a single launch; times are medians of wall-clock milliseconds around a synchronised device, all contenders in turns. Without
a GPU there is nothing to measure, and the script says so.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torchdiffeq
from contest import Field, medians, start, tiny
from sizes import Size
from torch import Tensor

import revsolve

SIZE = Size(256, 8, 64, 1000)
ROUNDS, RATE = 7, 1e-3
TIMES = [0.0, 1.0]  # numbers: a tensor on the GPU would have to be read
WAYS = (
    ("rev_rk4", {"gradient": "reversible", "restarts": 32}, 1),  # method, settings, RK4 steps in one of its own
    ("alf4", {"gradient": "reversible", "restarts": 32}, 2.5),
    ("rk4", {"gradient": "checkpoint"}, 1),
    ("rk4", {"gradient": "direct"}, 1),
)
Solve = Callable[[Field, Tensor], Tensor]


def training_step(solve: Solve, field: Field, y0: Tensor) -> None:
    """One step of gradient descent, in place."""
    parameters = list(field.parameters())
    grads = torch.autograd.grad(solve(field, y0).square().mean(), parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, list(grads), alpha=-RATE)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same step from a graph; captured after a warm-up on a stream of its own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def synchronised(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def solves(size: Size) -> dict[str, Solve]:
    found: dict[str, Solve] = {}
    for method, settings, longer in WAYS:
        options = {"step_size": longer / size.num_steps}
        solve = partial(revsolve.odeint, t=TIMES, method=method, options=options, **settings)
        found[f"revsolve {method}, {settings['gradient']}"] = lambda field, y0, solve=solve: solve(field, y0)[-1]
    t, options = torch.tensor(TIMES, device="cuda"), {"step_size": 1.0 / size.num_steps}
    found["torchdiffeq rk4, backprop"] = lambda field, y0: torchdiffeq.odeint(
        field, y0, t, method="rk4", options=options
    )[-1]
    return found


def contenders(size: Size) -> dict[str, Callable[[], float]]:
    """Every solve, launch by launch and from a graph where it can be captured."""
    turns: dict[str, Callable[[], float]] = {}
    y0 = torch.randn(size.batch, size.dimension, device="cuda")
    for name, solve in solves(size).items():
        step = partial(training_step, solve, Field(size).cuda(), y0)
        turns[name] = partial(synchronised, step)
        if name.startswith("revsolve"):  # torchdiffeq compares times on the GPU, which a capture cannot read
            turns[f"{name}, graph"] = partial(synchronised, captured(step))
    return turns


def main() -> None:
    start()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing was measured.")
        return
    size = SIZE._replace(num_steps=10) if tiny() else SIZE
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    taken = medians(contenders(size), ROUNDS)
    theirs = taken["torchdiffeq rk4, backprop"]
    print("| training step | ms | times as fast as torchdiffeq |\n|---|---|---|")
    for name, ms in taken.items():
        print(f"| {name} | {ms:.1f} | {theirs / ms:.2f} |")


if __name__ == "__main__":
    main()
