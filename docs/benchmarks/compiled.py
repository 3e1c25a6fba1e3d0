"""Compiled solves beside eager ones and JAX, and what compiling takes: `python docs/benchmarks/compiled.py`.

Milliseconds of processor time of one gradient, as in `peers.py`, in the steps of RK4 that are stated for each size, whatever the
method: medians of rounds in which all contenders take turns, also in multiples of what the pair as a solver of diffrax takes,
which knows no restarts: the same steps without them are `restarts=None`.
Then seconds until the first gradient is there, on all processors, in a new process that has imported torch: with nothing compiled
before on this machine ("cold"), another size with what the first one left, and the first one again from inductor's cache on disk
("warm").
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
from contest import Field, medians, start, timed, tiny
from peers import JAX, Worker, gradient
from sizes import SIZES, Size

import revsolve

METHODS = ("rev_rk4", "alf4", "reversible_heun", "rk4")
IN_JAX = ("diffrax reversible pair of RK4", "JAX reversible pair of RK4")
ROUNDS = {"tiny": 100, "small": 9, "large": 3}
PROGRAMS = {"backend": "eager"} if tiny() else True


def times(name: str, size: Size, jax: Worker | None) -> dict[str, float]:
    field, calls = Field(size), {}
    for method in METHODS:
        for label, programs in (("eager", False), ("compiled", PROGRAMS)):
            solve = partial(revsolve.odeint, method=method, compile=programs)
            calls[f"{method}, {label}"] = partial(timed, partial(gradient, solve, field, size, size.num_steps))
    for restarts in (32, None):
        solve = partial(revsolve.odeint, method="rev_rk4", compile=PROGRAMS, restarts=restarts)
        calls[f"rev_rk4, compiled, {restarts=}"] = partial(timed, partial(gradient, solve, field, size, size.num_steps))
    calls |= {} if jax is None else {contender: partial(jax, size, contender) for contender in IN_JAX}
    return medians(calls, ROUNDS.get(name, 1))


def first_gradient(name: str) -> None:
    """Print the seconds that it takes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    size = SIZES[name]
    field, solve, begin = Field(size), partial(revsolve.odeint, method="rev_rk4", compile=True), time.perf_counter()
    gradient(solve, field, size, size.num_steps)
    print(time.perf_counter() - begin)


def starts() -> None:
    print("\n| a first gradient of rev_rk4 | seconds |\n|---|---|")
    rows = ("tiny, cold", "tiny", "a"), ("small, after that", "small", "a"), ("tiny, warm", "tiny", "a")
    with tempfile.TemporaryDirectory() as folder:
        for label, name, cache in (*rows, ("tiny, cold but for the header of all programs", "tiny", "b")):
            places = {"TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{cache}"}  # the header lies in the former
            command = [sys.executable, __file__, "--first", name]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places}, check=True)
            print(f"| {label} | {float(done.stdout):.1f} |", flush=True)


def main() -> None:
    start()
    if "--first" in sys.argv:
        return first_gradient(sys.argv[-1])
    sizes = {"tiny": Size(1, 2, 4, 5)} if tiny() else SIZES
    jax = Worker(JAX) if JAX.exists() and not tiny() else None
    for name, size in sizes.items():
        print(f"{name}: batch {size.batch}, dimension {size.dimension}, width {size.width}, {size.num_steps} steps")
    print(jax.versions if jax is not None else "JAX and diffrax are not installed (make bench makes their environment)")
    taken = {name: times(name, size, jax) for name, size in sizes.items()}
    print(
        "\n| gradient, ms | "
        + " | ".join(f"{name} | / diffrax" for name in sizes)
        + " |\n|---|"
        + "---|---|" * len(sizes)
    )
    for contender in next(iter(taken.values())):
        cells = [(row[contender], row[contender] / row.get(IN_JAX[0], torch.nan)) for row in taken.values()]
        print(f"| {contender} | " + " | ".join(f"{ms:.3g} | {ratio:.2f}" for ms, ratio in cells) + " |")
    if not tiny():
        starts()


if __name__ == "__main__":
    main()
