"""diffrax, and a reversible pair in JAX: `build/peer-jax/bin/python docs/benchmarks/diffrax_peer.py`, started by `peers.py`.

The gradient of a solve with RK4 steps through a network with two hidden layers, compiled by XLA, float32, one thread. diffrax
has no RK4, so its tableau is given here, and no reversible solver for ODEs with an exact gradient in a release, so the pair of
McCallum & Foster (2024), coupling 1, is written as two scans. With `--serve` it takes lines with the numbers of a size and a
contender, and answers each with the milliseconds of processor time of one gradient: `peers.py` makes it take turns with PyTorch.
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


def increment(y: State, h: float, parameters: Parameters) -> State:
    """What a step of RK4 adds."""
    k1 = field(0.0, y, parameters)
    k2 = field(0.0, y + h / 2 * k1, parameters)
    k3 = field(0.0, y + h / 2 * k2, parameters)
    k4 = field(0.0, y + h * k3, parameters)
    return h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def reversible(y0: State, parameters: Parameters, h: float, num_steps: int) -> State:
    return _forward(y0, parameters, h, num_steps)[0]


def _forward(y0: State, parameters: Parameters, h: float, num_steps: int) -> tuple[State, Any]:
    def step(pair: tuple[State, State], _: None) -> tuple[tuple[State, State], None]:
        y, z = pair
        y = y + increment(z, h, parameters)
        return (y, z - increment(y, -h, parameters)), None

    (y, z), _ = jax.lax.scan(step, (y0, y0), length=num_steps)
    return y, (y, z, parameters)


def _backward(h: float, num_steps: int, kept: Any, grad_y: State) -> tuple[State, Parameters]:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        y, z, grad_y, grad_z, grads = carry
        added, vjp = jax.vjp(lambda y, p: increment(y, -h, p), y, parameters)
        more_y, more = vjp(-grad_z)
        z, grad_y, grads = z + added, grad_y + more_y, jax.tree.map(jnp.add, grads, more)
        added, vjp = jax.vjp(lambda z, p: increment(z, h, p), z, parameters)
        more_z, more = vjp(grad_y)
        return (y - added, z, grad_y, grad_z + more_z, jax.tree.map(jnp.add, grads, more)), None

    y, z, parameters = kept
    carry = (y, z, grad_y, jnp.zeros_like(z), jax.tree.map(jnp.zeros_like, parameters))
    (_, _, grad_y, grad_z, grads), _ = jax.lax.scan(step, carry, length=num_steps)
    return grad_y + grad_z, grads


reversible.defvjp(_forward, _backward)


def diffrax_solve(adjoint: diffrax.AbstractAdjoint, y0: State, parameters: Parameters, h: float, n: int) -> State:
    term, times = diffrax.ODETerm(field), {"t0": 0.0, "t1": n * h, "dt0": None, "max_steps": n}
    grid = diffrax.StepTo(ts=jnp.linspace(0.0, n * h, n + 1))
    return diffrax.diffeqsolve(
        term, RK4(), y0=y0, args=parameters, stepsize_controller=grid, adjoint=adjoint, **times
    ).ys[-1]


CONTENDERS: dict[str, Callable[..., State]] = {
    "diffrax rk4, checkpointed": functools.partial(diffrax_solve, diffrax.RecursiveCheckpointAdjoint()),
    "diffrax rk4, direct": functools.partial(diffrax_solve, diffrax.DirectAdjoint()),
    "JAX reversible pair of RK4": reversible,
}


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


def serve() -> None:
    contests: dict[str, Contest] = {}
    print(versions(), flush=True)
    for line in sys.stdin:
        *numbers, contender = line.strip().split(" ", 4)
        if line not in contests:
            contests[line] = Contest(contender, Size(*map(int, numbers)))
        print(contests[line].milliseconds(), flush=True)


def main() -> None:
    print(versions(), "\n")
    print("| | " + " | ".join(f"{name}, ms" for name in SIZES) + " |\n|---|" + "---|" * len(SIZES))
    for name in CONTENDERS:
        contests = [Contest(name, size) for size in SIZES.values()]
        medians = [statistics.median(contest.milliseconds() for _ in range(ROUNDS)) for contest in contests]
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in medians) + " |", flush=True)


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
