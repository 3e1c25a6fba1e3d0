"""Explicit Runge-Kutta methods as numbers that check themselves.

A tableau (a, b, c) with s stages advances y' = f(t, y) over a span of length h by

    k_i = f(t + c_i h,  y + h sum_{j<i} a_ij k_j),    y_next = y + h sum_i b_i k_i,

and estimates its error by h sum_i b_error_i k_i. Construction verifies every order condition (Butcher; see Hairer,
Norsett & Wanner, *Solving Ordinary Differential Equations I*, section II.2), so a mistyped coefficient cannot run.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from operator import mul

__all__ = ["TABLEAUS", "Tableau"]

Tree = tuple  # a rooted tree is the sorted tuple of its root's subtrees; () is the single vertex
HIGHEST_CHECKED_ORDER = 10  # 1205 trees, about 0.1 s; no explicit method of higher order is in general use


@dataclass(frozen=True, kw_only=True)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method, verified at construction.

    Numbers may be anything ``float`` accepts (also ``Fraction``), in any nesting of sequences or arrays; they are kept
    as tuples of floats, so that a tableau is immutable and hashable.

    Args:
        a: stage weights; row i holds i numbers (row 0 is empty), or s, as a strictly lower triangular square matrix.
        b: weights of the step, length s; they sum to 1.
        c: stage times as fractions of the span, length s; ``c[i]`` is the sum of row i of ``a``.
        order: classical order; ``b`` meets the order condition of every rooted tree with up to ``order`` vertices
            (checked up to 10 vertices).
        b_error: ``b`` minus the embedded weights, length s; the error estimate is ``h * sum(b_error[i] * k[i])``.
        error_order: order of the embedded weights ``b - b_error``, verified likewise. Goes with ``b_error``.
        name: how messages call the method.

    Raises:
        ValueError: a wrong length, a non-finite number, an entry on or above the diagonal, or a failed condition:
            the message names it, with the value found and the value needed.

    Example:
        >>> heun = Tableau(a=[[], [1]], b=[1/2, 1/2], c=[0, 1], order=2, b_error=[-1/2, 1/2], error_order=1)
        >>> heun.num_stages, heun.stability_polynomial()
        (2, (1.0, 1.0, 0.5))
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    b_error: tuple[float, ...] | None = None
    error_order: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field, value in self._normalised().items():
            object.__setattr__(self, field, value)  # the one way to normalise a field of a frozen dataclass
        self._check_row_sums()
        self._check_order("b", self.b, self.order)
        if self.b_error is not None and self.error_order is not None:
            self._check_error_weights(self.b_error, self.error_order)

    @property
    def num_stages(self) -> int:
        """Number of stages s."""
        return len(self.b)

    @property
    def fsal(self) -> bool:
        """Whether the last stage, wanted for the error estimate, is the first of the next step ("first same as last")."""
        last_is_step = self.b[-1] == 0.0 and self.a[-1] == self.b[:-1] and self.c[-1] == 1.0
        return self.b_error is not None and last_is_step

    @property
    def advancing_stages(self) -> int:
        """Number of leading stages that the step itself needs; the others serve the error estimate only."""
        return max(i for i, weight in enumerate(self.b, start=1) if weight != 0.0)

    def stability_polynomial(self) -> tuple[float, ...]:
        """Coefficients (ascending) of R in y_next = R(h lambda) y for y' = lambda y: R(z) = 1 + sum_k z^k b a^(k-1) 1."""
        powers = [[1.0] * self.num_stages]
        while len(powers) < self.advancing_stages:
            powers.append(_apply(self.a, powers[-1]))
        return (1.0, *(_dot(self.b, power) for power in powers))

    def _error(self, what: str) -> ValueError:
        return ValueError(f"Tableau {self.name!r}: {what}" if self.name else f"Tableau: {what}")

    def _normalised(self) -> dict[str, tuple | None]:
        s = len(self.b)
        if s == 0 or len(self.a) != s or len(self.c) != s:
            raise self._error(
                f"a has {len(self.a)} rows, b {s} and c {len(self.c)} entries: each needs one for every stage "
                "(the first row of a is empty, the first entry of c is 0)."
            )
        if self.b_error is not None and len(self.b_error) != s:
            raise self._error(f"b_error has {len(self.b_error)} entries and b has {s}: give one for every stage.")
        if (self.b_error is None) != (self.error_order is None):
            raise self._error(
                f"b_error = {self.b_error} but error_order = {self.error_order}: give both, or neither for a method "
                "without an error estimate."
            )
        return {
            "a": tuple(self._row(i, row) for i, row in enumerate(self.a)),
            "b": self._floats("b", self.b),
            "c": self._floats("c", self.c),
            "b_error": None if self.b_error is None else self._floats("b_error", self.b_error),
        }

    def _row(self, i: int, row: Sequence[float]) -> tuple[float, ...]:
        values = self._floats(f"a[{i}]", row)
        if len(values) not in (i, self.num_stages):
            raise self._error(
                f"row a[{i}] has {len(values)} entries: it needs {i} (or {self.num_stages}, zero-padded)."
            )
        for j, value in enumerate(values[i:], start=i):
            if value != 0.0:
                raise self._error(
                    f"a[{i}][{j}] = {value} is not below the diagonal: only explicit methods are supported."
                )
        return values[:i]

    def _floats(self, what: str, values: Sequence[float]) -> tuple[float, ...]:
        numbers = tuple(float(value) for value in values)
        if not all(map(math.isfinite, numbers)):
            raise self._error(f"{what} = {numbers} holds a number that is not finite.")
        return numbers

    def _check_row_sums(self) -> None:
        for i, (row, time) in enumerate(zip(self.a, self.c, strict=True)):
            if not abs(sum(row) - time) <= _rounding(i, sum(map(abs, row)) + abs(time)):
                raise self._error(f"row a[{i}] sums to {sum(row)!r}, but c[{i}] = {time!r}: they must be equal.")

    def _check_error_weights(self, b_error: tuple[float, ...], error_order: int) -> None:
        size = sum(map(abs, b_error))
        if not abs(sum(b_error)) <= _rounding(self.num_stages, size + sum(map(abs, self.b))) or size == 0.0:
            raise self._error(
                f"b_error sums to {sum(b_error)!r} (absolute values: {size!r}), but must sum to 0 and not vanish: "
                "it is b minus the embedded weights."
            )
        embedded = tuple(weight - error for weight, error in zip(self.b, b_error, strict=True))
        self._check_order("b - b_error", embedded, error_order)

    def _check_order(self, what: str, weights: tuple[float, ...], order: int) -> None:
        if not isinstance(order, int) or order < 1:
            raise self._error(f"the order of {what} is {order!r}: it must be a positive integer.")
        order = min(order, HIGHEST_CHECKED_ORDER)
        absolute_a = tuple(tuple(map(abs, row)) for row in self.a)
        stages, sizes = _stage_weights(self.a, order), _stage_weights(absolute_a, order)
        for num_vertices in range(1, order + 1):
            for tree in _rooted_trees(num_vertices):
                found, needed = _dot(weights, stages[tree]), Fraction(1, _density(tree))
                size = _dot(tuple(map(abs, weights)), sizes[tree])
                if not abs(found - needed) <= _rounding(num_vertices * self.num_stages, size):
                    raise self._error(
                        f"sum({_formula(what, tree)}) = {found!r}, but order {num_vertices} of {what} needs {needed}: "
                        f"correct the coefficients (all 16 digits), or state an order below {num_vertices}."
                    )


def _rounding(num_terms: int, size: float) -> float:
    """Tolerance for a sum of products of coefficients given in double precision: eps for each term and factor."""
    return (num_terms + 2) * sys.float_info.epsilon * size


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(map(mul, weights, values))


def _apply(a: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    return [_dot(row, values) for row in a]  # map stops at the end of the row, so values above the diagonal are unused


@cache
def _rooted_trees(num_vertices: int) -> tuple[Tree, ...]:
    """All rooted trees of a size, each found by grafting a smaller tree onto the root of another."""
    if num_vertices == 1:
        return ((),)
    grafted = {
        tuple(sorted((*trunk, branch)))
        for size in range(1, num_vertices)
        for trunk in _rooted_trees(num_vertices - size)
        for branch in _rooted_trees(size)
    }
    return tuple(sorted(grafted))


@cache
def _num_vertices(tree: Tree) -> int:
    return 1 + sum(map(_num_vertices, tree))


@cache
def _density(tree: Tree) -> int:
    """The tree's density gamma; the exact flow has elementary weight 1 / gamma."""
    return _num_vertices(tree) * math.prod(map(_density, tree))


def _stage_weights(a: tuple[tuple[float, ...], ...], order: int) -> dict[Tree, list[float]]:
    """For every tree up to the order: the elementary weight of each stage, the product of a applied to its subtrees'."""
    stages: dict[Tree, list[float]] = {}
    applied: dict[Tree, list[float]] = {}
    for num_vertices in range(1, order + 1):
        for tree in _rooted_trees(num_vertices):
            factors = [applied[branch] for branch in tree]
            stages[tree] = [math.prod(column) for column in zip(*factors, strict=True)] if tree else [1.0] * len(a)
            applied[tree] = _apply(a, stages[tree])
    return stages


def _formula(weights: str, tree: Tree) -> str:
    """The left-hand side of a tree's order condition, for example ``b * c * a(c)``."""
    factors = [("c" if branch == () else f"a({_formula('', branch)})") for branch in tree]
    root = f"({weights})" if " " in weights and tree else weights
    return " * ".join([root, *factors] if root else factors)


# fmt: off
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
    b_error=[2/9 - 7/24, 1/3 - 1/4, 4/9 - 1/3, -1/8],
)
# Fehlberg (1969), NASA TR R-315: the name says 4(5), so the fourth-order solution, the one with minimised error
# constants, is advanced, and the fifth-order one serves the estimate.
FEHLBERG45 = Tableau(
    name="fehlberg45", order=4, error_order=5,
    a=[
        [], [1/4], [3/32, 9/32], [1932/2197, -7200/2197, 7296/2197], [439/216, -8, 3680/513, -845/4104],
        [-8/27, 2, -3544/2565, 1859/4104, -11/40],
    ],
    b=[25/216, 0, 1408/2565, 2197/4104, -1/5, 0],
    c=[0, 1/4, 3/8, 12/13, 1, 1/2],
    b_error=[
        25/216 - 16/135, 0, 1408/2565 - 6656/12825, 2197/4104 - 28561/56430, -1/5 + 9/50, -2/55,
    ],
)
# Dormand & Prince (1980), "A family of embedded Runge-Kutta formulae".
DOPRI5 = Tableau(
    name="dopri5", order=5, error_order=4,
    a=[
        [], [1/5], [3/40, 9/40], [44/45, -56/15, 32/9], [19372/6561, -25360/2187, 64448/6561, -212/729],
        [9017/3168, -355/33, 46732/5247, 49/176, -5103/18656], [35/384, 0, 500/1113, 125/192, -2187/6784, 11/84],
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
        [0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774],
    ],
    b=[0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0],
    c=[0, 0.161, 0.327, 0.9, 0.9800255409045097, 1, 1],
    b_error=[
        0.001780011052225771, 0.0008164344596567463, -0.007880878010261994, 0.144711007173263, -0.5823571654525552,
        0.45808210592918686, -1/66,
    ],
)
# Dormand & Prince 8(5,3) as in Hairer, Norsett & Wanner's DOP853, with its fifth-order estimate alone.
DOP853 = Tableau(
    name="dopri8", order=8, error_order=5,
    a=[
        [], [0.05260015195876773], [0.0197250569845379, 0.0591751709536137], [0.02958758547680685, 0, 0.08876275643042054],
        [0.2413651341592667, 0, -0.8845494793282861, 0.924834003261792],
        [1/27, 0, 0, 0.17082860872947386, 0.12546768756682242],
        [19/512, 0, 0, 0.17025221101954405, 0.06021653898045596, -9/512],
        [0.03709200011850479, 0, 0, 0.17038392571223998, 0.10726203044637328, -0.015319437748624402,
         0.008273789163814023],
        [0.6241109587160757, 0, 0, -3.3608926294469414, -0.868219346841726, 27.59209969944671, 20.154067550477894,
         -43.48988418106996],
        [0.47766253643826434, 0, 0, -2.4881146199716677, -0.590290826836843, 21.230051448181193, 15.279233632882423,
         -33.28821096898486, -0.020331201708508627],
        [-0.9371424300859873, 0, 0, 5.186372428844064, 1.0914373489967295, -8.149787010746927, -18.52006565999696,
         22.739487099350505, 2.4936055526796523, -3.0467644718982196],
        [2.273310147516538, 0, 0, -10.53449546673725, -2.0008720582248625, -17.9589318631188, 27.94888452941996,
         -2.8589982771350235, -8.87285693353063, 12.360567175794303, 0.6433927460157636],
    ],
    b=[0.054293734116568765, 0, 0, 0, 0, 4.450312892752409, 1.8915178993145003, -5.801203960010585, 0.3111643669578199,
       -0.1521609496625161, 0.20136540080403034, 0.04471061572777259],
    c=[0, 0.05260015195876773, 0.0789002279381516, 0.1183503419072274, 0.2816496580927726, 1/3, 1/4, 4/13,
       0.6512820512820513, 3/5, 6/7, 1],
    b_error=[0.01312004499419488, 0, 0, 0, 0, -1.2251564463762044, -0.4957589496572502, 1.6643771824549864,
             -0.35032884874997366, 0.3341791187130175, 0.08192320648511571, -0.022355307863886294],
)
# Shmelev et al. (2025), "Explicit and Effectively Symmetric Runge-Kutta methods", EES(2,5; x = 1/10): a step of -h
# undoes a step of h up to O(h^6).
EES25 = Tableau(
    name="ees25", order=2, a=[[], [1/3], [-5/48, 15/16]], b=[1/10, 1/2, 2/5], c=[0, 1/3, 5/6],
)
# fmt: on

TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN2,
        RALSTON2,
        HEUN3,
        RALSTON3,
        RK4,
        RK4_38,
        HEUN_EULER,
        BOSH3,
        FEHLBERG45,
        DOPRI5,
        TSIT5,
        DOP853,
        EES25,
    )
} | {"dop853": DOP853}
