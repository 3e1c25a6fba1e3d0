"""The figure of the page on events; it asserts what its caption says."""

import torch
from style import BLUE, GREEN, INK, ORANGE, RED, key, panels, save
from torch import Tensor

from revsolve import odeint, odeint_event

GRAVITY = 9.81
HEARD = torch.tensor([0.5530, 1.4378, 2.1456, 2.7119], dtype=torch.float64)


def fall(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], torch.full_like(y[1], -GRAVITY)])


def flight(guess: Tensor, count: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The times of the first bounces, and the (times, heights) of the flights before them."""
    height, restitution = guess
    t, y = torch.tensor(0.0, dtype=torch.float64), torch.stack([height, torch.zeros_like(height)])
    times, flights = [], []
    for _ in range(count):
        end, ys = odeint_event(fall, y, t, event_fn=lambda t, y: y[0])
        s = torch.linspace(float(t.detach()), float(end.detach()), 40, dtype=torch.float64)
        flights.append((s, odeint(fall, y, s)[:, 0].detach()))
        t, y = end, torch.stack([torch.zeros_like(height), -restitution * ys[1, 1]])
        times.append(t)
    return torch.stack(times), flights


def bouncing_ball() -> None:
    """Height over time for the guesses of a Gauss-Newton iteration that fits the times of four bounces."""
    figure, (axes,) = panels(1, 3.6)
    guess = torch.tensor([1.0, 0.6], dtype=torch.float64)
    for number, colour in enumerate((INK, ORANGE, GREEN, BLUE)):
        times, flights = flight(guess, len(HEARD))
        for s, heights in flights:
            axes.plot(s, heights, color=colour, linewidth=2 if number == 3 else 1.2)
        slope = torch.autograd.functional.jacobian(lambda x: flight(x, len(HEARD))[0], guess)
        guess = guess + torch.linalg.lstsq(slope, HEARD - times).solution
    axes.plot(HEARD, torch.zeros(4), "v", color=RED, zorder=5)
    axes.set(xlabel="time (s)", title="height (m)", ylim=(-0.05, None))
    names = {"first guess": INK, "step 1": ORANGE, "step 2": GREEN, "step 3": BLUE, "bounces heard": RED}
    key(axes, names, 0.68, 1.0, 0.09)
    assert float((times - HEARD).abs().max()) < 1e-3
    save(figure, "bouncing_ball")


if __name__ == "__main__":
    bouncing_ball()
