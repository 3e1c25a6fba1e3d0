"""The shipped tableaus: published coefficients, stages, stability and measured orders."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.integrate import DOP853, RK23, RK45

from revsolve.schemes.tableau import TABLEAUS

NAMES = list(TABLEAUS)
PAIRS = [name for name in NAMES if TABLEAUS[name].b_error is not None]


def step(tableau, field, t, y, h):
    """One step and its error estimate, by the definition."""
    k = []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        k.append(field(t + c * h, y + h * sum(a * k_j for a, k_j in zip(row, k, strict=True))))
    error = h * sum(e * k_i for e, k_i in zip(tableau.b_error or [0.0] * len(k), k, strict=True))
    return y + h * sum(b * k_i for b, k_i in zip(tableau.b, k, strict=True)), error


def nonlinear(t, y):
    """A field without symmetry that (exp(sin t), 1 / (1 + t)) solves."""
    u, v = y
    return np.array([u * math.cos(t) * v * (1 + t), -v * v + u - math.exp(math.sin(t))])


def solution(t):
    return np.array([math.exp(math.sin(t)), 1 / (1 + t)])


def final_error(tableau, num_steps):
    h, y = 2.0 / num_steps, solution(0.0)
    for n in range(num_steps):
        y, _ = step(tableau, nonlinear, n * h, y, h)
    return np.abs(y - solution(2.0)).max()


def worst_over_starts(one_step, h):
    """Largest over 20 starts, so that no accidental cancellation at one of them bends a slope."""
    return max(np.abs(one_step(t, solution(t), h)).max() for t in np.linspace(0.0, 2.0, 20))


def slope(one_step, h):
    return math.log2(worst_over_starts(one_step, h) / worst_over_starts(one_step, h / 2))


def round_trip_error(tableau, t, y, h):
    there, _ = step(tableau, nonlinear, t, y, h)
    return step(tableau, nonlinear, t + h, there, -h)[0] - y


@pytest.mark.parametrize("name", NAMES)
def test_stated_order_cannot_be_raised(name):
    higher = TABLEAUS[name].order + 1
    with pytest.raises(ValueError, match=rf"order {higher} needs 1/\d+: correct the coefficients"):
        dataclasses.replace(TABLEAUS[name], order=higher)


@pytest.mark.parametrize("name", PAIRS)
def test_stated_error_order_cannot_be_raised(name):
    with pytest.raises(ValueError, match=r"sum\(\(b - b_error\).*needs 1/\d+"):
        dataclasses.replace(TABLEAUS[name], error_order=TABLEAUS[name].error_order + 1)


@pytest.mark.parametrize(
    ("name", "peer", "error"), [("bosh3", RK23, -RK23.E), ("dopri5", RK45, -RK45.E), ("dopri8", DOP853, DOP853.E5)]
)
def test_coefficients_agree_with_scipy(name, peer, error):
    tableau, s = TABLEAUS[name], peer.n_stages
    # Both sides round each decimal or fraction once: one unit in the last place.
    for_scipy = {"rtol": 2.3e-16, "atol": 2.3e-16}
    width = peer.A.shape[1]  # RK45 keeps no column for its last stage
    rows = [(row + (0.0,) * width)[:width] for row in tableau.a[:s]]
    np.testing.assert_allclose(rows, peer.A[:s], **for_scipy)
    np.testing.assert_allclose(tableau.b[:s], peer.B, **for_scipy)
    np.testing.assert_allclose(tableau.c[:s], peer.C[:s], **for_scipy)
    np.testing.assert_allclose(tableau.b_error, error[: tableau.num_stages], **for_scipy)


STAGES = {  # name: (stages, stages of a step without error estimate, first same as last)
    "euler": (1, 1, False),
    "midpoint": (2, 2, False),
    "heun2": (2, 2, False),
    "ralston2": (2, 2, False),
    "heun3": (3, 3, False),
    "ralston3": (3, 3, False),
    "rk4": (4, 4, False),
    "rk4_38": (4, 4, False),
    "heun_euler": (2, 2, False),
    "bosh3": (4, 3, True),
    "fehlberg45": (6, 5, False),
    "dopri5": (7, 6, True),
    "tsit5": (7, 6, True),
    "dopri8": (12, 12, False),
    "dop853": (12, 12, False),
    "ees25": (3, 3, False),
    "ees27": (4, 4, False),
}


@pytest.mark.parametrize("name", NAMES)
def test_stage_counts(name):
    tableau = TABLEAUS[name]
    assert (tableau.num_stages, tableau.advancing_stages, tableau.fsal) == STAGES[name]


def test_trailing_stages_without_error_estimate_are_dropped_but_not_fsal():
    plain = dataclasses.replace(TABLEAUS["dopri5"], b_error=None, error_order=None)
    assert (plain.advancing_stages, plain.fsal) == (6, False)


@pytest.mark.parametrize("name", NAMES)
def test_stability_polynomial_is_the_truncated_exponential_up_to_the_order(name):
    tableau = TABLEAUS[name]
    coefficients = tableau.stability_polynomial()
    assert len(coefficients) == tableau.advancing_stages + 1
    exponential = [1 / math.factorial(k) for k in range(tableau.order + 1)]
    # The size of the terms in b.a...a1 is at most 200 (DOP853), and each is rounded to 16 digits.
    np.testing.assert_allclose(coefficients[: tableau.order + 1], exponential, rtol=0, atol=1e-12)


@pytest.mark.parametrize("z", [-1.0, 0.5j, -0.3 + 0.7j])
@pytest.mark.parametrize("name", NAMES)
def test_stability_polynomial_is_a_step_of_the_linear_equation(name, z):
    tableau = TABLEAUS[name]
    stepped, _ = step(tableau, lambda t, y: z * y, 0.0, 1.0, 1.0)
    polynomial = np.polynomial.Polynomial(tableau.stability_polynomial())(z)
    assert abs(stepped - polynomial) < 1e-12  # rounding of terms of size at most 200 (DOP853)


@pytest.mark.parametrize(
    ("name", "above_the_order"),
    [
        ("ees25", [1 / 8]),
        ("ees27", [(2 - math.sqrt(2)) / 4, (3 - 2 * math.sqrt(2)) / 8]),
        ("fehlberg45", [1 / 104]),
        ("dopri5", [1 / 600]),
    ],
)
def test_stability_polynomial_above_the_order_is_the_known_one(name, above_the_order):
    tableau = TABLEAUS[name]
    # Absolute: a few roundings of numbers of size 10 (Dormand-Prince's large stage weights cancel).
    found = tableau.stability_polynomial()[tableau.order + 1 :]
    np.testing.assert_allclose(found, above_the_order, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_global_error_falls_at_least_at_the_stated_order(name):
    tableau = TABLEAUS[name]
    num_steps = 64 // tableau.order  # so that no error reaches the rounding floor
    coarse, fine = final_error(tableau, num_steps), final_error(tableau, 2 * num_steps)
    # No upper bound: the leading terms of orders 5 and 8 are too small here for the slope to settle above rounding.
    assert math.log2(coarse / fine) > tableau.order - 0.2


@pytest.mark.parametrize("name", PAIRS)
def test_error_estimate_falls_at_its_order(name):
    tableau = TABLEAUS[name]
    measured = slope(lambda t, y, h: step(tableau, nonlinear, t, y, h)[1], 0.05)
    assert measured == pytest.approx(min(tableau.order, tableau.error_order) + 1, abs=0.2)


@pytest.mark.parametrize(("name", "order", "h"), [("ees25", 5, 0.1), ("ees27", 7, 0.1)])
def test_a_step_back_undoes_an_effectively_symmetric_step(name, order, h):
    measured = slope(lambda t, y, h: round_trip_error(TABLEAUS[name], t, y, h), h)
    assert measured == pytest.approx(order + 1, abs=0.2)
