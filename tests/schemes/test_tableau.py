"""No wrong tableau can be made, and any notation makes the right one."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revsolve import odeint
from revsolve.schemes.reversible import plain, reversible
from revsolve.schemes.tableau import TABLEAUS, Tableau

NAMES = list(TABLEAUS)
RK4 = {
    "a": [[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
    "b": [1 / 6, 1 / 3, 1 / 3, 1 / 6],
    "c": [0, 1 / 2, 1 / 2, 1],
    "order": 4,
    "name": "rk4",
}


def shifted(values, index, delta):
    return [value + delta * (i == index) for i, value in enumerate(values)]


def coefficients(tableau):
    """Every coefficient as (field, row of a, position)."""
    inside = [("a", i, j) for i in range(tableau.num_stages) for j in range(i)]
    fields = ["b", "c", *["b_error"] * (tableau.b_error is not None)]
    return inside + [(field, None, i) for field in fields for i in range(tableau.num_stages)]


def perturbed(tableau, where, delta):
    """The changed field, for dataclasses.replace."""
    field, row, index = where
    values = getattr(tableau, field)
    if row is None:
        return {field: shifted(values, index, delta)}
    rows = [shifted(v, index, delta) if i == row else list(v) for i, v in enumerate(values)]
    return {"a": rows}


def moved_within_row(tableau):
    """Pairs of positions in a row of a between which weight cannot move without a change of sum(b * a(c))."""
    b, c = tableau.b, tableau.c
    rows = [i for i in range(2, tableau.num_stages) if b[i] != 0]
    return [(i, j, k) for i in rows for j in range(i) for k in range(j) if c[j] != c[k]]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), size=st.floats(1e-10, 1.0), sign=st.sampled_from([-1, 1]))
def test_no_coefficient_can_be_wrong(name, data, size, sign):
    where = data.draw(st.sampled_from(coefficients(TABLEAUS[name])))
    with pytest.raises(ValueError, match=r"sums to|sum\(b\) = .* needs 1:"):
        dataclasses.replace(TABLEAUS[name], **perturbed(TABLEAUS[name], where, sign * size))


@pytest.mark.parametrize("name", [name for name in NAMES if TABLEAUS[name].order >= 3])
@settings(deadline=None, max_examples=20)
@given(data=st.data(), size=st.floats(1e-7, 1.0), sign=st.sampled_from([-1, 1]))
def test_no_two_coefficients_can_be_wrong_with_the_right_sum(name, data, size, sign):
    i, j, k = data.draw(st.sampled_from(moved_within_row(TABLEAUS[name])))
    delta = math.copysign(2.0 ** round(math.log2(size)), sign)
    once = perturbed(TABLEAUS[name], ("a", i, j), delta)
    once["a"][i] = shifted(once["a"][i], k, -delta)
    with pytest.raises(ValueError, match=r"sum\(b.* a\(c\)\) = .* needs 1/6:"):
        dataclasses.replace(TABLEAUS[name], **once)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": [[1 / 2], [0, 1 / 2], [0, 0, 1]]}, r"a has 3 rows, b 4 and c 4 entries, but each needs one per stage"),
        ({"a": [], "b": [], "c": []}, r"a has 0 rows"),
        ({"b": [1 / 2, 1 / 2]}, r"b 2 and c 4"),
        ({"c": [0, 1]}, r"b 4 and c 2"),
        ({"a": [[], [1 / 2], [1 / 2], [0, 0, 1]]}, r"a\[2\] has 1 entries: give the 2 below the diagonal, or all 4"),
        ({"a": [[], [1 / 2, 0.25, 0, 0], [0, 1 / 2], [0, 0, 1]]}, r"a\[1\]\[1\] = 0.25 must be 0"),
        ({"b": [1 / 6, math.nan, 1 / 3, 1 / 6]}, r"b = \(.*nan.*\) holds a number that is not finite"),
        ({"a": [[], [math.inf], [0, 1 / 2], [0, 0, 1]]}, r"a\[1\] = \(inf,\) holds a number that is not finite"),
        ({"c": [0, 1 / 2, 1 / 3, 1]}, r"a\[2\] sums to 0.5, but c\[2\] = 0.33.*: they must be equal"),
        ({"c": [0.1, 1 / 2, 1 / 2, 1]}, r"a\[0\] sums to 0, but c\[0\] = 0.1"),
        ({"b": [1 / 6, 1 / 3, 1 / 3, 1 / 3]}, r"Tableau 'rk4': sum\(b\) = 1.16.*, but order 1 needs 1: correct"),
        ({"b": [1 / 4, 1 / 4, 1 / 4, 1 / 4]}, r"sum\(b \* c \* c\) = 0.375, but order 3 needs 1/3"),
        ({"b": [0.16667, 0.33333, 0.33333, 0.16667]}, r"order 3 needs 1/3: correct the coefficients, to all 16 digits"),
        ({"order": 0}, r"the order of b must be 1, 2, ..., not 0"),
        ({"order": 4.0}, r"the order of b must be 1, 2, ..., not 4.0"),
        ({"order": 5}, r"but order 5 needs 1/\d+: .* or state a lower order"),
        ({"order": 99}, r"but order 5 needs"),
        ({"b_error": [1, -1, 0, 0]}, r"error_order = None: give both, or neither"),
        ({"error_order": 3}, r"b_error = None and error_order = 3: give both"),
        ({"b_error": [1, -1], "error_order": 1}, r"b_error has 2 entries and b 4: give one per stage"),
        ({"b_error": [0, 0, 0, 0], "error_order": 3}, r"sum to 0 without being all 0"),
        ({"b_error": [0, 1, 0, 0], "error_order": 1}, r"sums to 1.0: it is b minus the embedded weights"),
        ({"b_error": [1, -1, 0, 0], "error_order": 2}, r"sum\(\(b - b_error\) \* c\) = .*, but order 2 needs 1/2"),
        ({"b_error": [1, -1, 0, 0], "error_order": 0}, r"the order of b - b_error must be 1, 2, ..., not 0"),
    ],
)
def test_a_wrong_tableau_is_refused_with_its_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        Tableau(**RK4 | wrong)


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda a: a, id="tuples"),
        pytest.param(lambda a: [list(row) for row in a], id="lists"),
        pytest.param(lambda a: np.array([[*row, *[0.0] * (7 - len(row))] for row in a]), id="square numpy"),
        pytest.param(
            lambda a: torch.tensor([[*row, *[0.0] * (7 - len(row))] for row in a], dtype=torch.float64),
            id="square torch",
        ),
        pytest.param(lambda a: [[Fraction(entry) for entry in row] for row in a], id="fractions"),
    ],
)
def test_any_sequence_of_numbers_gives_the_same_tableau(convert):
    dopri5 = TABLEAUS["dopri5"]
    same = dataclasses.replace(dopri5, a=convert(dopri5.a), b=np.array(dopri5.b), c=list(dopri5.c))
    assert same == dopri5
    assert hash(same) == hash(dopri5)


def test_a_tableau_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TABLEAUS["rk4"].order = 5


def test_replacing_a_field_checks_again():
    assert dataclasses.replace(TABLEAUS["rk4"], name="mine").name == "mine"
    with pytest.raises(ValueError, match="order 5 needs"):
        dataclasses.replace(TABLEAUS["rk4"], order=5)


@pytest.mark.parametrize("make", [plain, reversible])
def test_a_name_stands_for_its_tableau(make):
    assert make("rk4") == make(TABLEAUS["rk4"])
    with pytest.raises(ValueError, match=r"'rev_rk4' is no Tableau: known ones are euler, .*rk4, "):
        make("rev_rk4")
    with pytest.raises(TypeError, match=r"a Tableau or the name of one is needed, but this is a Scheme"):
        make(plain("rk4"))


@pytest.mark.parametrize("make", [plain, reversible])
def test_steps_by_a_tableau_of_ones_own_follow_its_error(make):
    """As those of the named one do, though nobody gives tolerances."""
    mine, t = dataclasses.replace(TABLEAUS["bosh3"], name="mine"), torch.tensor([0.0, 1.0])
    counts = [
        odeint(lambda t, y: -10 * y, torch.ones(2), t, method=make(tableau), full_output=True).stats.num_steps
        for tableau in (mine, TABLEAUS["bosh3"])
    ]
    assert counts[0] == counts[1] > 10
