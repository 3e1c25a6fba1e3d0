"""The trees and their order conditions, against what Butcher wrote down by hand."""

from fractions import Fraction

import numpy as np
import pytest

from revsolve.schemes.order_conditions import failed_order_condition, rooted_trees


@pytest.mark.parametrize(("num_vertices", "count"), list(enumerate([1, 1, 2, 4, 9, 20, 48, 115], start=1)))
def test_there_are_as_many_rooted_trees_as_known(num_vertices, count):
    assert len(set(rooted_trees(num_vertices))) == len(rooted_trees(num_vertices)) == count


CONDITIONS = [  # Butcher's eight conditions up to order 4, written down independently of the trees
    ("b", 1, lambda a, c: np.ones_like(c)),
    ("b * c", 2, lambda a, c: c),
    ("b * c * c", 3, lambda a, c: c**2),
    ("b * a(c)", 6, lambda a, c: a @ c),
    ("b * c * c * c", 4, lambda a, c: c**3),
    ("b * c * a(c)", 8, lambda a, c: c * (a @ c)),
    ("b * a(c * c)", 12, lambda a, c: a @ c**2),
    ("b * a(a(c))", 24, lambda a, c: a @ a @ c),
]


@pytest.mark.parametrize("broken", range(8), ids=[formula for formula, _, _ in CONDITIONS])
def test_the_one_broken_order_condition_is_named(broken):
    a = np.tril(np.random.default_rng(0).uniform(0.1, 0.9, (9, 9)), -1)
    conditions = np.array([condition(a, a.sum(1)) for _, _, condition in CONDITIONS])
    needed = np.array([1 / density for _, density, _ in CONDITIONS])
    weights = np.linalg.lstsq(conditions, needed + 1e-6 * (np.arange(8) == broken))[0]
    formula, density, _ = CONDITIONS[broken]
    failed = failed_order_condition(tuple(tuple(row[:i]) for i, row in enumerate(a)), weights, 4, "b")
    assert failed.startswith(f"sum({formula}) = ")
    assert failed.endswith(f"needs {Fraction(1, density)}")
