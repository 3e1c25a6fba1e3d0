"""`make demo`: a neural ODE learns the lynx and hare cycle, and the three gradient modes are compared on it.

The model is y' = f(y) with y the standardised logarithm of the yearly pelts and f a small network; the initial state is
learned with it. The plot is saved as build/demo.png.
"""

import csv
import gc
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

from revsolve import odeint

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "data" / "lynx_hare.csv"
PLOT = ROOT / "build" / "demo.png"

STEP = 0.5  # years; the comparison repeats it at a tenth
# Values that each stage of the training fits, and its iterations: a fit of both cycles from the start settles on their
# mean.
STAGES = ((11, 150), (21, 250))


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
        self.step = STEP
        self.y0 = nn.Parameter(y0.clone())
        self.field = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).to(y0.dtype)

    def forward(self, t: Tensor, gradient: str = "reversible") -> Tensor:
        """States at the times t, (len(t), 2)."""
        return odeint(
            lambda _, y: self.field(y),
            self.y0,
            t,
            method="rev_rk4",
            options={"step_size": self.step},
            gradient=gradient,
        )


def mean_square(model: Model, t: Tensor, y: Tensor, gradient: str = "reversible") -> Tensor:
    return (model(t, gradient) - y).square().mean()


def train(model: Model, t: Tensor, y: Tensor) -> list[float]:
    """Fit a growing part of the record; the loss of every iteration."""
    losses = []
    with tqdm(total=sum(iterations for _, iterations in STAGES), desc="training", unit="it") as bar:
        for length, iterations in STAGES:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-3)
            for _ in range(iterations):
                optimizer.zero_grad()
                loss = mean_square(model, t[:length], y[:length])
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(years=length - 1, loss=f"{losses[-1]:.4f}")
                bar.update()
    return losses


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def numbers_kept(model: Model, t: Tensor, y: Tensor, gradient: str) -> int:
    """How many numbers a loss holds for its backward pass.

    What autograd saved, and every other tensor that came to life: hooks do not see what the engine keeps by itself.
    """
    before = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        loss = mean_square(model, t, y, gradient)
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.element_size()
        for tensor in [*saved, *live_tensors()]
    }
    loss.backward()
    return sum(size for pointer, size in sizes.items() if pointer not in before)


def gradient_and_seconds(model: Model, t: Tensor, y: Tensor, gradient: str) -> tuple[Tensor, float]:
    """All gradients as one vector, and the shortest of three times for forward and backward."""
    seconds = []
    for _ in range(3):
        model.zero_grad()
        start = time.perf_counter()
        mean_square(model, t, y, gradient).backward()
        seconds.append(time.perf_counter() - start)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), min(seconds)


def print_comparison(model: Model, t: Tensor, y: Tensor) -> None:
    reference, _ = gradient_and_seconds(model, t, y, "direct")
    for mode in ("reversible", "checkpoint", "direct"):
        found, seconds = gradient_and_seconds(model, t, y, mode)
        difference = ((found - reference).norm() / reference.norm()).item()
        num_steps = round((t[-1] - t[0]).item() / model.step)
        print(f"{num_steps:>5}  {mode:<12}{difference:>12.1e}{numbers_kept(model, t, y, mode):>16,}{seconds:>10.3f}")


def save_plot(years: Tensor, pelts: Tensor, fit_years: Tensor, fit: Tensor, losses: list[float]) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot as plt  # the backend has to be chosen first

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[3, 2], layout="constrained")
    for column, (name, colour) in enumerate([("hare", "tab:blue"), ("lynx", "tab:orange")]):
        left.plot(years, pelts[:, column], "o", color=colour, label=f"{name}, record")
        left.plot(fit_years, fit[:, column], color=colour, label=f"{name}, neural ODE")
    left.set(xlabel="year", ylabel="pelts (thousands)", title="Hudson Bay Company", xticks=range(1900, 1921, 5))
    left.legend(fontsize="small")
    right.semilogy(losses, color="black", linewidth=1)
    right.set(
        xlabel="iteration", ylabel="mean square error (standardised log)", title="Loss, fitting 10, then 20 years"
    )
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def main() -> None:
    torch.manual_seed(0)
    years, pelts = load_record()
    t = years - years[0]
    mean, deviation = pelts.log().mean(0), pelts.log().std(0)
    y = (pelts.log() - mean) / deviation

    start = time.perf_counter()
    model = Model(y[0])
    losses = train(model, t, y)
    print(
        f"mean square error of the standardised log: {y.square().mean():.3f} (predicting the mean) -> {losses[-1]:.3f}"
    )
    print(f"\n{'steps':>5}  {'gradient':<12}{'difference':>12}{'numbers kept':>16}{'seconds':>10}")
    for model.step in (STEP, STEP / 10):
        print_comparison(model, t, y)
    print("difference of the gradient, relative to direct; numbers kept for backward, besides parameters and data")

    t_fine = torch.linspace(0, 20, 201, dtype=torch.float64)
    with torch.no_grad():
        fit = (model(t_fine) * deviation + mean).exp()
    save_plot(years, pelts, t_fine + years[0], fit, losses)
    print(f"\nThe plot is {PLOT.relative_to(ROOT)}; all of it took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
