"""Reversible against checkpointed gradients at batch 1000: `python docs/benchmarks/large_batch.py`.

Both modes evaluate the field a countable number of times, forward and backward, and no more than the ratio of these counts
should lie between their times, however large the batch (what is undone must not cost what is saved). A network with two hidden
layers of width 64 as field, batch 1000, dimension 8, 40 RK4 steps, float32, one thread; medians of processor time in turns.
"""

from functools import partial

import torch
from contest import Field, milliseconds, start, tiny
from sizes import Size

from revsolve import odeint

SIZE = Size(2, 2, 4, 4) if tiny() else Size(1000, 8, 64, 40)
ROUNDS = 15
AGAINST = (("rev_rk4", "rk4"), ("rev_rk4", "rev_rk4"), ("alf4", "alf4"), ("reversible_heun", "reversible_heun"))


def gradient(field: Field, y0: torch.Tensor, method: str, mode: str) -> int:
    """Takes one, and returns how many times the field was called."""
    field.num_calls = 0
    end = odeint(field, y0, [0.0, 1.0], method=method, gradient=mode, options={"step_size": 1.0 / SIZE.num_steps})[-1]
    torch.autograd.grad(end.sum(), [y0, *field.parameters()])
    return field.num_calls


def main() -> None:
    start()
    field, y0 = Field(SIZE), torch.randn(SIZE.batch, SIZE.dimension, requires_grad=True)
    print("| reversible | checkpoint | field calls | their ratio | ms | their ratio |\n|---|---|---|---|---|---|")
    for ours, other in AGAINST:
        calls = {
            mode: partial(gradient, field, y0, m, mode) for m, mode in ((ours, "reversible"), (other, "checkpoint"))
        }
        (a, b), (s, t) = (call() for call in calls.values()), milliseconds(calls, ROUNDS).values()
        print(f"| {ours} | {other} | {a}, {b} | {a / b:.2f} | {s:.1f}, {t:.1f} | {s / t:.2f} |", flush=True)


if __name__ == "__main__":
    main()
