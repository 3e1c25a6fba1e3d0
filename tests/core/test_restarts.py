"""Restarts: where they happen, what they cost, and that they see growth."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import Restarts, Solution, odeint
from revsolve.core.restarts import Segments
from revsolve.schemes.names import scheme


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -10 * y


def turn(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


def solution(field: Any, num_steps: int, restarts: Any, method: str = "rev_rk4") -> Solution:
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.01 * num_steps], dtype=torch.float64)
    return odeint(field, y0, t, method=method, options={"step_size": 0.01}, restarts=restarts, full_output=True)


@pytest.mark.parametrize("interval", [1, 2, 7, 30, 100])
def test_an_interval_is_kept(interval: int) -> None:
    stats = solution(turn, 60, interval).stats
    assert stats.num_restarts == math.ceil(60 / interval) - 1
    assert stats.num_rejected == 0


def test_none_means_none() -> None:
    assert solution(turn, 60, None).stats.num_restarts == 0


@pytest.mark.parametrize("budget", [1, 3, 10])
@pytest.mark.parametrize("field", [turn, decay])
def test_a_budget_is_kept(field: Any, budget: int) -> None:
    """Stored pairs, the one at the start included."""
    assert solution(field, 60, Restarts(budget=budget)).stats.num_restarts + 1 <= budget


@pytest.mark.parametrize("longest", [1, 4, 16])
def test_segments_are_no_longer_than_allowed(longest: int) -> None:
    assert solution(turn, 60, Restarts(longest=longest)).stats.num_restarts >= math.ceil(60 / longest) - 1


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
def test_decay_asks_for_more_of_them_than_rotation(method: str) -> None:
    few, many = (solution(field, 200, "auto", method).stats.num_restarts for field in (turn, decay))
    assert few < many


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf", "alf4"])
def test_undoing_leads_back(method: str) -> None:
    """Rounding is hardly amplified between restarts, and the certificate says so."""
    solved = solution(decay, 200, "auto", method)
    solved.ys.sum().backward()
    assert 0.0 <= solved.stats.reconstruction_error < 1e-11


POLICIES = st.builds(
    Restarts,
    longest=st.none() | st.integers(1, 40),
    growth=st.floats(0.1, 10),
)


@given(
    policy=POLICIES,
    num_steps=st.integers(1, 300),
    rate=st.floats(0.5, 3.0),
    method=st.sampled_from(["rev_rk4", "rev_euler", "alf", "reversible_heun4"]),
    reach=st.integers(1, 256),
)
def test_segments_end_for_any_growth(policy: Restarts, num_steps: int, rate: float, method: str, reach: int) -> None:
    """Whatever the parasitic part does, lengths stay within bounds, and a segment of the least length is always accepted."""
    segments = Segments(policy, num_steps, None, scheme(method))
    done = tried = 0
    while done < num_steps:
        n = min(segments.length, num_steps - done)
        assert 1 <= segments.length <= max(32, math.isqrt(num_steps), policy.longest or 0)
        segments.start(1e-3, 0.1)
        accepted = segments.accept(1e-3 * rate**n, [0.1 * i for i in range(n + 1)], 0.0, 0.0, reach)
        done += n * accepted
        tried += 1
    assert tried <= 4 * num_steps


def lengths(method: str, gap: float, num_segments: int, longest: int = 32) -> list[tuple[int, bool]]:
    """Those of the first segments, which end with this parasitic part, 1e-3 being natural, and whether they are accepted."""
    segments, found = Segments(Restarts(longest=longest), 1000, None, scheme(method)), []
    for _ in range(num_segments):
        segments.start(1e-3, 1.0)
        n = segments.length
        found.append((n, segments.accept(gap, list(range(n + 1)), 0.0, 0.0, 256)))
    return found


@pytest.mark.parametrize("method", ["reversible_heun", "alf", "leapfrog", "alf4_s3", "reversible_heun4_s5"])
def test_segments_are_even_where_z_changes_its_sign_with_every_step(method: str) -> None:
    assert [n for n, _ in lengths(method, 1e-3, 4, longest=15)] == [4, 8, 14, 14]
    assert [n for n, _ in lengths("rev_rk4", 1e-3, 4, longest=15)] == [4, 8, 15, 15]


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf"])
def test_what_fails_again_and_again_is_seldom_tried_again(method: str) -> None:
    """Nothing but single steps is accepted here: two are taken in vain for every four that stand."""
    found = lengths(method, 1.0, 200)
    taken, again = (sum(n for n, accepted in found if accepted is kind) for kind in (True, False))
    assert 0 < again <= taken / 2 + 4


@pytest.mark.parametrize(("method", "fits"), [("rev_rk4", True), ("reversible_heun4", True), ("alf", False)])
def test_a_part_to_which_steps_do_not_add_may_not_grow_with_their_number(method: str, fits: bool) -> None:
    """Thirty times what the first step left, after 20 steps."""
    segments = Segments(Restarts(longest=20, growth=2.0), 20, None, scheme(method))
    segments.start(1e-3, 1.0)
    assert segments.accept(3e-2, list(range(21)), 0.0, 0.0, 256) is fits


@given(gap=st.sampled_from([0.0, math.inf, math.nan, 1e-300, 1e300]), length=st.integers(1, 40))
def test_segments_survive_extreme_gaps(gap: float, length: int) -> None:
    """A gap that is not finite asks for shorter segments; the shortest is accepted, for the march reports it."""
    segments = Segments(Restarts(longest=length), 100, None, scheme("alf"))
    segments.start(gap, 0.1)
    while not segments.accept(gap, [0.1 * i for i in range(segments.length + 1)], 0.0, 0.0, 256):
        segments.start(gap, 0.1)
    assert 1 <= segments.length <= 40
