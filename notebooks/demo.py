"""Demo: a neural ODE learns the lynx and hare cycle, and the ways to its gradient are compared over long horizons.

The model is y' = f(y) with y the standardised logarithm of the yearly pelts and f a small network; the initial state is
learned with it. The comparison differentiates where 50 neighbouring states end after 20 to 500 years. The plot is saved as
build/demo.png.
"""

import contextlib
import csv
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor, nn
from tqdm import tqdm

from revsolve import odeint

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "figures"))
from meter import Meter  # noqa: E402

RECORD = Path(__file__).parent / "data" / "lynx_hare.csv"
PLOT = ROOT / "build" / "demo.png"

STEP = 0.5  # years
# Values that each stage of the training fits, and its iterations: a fit of both cycles from the start settles on their
# mean.
STAGES = ((11, 100), (21, 130))
HORIZONS = (20, 50, 100, 200, 500)  # years
SHOWN = (20, 100, 500)  # those of the table
NEIGHBOURS = 50
MODES = ("reversible", "checkpoint", "direct", "continuous adjoint")


def load_record() -> tuple[Tensor, Tensor]:
    """Years (21,) and pelts in thousands (21, 2), hare first."""
    with RECORD.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))[1:]
    table = torch.tensor([[float(number) for number in row] for row in rows], dtype=torch.float64)
    return table[:, 0], table[:, 1:]


class Model(nn.Module):
    """Initial state (2,) and field of the neural ODE."""

    def __init__(self, y0: Tensor, width: int = 32) -> None:
        super().__init__()
        self.y0 = nn.Parameter(y0.clone())
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).to(y0.dtype)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self.network(y)

    def forward(self, t: Tensor, gradient: str = "reversible", y0: Tensor | None = None) -> Tensor:
        """States at the times t, (len(t), 2)."""
        options = {"step_size": STEP}
        y0 = self.y0 if y0 is None else y0
        return odeint(self.field, y0, t, method="rev_rk4", options=options, gradient=gradient)

    def torchdiffeq(self, t: Tensor, solve: Callable[..., Tensor], y0: Tensor) -> Tensor:
        """The same by torchdiffeq, with a Runge-Kutta method of the same order and the same steps."""
        parameters = {} if solve is torchdiffeq.odeint else {"adjoint_params": tuple(self.network.parameters())}
        return solve(self.field, y0, t, method="rk4", options={"step_size": STEP}, **parameters)


def train(model: Model, t: Tensor, y: Tensor) -> list[float]:
    """Fit a growing part of the record; the loss of every iteration."""
    losses = []
    with tqdm(total=sum(n for _, n in STAGES), desc="training", unit="it", disable=None) as bar:  # None: terminals only
        for length, iterations in STAGES:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-3)
            for _ in range(iterations):
                optimizer.zero_grad()
                loss = (model(t[:length]) - y[:length]).square().mean()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(years=length - 1, loss=f"{losses[-1]:.4f}")
                bar.update()
    return losses


def end(model: Model, years: float, mode: str) -> Tensor:
    """The last states of a solve over so many years, differentiable in the way that `mode` names."""
    t = torch.tensor([0.0, years], dtype=torch.float64)
    y0 = model.y0 + 0.05 * torch.randn(NEIGHBOURS, 2, dtype=t.dtype, generator=torch.Generator().manual_seed(0))
    theirs = {"continuous adjoint": torchdiffeq.odeint_adjoint, "torchdiffeq, direct": torchdiffeq.odeint}
    return (model.torchdiffeq(t, theirs[mode], y0) if mode in theirs else model(t, mode, y0))[-1]


def gradient(model: Model, years: float, mode: str) -> Tensor:
    """Of the mean squared last state with respect to all parameters, as one vector."""
    found = torch.autograd.grad(end(model, years, mode).square().mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def live_tensors() -> dict[int, int]:
    """The storages of all tensors, and how many numbers each holds."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            with contextlib.suppress(RuntimeError):  # a wrapper of torch.func has no memory of its own
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes() // 8
    return found


def numbers_held(model: Model, years: float, mode: str) -> int:
    """The most numbers that are held for a gradient, parameters left out.

    After the forward pass, all that came to life; in the backward pass, also what autograd saves then.
    """
    before, meter = live_tensors(), Meter(model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda packed: packed[0]):
        y = end(model, years, mode)
        kept, saved = live_tensors(), meter.held
        torch.autograd.grad(y.square().mean(), list(model.parameters()))
    return sum(size for pointer, size in kept.items() if pointer not in before) + meter.peak - saved


@dataclass(frozen=True)
class Result:
    """One way to a gradient over one horizon; the error is relative to backpropagation through the same steps."""

    years: int
    mode: str
    error: float
    numbers: int
    seconds: float

    @property
    def num_steps(self) -> int:
        return round(self.years / STEP)


def compare(model: Model, horizons: tuple[int, ...] = HORIZONS) -> list[Result]:
    results = []
    for years in horizons:
        exact = {mode: gradient(model, years, mode) for mode in ("direct", "torchdiffeq, direct")}
        for mode in MODES:
            start = time.perf_counter()
            found = gradient(model, years, mode)
            seconds = time.perf_counter() - start
            wanted = exact["torchdiffeq, direct" if mode == "continuous adjoint" else "direct"]
            error = float((found - wanted).norm() / wanted.norm())
            results.append(Result(years, mode, error, numbers_held(model, years, mode), seconds))
    return results


def print_table(results: list[Result]) -> None:
    print(f"\n{'steps':>5}  {'gradient':<20}{'its error':>10}{'values stored':>14}{'seconds':>9}")
    for result in results:
        if result.years in SHOWN:
            print(
                f"{result.num_steps:>5}  {result.mode:<20}{result.error:>10.0e}{result.numbers:>14,}{result.seconds:>9.2f}"
            )
    print("error relative to backpropagation through the same steps; values stored at most, parameters left out")


def save_plot(years: Tensor, pelts: Tensor, fit_years: Tensor, fit: Tensor, results: list[Result]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt  # the backend has to be chosen first

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for column, (name, colour) in enumerate([("hare", "tab:blue"), ("lynx", "tab:orange")]):
        left.plot(years, pelts[:, column], "o", color=colour)
        left.plot(fit_years, fit[:, column], color=colour)
        left.text(20.3 + years[0], fit[-1, column], name, color=colour, va="center")
    left.set(xlabel="year", title="pelts, thousands: record and neural ODE", xticks=range(1900, 1921, 5))
    for mode, colour in zip(MODES, ("tab:blue", "tab:green", "tab:orange", "tab:red"), strict=True):
        found = [result for result in results if result.mode == mode]
        steps = [result.num_steps for result in found]
        middle.loglog(steps, [result.numbers for result in found], "o-", color=colour, markersize=3)
        middle.text(1.15 * steps[-1], found[-1].numbers, mode.replace(" ", "\n"), color=colour, va="center")
        if mode in ("reversible", "continuous adjoint"):
            right.loglog(steps, [result.error for result in found], "o-", color=colour, markersize=3)
            right.text(1.15 * steps[-1], found[-1].error, mode.replace(" ", "\n"), color=colour, va="center")
    middle.set(xlabel="steps", title="values stored for one gradient")
    right.set(xlabel="steps", title="relative error of the gradient")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def trained() -> tuple[Model, list[float], tuple[Tensor, Tensor]]:
    """The model, its losses, and mean and deviation of the logarithms."""
    torch.manual_seed(0)
    years, pelts = load_record()
    mean, deviation = pelts.log().mean(0), pelts.log().std(0)
    y = (pelts.log() - mean) / deviation
    model = Model(y[0])
    return model, train(model, years - years[0], y), (mean, deviation)


def main() -> None:
    torch.set_num_threads(1)  # such small tensors are slower on several
    start = time.perf_counter()
    model, losses, (mean, deviation) = trained()
    years, pelts = load_record()
    print(f"trained for {len(losses)} iterations: mean square error {losses[0]:.2f} -> {losses[-1]:.2f}")
    results = compare(model)
    print_table(results)
    t_fine = torch.linspace(0, 20, 201, dtype=torch.float64)
    with torch.no_grad():
        fit = (model(t_fine) * deviation + mean).exp()
    save_plot(years, pelts, t_fine + years[0], fit, results)
    print(f"\nThe plot is {PLOT.relative_to(ROOT)}; all of it took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
