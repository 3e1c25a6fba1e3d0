"""Explicit Runge-Kutta methods as numbers that check themselves.

A tableau (a, b, c) with s stages advances y' = f(t, y) over a span of length h by

    k_i = f(t + c_i h,  y + h sum_{j<i} a_ij k_j),    y_next = y + h sum_i b_i k_i,

and estimates its error by h sum_i b_error_i k_i. Construction verifies every order condition, so a mistyped
coefficient cannot run.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsFloat

from revsolve.schemes import dop853
from revsolve.schemes.order_conditions import dot, failed_order_condition, matvec, rounding

__all__ = ["TABLEAUS", "Tableau", "as_tableau"]


@dataclass(frozen=True, init=False)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method, verified at construction. All arguments are keywords.

    Numbers may be anything ``float`` takes (also ``Fraction``), in lists, tuples or arrays; they are kept as
    tuples of floats, so that a tableau is immutable and hashable.

    Args:
        a: stage weights; row i has i numbers (row 0 is empty), or s in a strictly lower triangular matrix.
        b: weights of the step, length s; they sum to 1.
        c: stage times as fractions of the span, length s; ``c[i]`` is the sum of row i of ``a``.
        order: classical order; ``b`` meets the order conditions of all rooted trees of up to ``order``
            vertices (checked up to 10).
        b_error: ``b`` minus the embedded weights, length s; the error is ``h * sum(b_error[i] * k[i])``.
        error_order: order of the embedded weights ``b - b_error``, verified likewise; goes with ``b_error``.
        name: what messages call the method.

    Raises:
        ValueError: a wrong length, a number that is not finite, an entry on or above the diagonal, or a failed
            condition; the message says which, with the value found and the value needed.

    Example:
        >>> heun = Tableau(a=[[], [1]], b=[1/2, 1/2], c=[0, 1], order=2, b_error=[-1/2, 1/2], error_order=1)
        >>> heun.num_stages, heun.stability_polynomial()
        (2, (1.0, 1.0, 0.5))
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    b_error: tuple[float, ...] | None
    error_order: int | None
    name: str

    def __init__(
        self,
        *,
        a: Iterable[Iterable[SupportsFloat]],
        b: Iterable[SupportsFloat],
        c: Iterable[SupportsFloat],
        order: int,
        b_error: Iterable[SupportsFloat] | None = None,
        error_order: int | None = None,
        name: str = "",
    ) -> None:
        store = object.__setattr__  # the one way to fill a frozen dataclass
        store(self, "name", name)
        store(self, "order", order)
        store(self, "error_order", error_order)
        store(self, "b", self._floats("b", b))
        store(self, "c", self._floats("c", c))
        store(self, "b_error", None if b_error is None else self._floats("b_error", b_error))
        store(self, "a", self._below_diagonal([self._floats(f"a[{i}]", row) for i, row in enumerate(a)]))
        self._check_row_sums()
        self._check_order("b", self.b, order)
        self._check_error_estimate()

    @property
    def num_stages(self) -> int:
        """Number of stages s."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """True where the last stage, for the error estimate, is the first of the next step ("first same as last")."""
        last_is_step = self.b[-1] == 0.0 and self.a[-1] == self.b[:-1] and self.c[-1] == 1.0
        return self.b_error is not None and last_is_step

    @property
    def advancing_stages(self) -> int:
        """Number of leading stages that the step itself needs; further ones serve the error estimate only."""
        return max(i for i, weight in enumerate(self.b, start=1) if weight != 0.0)

    def stability_polynomial(self) -> tuple[float, ...]:
        """Coefficients, ascending, of R in y_next = R(h lambda) y for y' = lambda y: 1, b.1, b.a1, b.aa1, ..."""
        powers = [[1.0] * self.num_stages]
        while len(powers) < self.advancing_stages:
            powers.append(matvec(self.a, powers[-1]))
        return (1.0, *(dot(self.b, power) for power in powers))

    def _floats(self, what: str, values: Iterable[SupportsFloat]) -> tuple[float, ...]:
        numbers = tuple(map(float, values))
        self._require(all(map(math.isfinite, numbers)), f"{what} = {numbers} holds a number that is not finite.")
        return numbers

    def _below_diagonal(self, rows: list[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
        s = len(rows)
        self._require(
            s > 0 and len(self.b) == len(self.c) == s,
            f"a has {s} rows, b {len(self.b)} and c {len(self.c)} entries, but each needs one per stage "
            "(the first row of a is empty and the first entry of c is 0).",
        )
        for i, row in enumerate(rows):
            lengths = f"a[{i}] has {len(row)} entries: give the {i} below the diagonal, or all {s}."
            self._require(len(row) in (i, s), lengths)
            for j, entry in enumerate(row[i:], start=i):
                self._require(entry == 0.0, f"a[{i}][{j}] = {entry} must be 0: only explicit methods fit here.")
        return tuple(row[:i] for i, row in enumerate(rows))

    def _check_row_sums(self) -> None:
        for i, (row, time) in enumerate(zip(self.a, self.c, strict=True)):
            tolerance = rounding(i, sum(map(abs, row)) + abs(time))
            self._require(
                abs(sum(row) - time) <= tolerance,
                f"a[{i}] sums to {sum(row)!r}, but c[{i}] = {time!r}: they must be equal, to all 16 digits.",
            )

    def _check_order(self, what: str, weights: tuple[float, ...], order: int) -> None:
        self._require(isinstance(order, int) and order > 0, f"the order of {what} must be 1, 2, ..., not {order!r}.")
        failed = failed_order_condition(self.a, weights, order, what)
        self._require(not failed, f"{failed}: correct the coefficients, to all 16 digits, or state a lower order.")

    def _check_error_estimate(self) -> None:
        self._require(
            (self.b_error is None) == (self.error_order is None),
            f"b_error = {self.b_error} and error_order = {self.error_order}: give both, or neither.",
        )
        if self.b_error is None or self.error_order is None:
            return
        s, size = len(self.b_error), sum(map(abs, self.b_error))
        self._require(s == self.num_stages, f"b_error has {s} entries and b {self.num_stages}: give one per stage.")
        self._require(
            size > 0.0 and abs(sum(self.b_error)) <= rounding(s, size + sum(map(abs, self.b))),
            f"b_error = {self.b_error} sums to {sum(self.b_error)!r}: it is b minus the embedded weights, so it "
            "must sum to 0 without being all 0.",
        )
        embedded = tuple(weight - error for weight, error in zip(self.b, self.b_error, strict=True))
        self._check_order("b - b_error", embedded, self.error_order)

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise ValueError(f"Tableau {self.name!r}: {otherwise}")


# fmt: off
R2 = math.sqrt(2)
EULER = Tableau(name="euler", order=1, a=[[]], b=[1], c=[0])
MIDPOINT = Tableau(name="midpoint", order=2, a=[[], [1/2]], b=[0, 1], c=[0, 1/2])
HEUN2 = Tableau(name="heun2", order=2, a=[[], [1]], b=[1/2, 1/2], c=[0, 1])
# Ralston (1962), "Runge-Kutta methods with minimum error bounds": least bound on the truncation error.
RALSTON2 = Tableau(name="ralston2", order=2, a=[[], [2/3]], b=[1/4, 3/4], c=[0, 2/3])
HEUN3 = Tableau(name="heun3", order=3, a=[[], [1/3], [0, 2/3]], b=[1/4, 0, 3/4], c=[0, 1/3, 2/3])
RALSTON3 = Tableau(name="ralston3", order=3, a=[[], [1/2], [0, 3/4]], b=[2/9, 1/3, 4/9], c=[0, 1/2, 3/4])
# Kutta (1901): the classical method and its 3/8 rule.
RK4 = Tableau(
    name="rk4", order=4, a=[[], [1/2], [0, 1/2], [0, 0, 1]], b=[1/6, 1/3, 1/3, 1/6], c=[0, 1/2, 1/2, 1],
)
RK4_38 = Tableau(
    name="rk4_38", order=4, a=[[], [1/3], [-1/3, 1], [1, -1, 1]], b=[1/8, 3/8, 3/8, 1/8], c=[0, 1/3, 2/3, 1],
)
HEUN_EULER = Tableau(
    name="heun_euler", order=2, a=[[], [1]], b=[1/2, 1/2], c=[0, 1], b_error=[-1/2, 1/2], error_order=1,
)
# Bogacki & Shampine (1989), "A 3(2) pair of Runge-Kutta formulas".
BOSH3 = Tableau(
    name="bosh3", order=3, error_order=2,
    a=[[], [1/2], [0, 3/4], [2/9, 1/3, 4/9]],
    b=[2/9, 1/3, 4/9, 0],
    c=[0, 1/2, 3/4, 1],
    b_error=[-5/72, 1/12, 1/9, -1/8],
)
# Fehlberg (1969), NASA TR R-315: as the name 4(5) says, the fourth-order solution (whose error constants
# are minimised) is advanced, and the fifth-order one serves the estimate.
FEHLBERG45 = Tableau(
    name="fehlberg45", order=4, error_order=5,
    a=[
        [], [1/4], [3/32, 9/32], [1932/2197, -7200/2197, 7296/2197], [439/216, -8, 3680/513, -845/4104],
        [-8/27, 2, -3544/2565, 1859/4104, -11/40],
    ],
    b=[25/216, 0, 1408/2565, 2197/4104, -1/5, 0],
    c=[0, 1/4, 3/8, 12/13, 1, 1/2],
    b_error=[-1/360, 0, 128/4275, 2197/75240, -1/50, -2/55],
)
# Dormand & Prince (1980), "A family of embedded Runge-Kutta formulae".
DOPRI5 = Tableau(
    name="dopri5", order=5, error_order=4,
    a=[
        [], [1/5], [3/40, 9/40], [44/45, -56/15, 32/9], [19372/6561, -25360/2187, 64448/6561, -212/729],
        [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656],
        [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84],
    ],
    b=[35/384, 0, 500/1113, 125/192, -2187/6784, 11/84, 0],
    c=[0, 1/5, 3/10, 4/5, 8/9, 1, 1],
    b_error=[71/57600, 0, -71/16695, 71/1920, -17253/339200, 22/525, -1/40],
)
# Tsitouras (2011), "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption".
TSIT5 = Tableau(
    name="tsit5", order=5, error_order=4,
    a=[
        [], [0.161], [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
        [0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
         2.324710524099774],
    ],
    b=[0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081,
       2.324710524099774, 0],
    c=[0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1],
    b_error=[0.001780011052225771, 0.0008164344596567463, -0.007880878010261994, 0.144711007173263,
             -0.5823571654525552, 0.45808210592918686, -1/66],
)
DOP853 = Tableau(
    name="dopri8", order=8, error_order=5, a=dop853.A, b=dop853.B, c=dop853.C, b_error=dop853.B_ERROR,
)
# Shmelev et al. (2025), "Explicit and Effectively Symmetric Runge-Kutta methods": EES(2,5) at x = 1/10
# and EES(2,7) at x = (5 - 3 sqrt 2)/14. A step of -h undoes a step of h up to O(h^6) and O(h^8).
EES25 = Tableau(
    name="ees25", order=2, a=[[], [1/3], [-5/48, 15/16]], b=[1/10, 1/2, 2/5], c=[0, 1/3, 5/6],
)
EES27 = Tableau(
    name="ees27", order=2,
    a=[
        [], [(2 - R2)/3], [(R2 - 4)/24, (4 + R2)/8],
        [(145 * R2 - 176)/168, (24 - 15 * R2)/56, (9 - 3 * R2)/7],
    ],
    b=[(5 - 3 * R2)/14, (3 + R2)/14, (6 * R2 - 3)/14, (9 - 4 * R2)/14],
    c=[0, (2 - R2)/3, (2 + R2)/6, (4 + R2)/6],
)

_ALL = (
    EULER, MIDPOINT, HEUN2, RALSTON2, HEUN3, RALSTON3, RK4, RK4_38,
    HEUN_EULER, BOSH3, FEHLBERG45, DOPRI5, TSIT5, DOP853, EES25, EES27,
)
TABLEAUS: dict[str, Tableau] = {tableau.name: tableau for tableau in _ALL} | {"dop853": DOP853}
# fmt: on


def as_tableau(method: Tableau | str) -> Tableau:
    """The Tableau, or the one of this name. Raises TypeError for anything else, ValueError for an unknown name."""
    if isinstance(method, str):
        if method not in TABLEAUS:
            raise ValueError(f"{method!r} is no Tableau: known ones are {', '.join(TABLEAUS)}.")
        return TABLEAUS[method]
    if not isinstance(method, Tableau):
        raise TypeError(f"a Tableau or the name of one is needed, but this is a {type(method).__name__}.")
    return method
