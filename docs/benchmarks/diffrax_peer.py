"""diffrax, and a reversible pair in JAX: `build/peer-jax/bin/python docs/benchmarks/diffrax_peer.py`, started by `peers.py`.

The gradient of a solve with RK4 steps through a network with two hidden layers, compiled by XLA, float32, one thread. diffrax
has no RK4, so its tableau is given here, and no reversible solver for ODEs with an exact gradient in a release, so the pair of
McCallum & Foster (2024), coupling 1, is written twice: as a solver of diffrax over its RK4, whose steps are undone in a scan, and
as two bare scans, which know nothing but these steps. With `--serve` it takes lines with the numbers of a size and a
contender, and answers each with the milliseconds of processor time of one gradient: `peers.py` makes it take turns with PyTorch.
For `ensembles.py` there are ensembles of Lorenz systems, of which it also tells the bytes that XLA's program needs.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, ClassVar

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import diffrax
import jax
import numpy as np
from jax import numpy as jnp
from sizes import SIZES, Size

Parameters = list[tuple[jax.Array, jax.Array]]  # weight and bias of every layer
State = jax.Array
ROUNDS = 15


class RK4(diffrax.AbstractERK):
    """The classical method; diffrax wants an error estimate, which constant steps ignore."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1.0, 2.0, 2.0, 1.0]) / 6,
        b_error=np.array([1.0, -1.0, -1.0, 1.0]) / 6,
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


def field(t: Any, y: State, parameters: Parameters) -> State:
    for weight, bias in parameters[:-1]:
        y = jnp.tanh(y @ weight + bias)
    weight, bias = parameters[-1]
    return y @ weight + bias


def increment(t0: Any, t1: Any, y: State, parameters: Parameters) -> State:
    """What a step of RK4 adds."""
    h = t1 - t0
    k1 = field(t0, y, parameters)
    k2 = field(t0 + h / 2, y + h / 2 * k1, parameters)
    k3 = field(t0 + h / 2, y + h / 2 * k2, parameters)
    k4 = field(t1, y + h * k3, parameters)
    return h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def in_steps(solver: Any, y0: State, parameters: Parameters, h: float, n: int, **how: Any) -> diffrax.Solution:
    """What diffrax makes of the steps."""
    times, grid = {"t0": 0.0, "t1": n * h, "dt0": None, "max_steps": n}, jnp.linspace(0.0, n * h, n + 1)
    how = {"args": parameters, "stepsize_controller": diffrax.StepTo(ts=grid), **times, **how}
    return diffrax.diffeqsolve(diffrax.ODETerm(field), solver, y0=y0, **how)


def diffrax_solve(adjoint: diffrax.AbstractAdjoint, *problem: Any) -> State:
    return in_steps(RK4(), *problem, adjoint=adjoint).ys[-1]


class Pair(diffrax.AbstractSolver):
    """The reversible pair over a solver of diffrax, as one of its solvers; z is what it calls the state of the solver."""

    inner: diffrax.AbstractSolver
    term_structure: ClassVar[Any] = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        return 4

    def init(self, terms: Any, t0: Any, t1: Any, y0: State, args: Any) -> State:
        return y0

    def func(self, terms: Any, t0: Any, y0: State, args: Any) -> State:
        return terms.vf(t0, y0, args)

    def increment(self, terms: Any, t0: Any, t1: Any, x: State, args: Any) -> State:
        state = self.inner.init(terms, t0, t1, x, args)
        return self.inner.step(terms, t0, t1, x, args, state, made_jump=False)[0] - x

    def step(self, terms: Any, t0: Any, t1: Any, y0: State, args: Any, solver_state: State, made_jump: Any) -> Any:
        y1 = y0 + self.increment(terms, t0, t1, solver_state, args)
        z1 = solver_state - self.increment(terms, t1, t0, y1, args)
        return y1, None, {"y0": y0, "y1": y1}, z1, diffrax.RESULTS.successful


def scanned(y0: State, parameters: Parameters, h: float, num_steps: int) -> tuple[State, State]:
    """The pair after the steps, by a bare scan."""

    def step(pair: tuple[State, State], _: None) -> tuple[tuple[State, State], None]:
        y, z = pair
        y = y + increment(0.0, h, z, parameters)
        return (y, z - increment(h, 0.0, y, parameters)), None

    return jax.lax.scan(step, (y0, y0), length=num_steps)[0]


def solved(y0: State, parameters: Parameters, h: float, num_steps: int) -> tuple[State, State]:
    """The pair after the steps, by diffrax."""
    saved = diffrax.SaveAt(t1=True, solver_state=True)
    found = in_steps(Pair(RK4()), y0, parameters, h, num_steps, saveat=saved)
    return found.ys[-1], found.solver_state


def reversible(ahead: Callable[..., tuple[State, State]], change: Callable[..., State]) -> Callable[..., State]:
    """A solve by the pair, whose gradient undoes the steps; `change` is the increment over t0 -> t1."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
    def solve(y0: State, parameters: Parameters, h: float, num_steps: int) -> State:
        return ahead(y0, parameters, h, num_steps)[0]

    def forward(y0: State, parameters: Parameters, h: float, num_steps: int) -> tuple[State, Any]:
        y, z = ahead(y0, parameters, h, num_steps)
        return y, (y, z, parameters)

    def backward(h: float, num_steps: int, kept: Any, grad_y: State) -> tuple[State, Parameters]:
        y, z, parameters = kept

        def step(carry: Any, t: Any) -> tuple[Any, None]:
            y, z, grad_y, grad_z, grads = carry
            added, vjp = jax.vjp(functools.partial(change, t + h, t), y, parameters)
            more_y, more = vjp(-grad_z)
            z, grad_y, grads = z + added, grad_y + more_y, jax.tree.map(jnp.add, grads, more)
            added, vjp = jax.vjp(functools.partial(change, t, t + h), z, parameters)
            more_z, more = vjp(grad_y)
            return (y - added, z, grad_y, grad_z + more_z, jax.tree.map(jnp.add, grads, more)), None

        carry = (y, z, grad_y, jnp.zeros_like(z), jax.tree.map(jnp.zeros_like, parameters))
        times = jnp.arange(num_steps, dtype=y.dtype) * h
        (_, _, grad_y, grad_z, grads), _ = jax.lax.scan(step, carry, times, reverse=True)
        return grad_y + grad_z, grads

    solve.defvjp(forward, backward)
    return solve


CONTENDERS: dict[str, Callable[..., State]] = {
    "diffrax rk4, checkpointed": functools.partial(diffrax_solve, diffrax.RecursiveCheckpointAdjoint()),
    "diffrax rk4, direct": functools.partial(diffrax_solve, diffrax.DirectAdjoint()),
    "diffrax reversible pair of RK4": reversible(
        solved, functools.partial(Pair(RK4()).increment, diffrax.ODETerm(field))
    ),
    "JAX reversible pair of RK4": reversible(scanned, increment),
}


def lorenz(t: Any, y: State, coefficients: jax.Array) -> State:
    sigma, rho, beta = coefficients
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return jnp.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c], -1)


def adaptive(y0: State, coefficients: jax.Array, h: float, n: int) -> State:
    control = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    span = {"t0": 0.0, "t1": n * h, "dt0": None, "max_steps": 4096}
    how = {"stepsize_controller": control, "adjoint": diffrax.RecursiveCheckpointAdjoint()}
    return diffrax.diffeqsolve(diffrax.ODETerm(lorenz), diffrax.Dopri5(), y0=y0, args=coefficients, **span, **how).ys[
        -1
    ]


def fixed(y0: State, coefficients: jax.Array, h: float, n: int) -> State:
    control = diffrax.StepTo(ts=jnp.linspace(0.0, n * h, n + 1))
    span = {"t0": 0.0, "t1": n * h, "dt0": None, "max_steps": n, "stepsize_controller": control}
    return diffrax.diffeqsolve(diffrax.ODETerm(lorenz), RK4(), y0=y0, args=coefficients, **span).ys[-1]


ENSEMBLES: dict[str, Callable[..., State]] = {
    "diffrax Lorenz fixed": fixed,
    "diffrax Lorenz shared": adaptive,
    "diffrax Lorenz each": jax.vmap(adaptive, in_axes=(0, None, None, None)),
}


class Ensemble:
    """The gradient of an ensemble of Lorenz systems in steps of 0.01, or with their own over that time."""

    def __init__(self, contender: str, size: Size) -> None:
        y0 = 8 * jax.random.normal(jax.random.key(0), (size.batch, 3)) + 1
        loss = lambda *problem: (ENSEMBLES[contender](*problem, 0.01, size.num_steps) ** 2).mean()  # noqa: E731
        self.problem = y0, jnp.array([10.0, 28.0, 8 / 3])
        self.gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*self.problem).compile()
        jax.block_until_ready(self.gradient(*self.problem))

    def milliseconds(self) -> float:
        start = time.process_time()
        jax.block_until_ready(self.gradient(*self.problem))
        return 1e3 * (time.process_time() - start)

    def num_bytes(self) -> int:
        return int(self.gradient.memory_analysis().temp_size_in_bytes)


class Contest:
    """One solve of one size: compiled on first use, then a gradient at each call."""

    def __init__(self, contender: str, size: Size) -> None:
        keys, h = jax.random.split(jax.random.key(0), 4), 1.0 / size.num_steps
        sizes = (size.dimension, size.width, size.width, size.dimension)
        self.parameters = [
            (jax.random.uniform(key, (a, b), minval=-1, maxval=1) / a**0.5, jnp.zeros(b))
            for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
        ]
        self.y0 = jax.random.normal(keys[-1], (size.batch, size.dimension))
        solve = CONTENDERS[contender]
        self.gradient = jax.jit(jax.grad(lambda y0, p: solve(y0, p, h, size.num_steps).sum(), argnums=(0, 1)))
        jax.block_until_ready(self.gradient(self.y0, self.parameters))

    def milliseconds(self) -> float:
        start = time.process_time()
        jax.block_until_ready(self.gradient(self.y0, self.parameters))
        return 1e3 * (time.process_time() - start)


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "diffrax", "equinox"))


@functools.cache
def contest(contender: str, size: Size) -> Any:
    return (Ensemble if contender in ENSEMBLES else Contest)(contender, size)


def serve() -> None:
    print(versions(), flush=True)
    for line in sys.stdin:
        *numbers, contender = line.strip().split(" ", 4)
        asked = contest(contender.removeprefix("bytes of "), Size(*map(int, numbers)))
        print(asked.num_bytes() if contender.startswith("bytes of ") else asked.milliseconds(), flush=True)


def main() -> None:
    print(versions(), "\n")
    print("| | " + " | ".join(f"{name}, ms" for name in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name in CONTENDERS:
        contests = [Contest(name, size) for size in SIZES.values()]
        medians = [statistics.median(contest.milliseconds() for _ in range(ROUNDS)) for contest in contests]
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in medians) + " |", flush=True)


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
