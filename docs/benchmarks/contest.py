"""What the benchmarks share: contenders that take turns, the sizes of the problems and their field.

Every script runs on one thread of one processor and takes `--tiny`, with which it shrinks to a second or so: its numbers mean
nothing then.
"""

import gc
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from sizes import Size
from torch import Tensor, nn

Name = TypeVar("Name", bound=Hashable)
MEMORY = str(Path(__file__).parents[2] / "tests" / "memory.py")


def tiny() -> bool:
    """Whether this run only shows that the script works."""
    return "--tiny" in sys.argv


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of processor time, which other programs on the machine lengthen least."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def medians(contenders: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, float]:
    """Median of what each returns, after a first call that does not count; they take turns, so that a busy moment hits all."""
    taken: dict[Name, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(1 if tiny() else rounds):
        for name, run in contenders.items():
            taken[name].append(run())
    return {name: statistics.median(times) for name, times in taken.items()}


def milliseconds(contenders: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, float]:
    """Median processor time of each."""
    return medians({name: partial(timed, call) for name, call in contenders.items()}, rounds)


def most_held(run: Callable[[], object]) -> int:
    """The most bytes that torch allocates at once during a run, counted as the tests do; their profiler takes a second."""
    if tiny():
        run()
        return 0
    gc.collect()
    return runpy.run_path(MEMORY)["most_held"](run)


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


def start() -> None:
    """One thread on one processor, and the same numbers every time. On two, JAX takes twice the time of both for a small solve:
    threads of its own wait for each other, busily."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
