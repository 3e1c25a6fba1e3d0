"""Stochastic Runge-Kutta methods with space-time area, and their reversible pairs.

With the control (h, W, H) of a span (W the Brownian increment, H its space-time area), s stages

    x_i = x + sum_j a_ij f_j h + a_W_ij g_j W + a_H_ij g_j H,    f_i, g_i at (t0 + c_i h, x_i),

add  sum_i b_i f_i h + b_W_i g_i W + b_H_i g_i H. Turning a span round flips h and W and leaves H, and so do the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from revsolve.core.arithmetic import Time, moment, plus
from revsolve.core.coupling import Combination, Scheme
from revsolve.core.tape import Memo
from revsolve.schemes.reversible import plain, reversible
from revsolve.schemes.tableau import TABLEAUS

Row = tuple[float, ...]
DRIVERS = ("h", "W", "H")


@dataclass(frozen=True)
class StochasticTableau:
    """Coefficients of the formula above; a row shorter than its stage is filled up with zeros.

    b_error and b_W_error are b and b_W minus embedded weights. `additive` methods are for additive noise only.
    """

    name: str
    c: Row
    a: tuple[Row, ...]
    a_W: tuple[Row, ...]
    a_H: tuple[Row, ...]
    b: Row
    b_W: Row
    b_H: Row
    b_error: Row
    b_W_error: Row = ()
    additive: bool = False

    def __post_init__(self) -> None:
        for name, total in (("b", 1.0), ("b_W", 1.0), ("b_H", 0.0), ("b_error", 0.0), ("b_W_error", 0.0)):
            if abs(sum(getattr(self, name)) - total) > 1e-14:
                raise ValueError(f"{self.name}: {name} = {getattr(self, name)} must sum to {total}.")


@dataclass(frozen=True)
class StochasticRungeKutta:
    """One step of a stochastic tableau from x, as an increment. It multiplies values by (h, None), (None, W) and (None, H)."""

    tableau: StochasticTableau
    ends_in_value = False

    @property
    def nodes(self) -> tuple[float, ...]:
        return self.tableau.c

    def __call__(
        self, term: Memo, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]:
        h, W, H = term.control(t0, t0, t1)
        controls = {"h": (h, None), "W": (None, W), "H": (None, H)}
        pieces: dict[tuple[str, int], tuple[float, Tensor]] = {}
        for i, c in enumerate(self.tableau.c):
            xi = x
            for key, weight in self._stages[i]:
                scale, k = pieces[key]
                xi = plus(xi, k, weight * scale)
            value = term.value(moment(t0, t1, c), xi)
            for driver in self._needed[i]:
                k, factor = term.product(value, controls[driver])
                assert not isinstance(factor, Tensor), "times of an SDE have no gradient"
                pieces[driver, i] = factor, k
        weighted: list[Combination] = [
            [(weight * pieces[key][0], pieces[key][1]) for key, weight in sums] for sums in self._sums
        ]
        return weighted[0], weighted[1] if with_error else []

    @cached_property
    def _stages(self) -> list[list[tuple[tuple[str, int], float]]]:
        t = self.tableau
        rows = zip(t.a, t.a_W, t.a_H, strict=True)
        return [[*_keyed("h", h), *_keyed("W", w), *_keyed("H", area)] for h, w, area in rows]

    @cached_property
    def _sums(self) -> tuple[list[tuple[tuple[str, int], float]], ...]:
        t = self.tableau
        step = [*_keyed("h", t.b), *_keyed("W", t.b_W), *_keyed("H", t.b_H)]
        return step, [*_keyed("h", t.b_error), *_keyed("W", t.b_W_error)]

    @cached_property
    def _needed(self) -> list[list[str]]:
        used = {key for sums in (*self._stages, *self._sums) for key, _ in sums}
        return [[driver for driver in DRIVERS if (driver, i) in used] for i in range(len(self.tableau.c))]


def stochastic(tableau: StochasticTableau, pair: bool) -> Scheme:
    """The method itself (Foster, dos Reis & Strange 2023, arXiv 2210.17543), whose steps cannot be undone, or the reversible pair
    over it (McCallum & Foster 2024, arXiv 2410.11648)."""
    scheme = (reversible if pair else plain)(TABLEAUS["heun_euler"])
    updates = tuple(replace(update, increment=StochasticRungeKutta(tableau)) for update in scheme.updates)
    return replace(scheme, name=f"rev_{tableau.name}" if pair else tableau.name, updates=updates)


def _keyed(driver: str, row: Row) -> list[tuple[tuple[str, int], float]]:
    return [((driver, i), weight) for i, weight in enumerate(row) if weight != 0.0]


# fmt: off
# Foster, dos Reis & Strange (2023), (6.1): strong order 1.5 for additive noise. The last stage is for g that change in
# time: the integral of a linear g is g(t0) W + (g(t1) - g(t0)) (W/2 - H).
SHARK = StochasticTableau(
    name="shark", additive=True, c=(0, 0, 5/6, 1),
    a=((), (), (0, 5/6), ()), a_W=((), (), (5/6,), ()), a_H=((), (1,), (1,), ()),
    b=(0, 2/5, 3/5), b_W=(1/2, 0, 0, 1/2), b_H=(1, 0, 0, -1), b_error=(0, -3/5, 3/5),
)
# Roessler (2010), "Runge-Kutta methods for the strong approximation of solutions of SDEs", SRA1: the same order.
SRA1 = StochasticTableau(
    name="sra1", additive=True, c=(0, 3/4, 1),
    a=((), (3/4,), ()), a_W=((), (3/4,), ()), a_H=((), (3/2,), ()),
    b=(1/3, 2/3), b_W=(1/2, 0, 1/2), b_H=(1, 0, -1), b_error=(-2/3, 2/3),
)
# Foster, dos Reis & Strange (2023), (6.2): strong order 1.5 for commutative noise. Diffusion stages are those of RK4.
SLOWRK = StochasticTableau(
    name="slowrk", c=(0, 1/2, 1/2, 1/2, 1/2, 3/4, 1),
    a=((), (1/2,), (1/2,), (1/2,), (1/2,), (3/4,), (1,)),
    a_W=((), (), (0, 1/2), (0, 0, 1/2), (0, 0, 0, 1), (0, 0, 0, 3/4), (0, 0, 1/2)),
    a_H=((), (), (), (), (), (0, 0, 0, 3/2), ()),
    b=(1/3, 0, 0, 0, 0, 2/3), b_W=(0, 1/6, 1/3, 1/3, 1/6), b_H=(0, 0, 0, 2, 0, 0, -2),
    b_error=(-2/3, 0, 0, 0, 0, 2/3), b_W_error=(0, 1/6, -2/3, 1/3, 1/6),
)
# fmt: on
STOCHASTIC = {tableau.name: tableau for tableau in (SHARK, SRA1, SLOWRK)}
