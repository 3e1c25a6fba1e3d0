"""Dense output: the solution between the accepted steps, as a piecewise polynomial through states and field values.

Between two steps, Hermite interpolation through k of the nearest steps t_j,

    y(t) = sum_j [(1 - 2 (t - t_j) c_j) y_j + (t - t_j) f(t_j, y_j)] l_j(t)^2,    c_j = l_j'(t_j),

with the Lagrange polynomials l_j, has an error of order 2 k, and its derivative 2 k - 1. With 2 k at least two above the order of
the method, it is as accurate between adaptive steps as at them (dopri5 with rtol 1e-7; with k one less, 30 times less accurate).
At discontinuities of the slope the polynomials end: those of a piece use the steps within it alone, and as few as it has.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from revsolve.core.arithmetic import OneSided
from revsolve.core.gradient import solve
from revsolve.core.problem import Problem
from revsolve.core.stepper import Stepper
from revsolve.extras.progress import watched_steps
from revsolve.field.functorch import numbers
from revsolve.prepare.problem import InitialValueProblem
from revsolve.prepare.times import as_tensor, warn_of_indistinct
from revsolve.solution import Solution
from revsolve.steppers.adaptive import Adaptive
from revsolve.steppers.fixed import FixedGrid


def solve_densely(ivp: InitialValueProblem, t: Any, times: list[float]) -> Solution:
    """The solution at the times t, at least two, and in between: interpolated from steps that need not land on them."""
    clock = ivp.moving_clock(t, times[0], times[-1])
    make = watched_steps(every_step(ivp.steps([times[0], times[-1]], t)), ivp, abs(times[-1] - times[0]))
    problem = ivp.problem(ivp.pose(clock, None), times, make)
    states = solve(problem, ivp.x0, None)
    steps = list(problem.stats.times)
    warn_of_indistinct(steps, ivp.packing.real_dtype)
    ends = range(len(steps)) if ivp.straight else steps_at(ivp.jumps, steps)
    interpolant = Dense(problem, states, ivp.results, clock.shift, ends, {*ivp.options.jump_t})
    return Solution(as_tensor(t), interpolant.evaluate(t), problem.stats, steps, interpolant)


def every_step(make: Callable[[], Stepper]) -> Callable[[], Stepper]:
    """Steppers as `make` makes them, with an output after every accepted step."""

    def made() -> Stepper:
        stepper = make()
        if isinstance(stepper, FixedGrid):
            stepper.grid.outputs[:] = range(stepper.num_total + 1)
        else:
            assert isinstance(stepper, Adaptive)
            stepper.every_step = True
        return stepper

    return made


def steps_at(places: Sequence[float], steps: list[float]) -> Sequence[int]:
    """The numbers of the steps that end at one of the places, or after which a step has one within it, or before."""
    sign = 1.0 if steps[-1] > steps[0] else -1.0
    forward, ends = [sign * s for s in steps], set()
    for place in places:
        ends |= {bisect_right(forward, sign * place) - 1, bisect_left(forward, sign * place)}
    return sorted(ends & {*range(len(steps))})


class Dense:
    """The solution at any time, from the states after every step. Differentiable, in the time too.

    states: (steps + 1, *packed state). results: states with `num_dims` dimensions in front, as users see them. shift: what the
    field sees times later by, see `Clock`. ends: the numbers of the steps after which the derivative may jump. jumps: the times
    at which the field does.
    """

    def __init__(
        self,
        problem: Problem,
        states: Tensor,
        results: Callable[[Tensor, int], Any],
        shift: Tensor | None = None,
        ends: Sequence[int] = (),
        jumps: set[float] | frozenset[float] = frozenset(),
    ) -> None:
        self.field, self.results = problem.field, results
        self.states, self.shift, self.jumps = states, shift, jumps
        # torch.func transforms know no saved-tensor hooks, nor do fields that use them
        self.keeps_rates = problem.gradient == "direct" or problem.operation is not None
        self.steps = list(problem.stats.times)
        # Some devices have no double precision.
        self.times = torch.tensor(self.steps, dtype=torch.float64, device="cpu")
        self.ends = torch.tensor(sorted({0, len(self.steps) - 1, *ends}), device="cpu")
        self.num_knots = max(2, (problem.scheme.order + 3) // 2)

    def evaluate(self, t: Any) -> Any:
        """The state at the times t, of any shape: like y0, with the dimensions of t where those of output times are."""
        return self._interpolated(t, _weights)

    def derivative(self, t: Any) -> Any:
        """The derivative of what `evaluate` gives, with respect to t."""
        return self._interpolated(t, _weight_derivatives)

    def _interpolated(self, t: Any, weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
        t = as_tensor(t)
        s = t.to("cpu", torch.float64).reshape(-1)
        first, counts = self._knots(s.detach())
        groups = [(counts == n).nonzero().squeeze(1) for n in numbers(counts.unique())]
        parts = [self._combined(s[i], first[i], int(counts[i[0]]), weights) for i in groups]
        total = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(groups).argsort()]
        return self.results(total.reshape((*t.shape, *self.states.shape[1:])), t.ndim)

    def _combined(
        self, s: Tensor, first: Tensor, num_knots: int, weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Weighted states and rates at the knots from `first` on."""
        knots = first[:, None] + torch.arange(num_knots, device=s.device)  # (len(s), num_knots)
        before = torch.zeros_like(knots)  # 1 where the rate is that of the piece that ends at the knot
        before[:, -1] = torch.isin(knots[:, -1], self.ends)
        used, place = torch.unique(2 * knots + before, return_inverse=True)
        rates = torch.stack([self._rate(key // 2, key // 2 + (-1 if key % 2 else 1)) for key in numbers(used)])
        nodes = self.times[knots]
        for_states, for_rates = weights(s[:, None], nodes if self.shift is None else nodes + self.shift.to(nodes))
        knots, place = knots.to(rates.device), place.to(rates.device)
        total = sum(
            _column(for_states, j, rates) * self.states[knots[:, j]] + _column(for_rates, j, rates) * rates[place[:, j]]
            for j in range(num_knots)
        )
        assert isinstance(total, Tensor)
        return total

    def _knots(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Which steps each time is interpolated from, as the first and their number: those nearest to the step that it lies
        in, without passing one of the ends."""
        forward = 1.0 if self.steps[-1] > self.steps[0] else -1.0
        outside = (forward * s < forward * self.times[0]) | (forward * s > forward * self.times[-1])
        if bool(outside.any()):
            worst = float(s[outside][0])
            raise ValueError(
                f"dense output covers [{self.steps[0]}, {self.steps[-1]}], but was asked for t = {worst}: solve further, a "
                "polynomial says nothing about what lies outside."
            )
        left = torch.searchsorted(forward * self.times, forward * s, right=True) - 1
        left = left.clamp(max=len(self.steps) - 2)
        piece = torch.searchsorted(self.ends, left, right=True)
        low, high = self.ends[piece - 1], self.ends[piece]
        counts = (high - low + 1).clamp(max=self.num_knots)
        return (left - (counts - 2) // 2).maximum(low).minimum(high - counts + 1), counts

    def _rate(self, i: int, other: int) -> Tensor:
        """The rate of change after step i, on the side of another; evaluated again for its gradient instead of kept."""
        t, t1 = self.steps[i], self.steps[other]
        if t in self.jumps:
            t = OneSided(t, 1.0 if t1 > t else -1.0)
        if torch.is_grad_enabled() and not self.keeps_rates:
            try:  # to the end of the evaluation, for scripted code cannot be left early
                with set_checkpoint_early_stop(False):
                    return checkpoint(self._value, t, t1, self.states[i], use_reentrant=False)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                self.keeps_rates = True
        return self._value(t, t1, self.states[i])

    def _value(self, t: float, other: float, x: Tensor) -> Tensor:
        term = self.field.term
        with self.field.as_solved():
            k, scale = term.product(term.value(t, x), term.control(t, t, other))
        weight = scale / (other - t)
        return k if weight == 1.0 else k * weight


def _weights(s: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the states and of the field values, each (len(s), num_knots)."""
    basis, _, slopes = _lagrange(s, nodes)
    away = s - nodes
    return (1 - 2 * away * slopes) * basis**2, away * basis**2


def _weight_derivatives(s: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    basis, derivative, slopes = _lagrange(s, nodes)
    away, product = s - nodes, 2 * basis * derivative
    return (1 - 2 * away * slopes) * product - 2 * slopes * basis**2, basis**2 + away * product


def _lagrange(s: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l_j(s), l_j'(s) and l_j'(t_j), each (len(s), num_knots)."""
    own = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    gaps = (nodes[:, :, None] - nodes[:, None, :]).masked_fill(own, 1.0)
    factors = ((s - nodes)[:, None, :] / gaps).masked_fill(own, 1.0)  # exactly 1 where s is the knot
    rest = factors[:, :, None, :].masked_fill(own, 1.0).prod(3)  # without the one of another knot
    return factors.prod(2), (rest / gaps).masked_fill(own, 0.0).sum(2), (1.0 / gaps).masked_fill(own, 0.0).sum(2)


def _column(weights: Tensor, j: int, like: Tensor) -> Tensor:
    return weights[:, j].to(like.device, like.real.dtype).view(-1, *[1] * (like.ndim - 1))
