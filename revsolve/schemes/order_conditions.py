"""Order conditions of Runge-Kutta methods, one for every rooted tree.

A method (a, b) has order p when, for every rooted tree with up to p vertices,

    sum_i b_i stage_i(tree) = 1 / density(tree),
    stage_i(tree) = product over the subtrees of the root of (a stage(subtree))_i,
    density(tree) = number of vertices times the product of the densities of the subtrees.

See Butcher, *Numerical Methods for Ordinary Differential Equations*, chapter 3, or Hairer, Norsett & Wanner,
*Solving Ordinary Differential Equations I*, section II.2.
"""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from operator import mul

HIGHEST_CHECKED_ORDER = 10  # 1205 trees; no explicit method of higher order is in general use

Tree = tuple["Tree", ...]  # the sorted subtrees of the root; () is the tree of one vertex
Matrix = tuple[tuple[float, ...], ...]  # row i holds the i entries below the diagonal


def failed_order_condition(a: Matrix, weights: Sequence[float], order: int, what: str) -> str | None:
    """The first order condition that ``weights`` fail, in words that call them ``what``; None if all hold.

    Above order 10 only the trees of up to 10 vertices are checked.
    """
    stages = _stage_weights(a, order)
    sizes = _stage_weights(tuple(tuple(map(abs, row)) for row in a), order)
    for tree, stage in stages.items():
        found, needed = dot(weights, stage), Fraction(1, _density(tree))
        size = dot(tuple(map(abs, weights)), sizes[tree])
        vertices = _num_vertices(tree)
        if not abs(found - needed) <= rounding(vertices * len(weights), size):
            return f"sum({_formula(what, tree)}) = {found!r}, but order {vertices} needs {needed}"
    return None


def rounding(num_operations: int, size: float) -> float:
    """Bound on the rounding of a sum of double-precision products that are ``size`` in absolute value."""
    return (num_operations + 2) * sys.float_info.epsilon * size


def dot(weights: Sequence[float], values: Sequence[float]) -> float:
    """Sum of products over the shorter of the two."""
    return sum(map(mul, weights, values))


def matvec(a: Matrix, values: Sequence[float]) -> list[float]:
    """The product of the strictly lower triangular ``a`` and a vector with one entry per stage."""
    return [dot(row, values) for row in a]


@cache
def rooted_trees(num_vertices: int) -> tuple[Tree, ...]:
    """All rooted trees of a size (1, 1, 2, 4, 9, ...): each is a smaller one with a branch added to its root."""
    if num_vertices == 1:
        return ((),)
    grafted = {
        tuple(sorted((*trunk, branch)))
        for size in range(1, num_vertices)
        for trunk in rooted_trees(num_vertices - size)
        for branch in rooted_trees(size)
    }
    return tuple(sorted(grafted))


@cache
def _num_vertices(tree: Tree) -> int:
    return 1 + sum(map(_num_vertices, tree))


@cache
def _density(tree: Tree) -> int:
    return _num_vertices(tree) * math.prod([_density(t) for t in tree])


def _stage_weights(a: Matrix, order: int) -> dict[Tree, list[float]]:
    stages: dict[Tree, list[float]] = {}
    applied: dict[Tree, list[float]] = {}
    for num_vertices in range(1, min(order, HIGHEST_CHECKED_ORDER) + 1):
        for tree in rooted_trees(num_vertices):
            factors = zip(*(applied[branch] for branch in tree), strict=True)
            stages[tree] = [math.prod(factor) for factor in factors] if tree else [1.0] * len(a)
            applied[tree] = matvec(a, stages[tree])
    return stages


def _formula(weights: str, tree: Tree) -> str:
    """The left-hand side of a tree's order condition, for example ``b * c * a(c)``."""
    factors = ["c" if branch == () else f"a({_formula('', branch)})" for branch in tree]
    root = f"({weights})" if " " in weights and tree else weights
    return " * ".join([root, *factors] if root else factors)
