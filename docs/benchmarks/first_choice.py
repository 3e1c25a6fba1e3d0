"""What a first choice costs: `python docs/benchmarks/first_choice.py`.

A smooth neural field (two hidden layers of width 64, weights twice those of torch, batch 128, dimension 2, 30 units of time,
float32, one thread). The mean square of the last state is differentiated with respect to the parameters; errors are relative,
against steps of order 8 with a tolerance of 1e-10 in float64. All but two rows have rtol=1e-4 and atol=1e-6. "stored" is the
most that is alive for the gradient at any time, forward or backward, parameters left out. Times are medians of processor time
of rounds in which all take turns.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from contest import Field, milliseconds, start, tiny
from sizes import Size
from torch import Tensor

import revsolve

sys.path.append(str(Path(__file__).parents[1] / "figures"))
from meter import Meter

SIZE, DURATION, GAIN, ROUNDS = Size(128, 2, 64, 0), 30.0, 2.0, 5
TOLERANCES = {"rtol": 1e-4, "atol": 1e-6}
CHOICES: Mapping[str, dict[str, Any]] = {
    '`method="tsit5", gradient="direct"`': {"method": "tsit5", "gradient": "direct", **TOLERANCES},
    '`method="tsit5"`': {"method": "tsit5", **TOLERANCES},
    '`method="reversible_heun4"`': {"method": "reversible_heun4", **TOLERANCES},
    '`method="rev_dopri5"`': {"method": "rev_dopri5", **TOLERANCES},
    "the default, with the tolerance of float32": {},
    '`method="reversible_heun"`, 300 steps': {"method": "reversible_heun", "options": {"step_size": DURATION / 300}},
    "torchdiffeq, dopri5, backpropagation": {"solve": torchdiffeq.odeint, "method": "dopri5", **TOLERANCES},
    "torchdiffeq, dopri5, adjoint": {"solve": torchdiffeq.odeint_adjoint, "method": "dopri5", **TOLERANCES},
}


def gradient(field: Field, y0: Tensor, solve: Any = revsolve.odeint, **settings: Any) -> Tensor:
    t = torch.tensor([0.0, 1.0 if tiny() else DURATION], dtype=y0.dtype)
    end = solve(field, y0, t, **settings)[-1]
    grads = torch.autograd.grad(end.square().mean(), [*field.parameters()])
    return torch.cat([g.flatten() for g in grads]).double()


def stored(field: Field, y0: Tensor, settings: dict[str, Any]) -> float:
    meter = Meter([*field.parameters(), y0])
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda packed: packed[0]):
        gradient(field, y0, **settings)
    return meter.peak * y0.element_size() / 1e6


def main() -> None:
    start()
    field, y0 = Field(SIZE), torch.randn(SIZE.batch, SIZE.dimension)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(GAIN)
    exact = gradient(field.double(), y0.double(), method="dopri8", rtol=1e-10, atol=1e-12)
    field.float()
    taken = milliseconds({name: partial(gradient, field, y0, **by) for name, by in CHOICES.items()}, ROUNDS)
    print("| choice | error of the gradient | ms | stored, MB |\n|---|---|---|---|")
    for name, by in CHOICES.items():
        error = float((gradient(field, y0, **by) - exact).norm() / exact.norm())
        print(f"| {name} | {error:.0e} | {taken[name]:.0f} | {stored(field, y0, by):.2f} |")


if __name__ == "__main__":
    main()
