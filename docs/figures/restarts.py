"""How restarts decide: the gap between y and z over a relaxation oscillation, what it may be, and where segments end."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from style import BLUE, INK, ORANGE, key, panels, save
from torch import Tensor

from revsolve import odeint
from revsolve.restarts.growth import Growth

STEP, END = 0.05, 12.0


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]])


@contextmanager
def watched(seen: list[tuple[int, int, float, float]]) -> Iterator[None]:
    """Collects (start of the segment, steps taken, gap, what it may be) of every look."""
    further = Growth._further

    def look(self: Growth, taken: int, gap: float, allowed: float) -> int:
        seen.append((self.start, taken, gap, allowed))
        return further(self, taken, gap, allowed)

    Growth._further = look  # type: ignore[method-assign]
    yield
    Growth._further = further  # type: ignore[method-assign]


def restarts() -> None:
    seen: list[tuple[int, int, float, float]] = []
    y0, t = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.linspace(0.0, END, 241, dtype=torch.float64)
    with watched(seen):
        ys = odeint(van_der_pol, y0, t, method="rev_rk4", options={"step_size": STEP})
    figure, (top, below) = panels(2, 5.2, sharex=True, height_ratios=(1, 2))
    top.plot(t, ys[:, 0], color=INK)
    top.set(title="y")
    starts = sorted({start for start, *_ in seen})
    for start in starts:
        looks = [look for look in seen if look[0] == start]
        steps = [STEP * (start + taken) for _, taken, *_ in looks]
        below.semilogy(steps, [look[2] for look in looks], "o-", color=BLUE, markersize=3)
        below.semilogy(steps, [look[3] for look in looks], color=ORANGE, linewidth=1)
        below.axvline(STEP * start, color=INK, linewidth=0.4, alpha=0.6)
    below.set(xlabel="t; a line where a segment begins", title="gap, in units of the largest y")
    key(below, {"gap": BLUE, "its limit": ORANGE}, 0.25, 0.98)
    save(figure, "restarts")


if __name__ == "__main__":
    restarts()
