"""Error and memory of a gradient against the number of steps: `python docs/benchmarks/horizon.py`.

The neural ODE of `notebooks/demo.py`, trained on the lynx and hare record, carries 50 neighbouring states over 20 to 500 years in
steps of half a year, and the mean square of the last states is differentiated. The error of the gradient is relative to
backpropagation through the same steps. "held" is the most numbers that are alive for the gradient at any time, parameters left
out. The continuous adjoint is `torchdiffeq.odeint_adjoint`; the other three are revsolve's `rev_rk4`.
"""

import sys
from pathlib import Path

import torch
from contest import start, tiny

sys.path.append(str(Path(__file__).parents[2] / "notebooks"))
import demo


def main() -> None:
    start()
    model = demo.Model(torch.ones(2, dtype=torch.float64)) if tiny() else demo.trained()[0]
    results = demo.compare(model, (1, 2) if tiny() else demo.HORIZONS)
    print("| steps | gradient | its error | held |\n|---|---|---|---|")
    for r in results:
        print(f"| {r.num_steps:,} | {r.mode} | {r.error:.0e} | {r.numbers:,} |", flush=True)


if __name__ == "__main__":
    main()
