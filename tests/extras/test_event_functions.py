"""Event functions that are zero on a stretch, know nothing of the state, or never change sign."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import odeint, odeint_event

D = torch.float64
START = torch.tensor(0.0, dtype=D)
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "rk4": {"method": "rk4", "options": {"step_size": 0.13}},
    "rev_rk4": {"method": "rev_rk4", "options": {"step_size": 0.13}},
    "alf": {"method": "alf", "options": {"step_size": 0.01}},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def event(event_fn: Callable[..., Tensor], wants: bool = True, **way: Any) -> tuple[float, Tensor, Tensor]:
    """The time of the event, the state then and the gradients of both with respect to y0."""
    y0 = torch.ones(1, dtype=D, requires_grad=wants)
    t, y = odeint_event(decay, y0, START, event_fn=event_fn, **way)
    if not wants:
        return float(t), y[1], torch.zeros(2)
    rows = [
        torch.autograd.grad(x, y0, retain_graph=True, allow_unused=True)[0] if x.requires_grad else None
        for x in (t, y[1].sum())
    ]
    return float(t.detach()), y[1].detach(), torch.cat([torch.zeros(1, dtype=D) if g is None else g for g in rows])


# Zero from t = 0.7 on, or from y = 0.5 on; from above and from below; reached in a jump or continuously.
STRETCHES: dict[
    str, tuple[Callable[..., Tensor], float, float]
] = {  # with the time, and its derivative with respect to y0
    "time, no graph": (lambda t, y: torch.where(t < 0.7, 1.0, 0.0).to(D), 0.7, 0.0),
    "time, below": (lambda t, y: torch.where(t < 0.7, -3.0, 0.0).to(D), 0.7, 0.0),
    "time, graph before": (lambda t, y: y[0] + 10 if t < 0.7 else torch.zeros_like(t), 0.7, 0.0),
    "time, continuous": (lambda t, y: torch.relu(0.7 - t), 0.7, 0.0),
    "time, from infinity": (lambda t, y: torch.where(t < 0.7, torch.inf, 0.0).to(D), 0.7, 0.0),
    "state, continuous": (lambda t, y: torch.relu(y[0] - 0.5), math.log(2), 1.0),
    "state, below": (lambda t, y: -torch.relu(y[0] - 0.5), math.log(2), 1.0),
    "state, no graph": (lambda t, y: torch.where(y[0] > 0.5, 1.0, 0.0).to(D), math.log(2), 0.0),
}


@every_way
@pytest.mark.parametrize("wants", [True, False], ids=["gradient", "values"])
@pytest.mark.parametrize("case", STRETCHES)
def test_a_stretch_of_zeros_is_found_where_it_begins(case: str, wants: bool, way: dict[str, Any]) -> None:
    event_fn, when, rate = STRETCHES[case]
    t, y, gradients = event(event_fn, wants, **way)
    assert t == pytest.approx(when, abs=1e-4 if way else 1e-6)
    assert float(y) == pytest.approx(math.exp(-when), abs=1e-4)
    if wants:  # dy/dy0 = exp(-t), and y' = -y at the event moves with its time
        assert gradients.tolist() == pytest.approx([rate, math.exp(-when) * (1 - rate)], abs=1e-3)


def test_the_first_of_several_components_counts() -> None:
    t, _, _ = event(lambda t, y: torch.stack([torch.relu(0.9 - t), y[0] - 0.5, torch.relu(0.4 - t)]))
    assert t == pytest.approx(0.4, abs=1e-6)


def test_a_plain_zero_takes_few_evaluations() -> None:
    """Looking for the beginning of a stretch costs one more where there is none."""
    calls: list[float] = []

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t.detach()))
        return 0.75 - t

    event(event_fn, False, method="rk4", options={"step_size": 0.5})
    assert len(calls) < 14


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forward", "backward"])
@pytest.mark.parametrize("way", [{}, {"method": "dopri5"}, {"method": "reversible_heun", "rtol": 1e-3}], ids=str)
def test_a_search_that_finds_nothing_ends_by_time(way: dict[str, Any], sign: float) -> None:
    """After 1,000 steps, once the time is 1,000 times as far as t[1]: seconds, where 10,000 steps take a minute."""
    field = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"no event by t = .* or raise the option max_num_steps"):
        odeint(field, torch.ones(2, dtype=D), [0.0, 0.01 * sign], event_fn=lambda t, y: y[0] + 10, **way)
    assert time.perf_counter() - begin < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [{}, {"method": "dopri5"}, {"method": "reversible_heun", "rtol": 1e-3}], ids=str)
@pytest.mark.parametrize("unit", [1.0, 1e25])
def test_steps_that_grow_without_bound_end(way: dict[str, Any], dtype: torch.dtype, unit: float) -> None:
    """Every step of y' = 1 is exact, so each is ten times as long as the one before: numbers must not run out first."""
    field = lambda t, y: torch.ones_like(y)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"no event by t = .* or count time in larger units"):
        odeint(field, torch.zeros(1, dtype=dtype), [0.0, unit], event_fn=lambda t, y: y + 1, **way)


def test_a_given_number_of_steps_is_the_limit() -> None:
    field = lambda t, y: torch.ones_like(y)  # noqa: E731
    way: dict[str, Any] = {"method": "euler", "options": {"step_size": 1.0, "max_num_steps": 2000}}
    t, _ = odeint_event(field, torch.zeros(1, dtype=D), START, event_fn=lambda t, y: y - 1500.5, **way)
    assert float(t) == pytest.approx(1500.5)


def test_options_that_fixed_steps_do_not_have_are_refused() -> None:
    for name, value in (("safety", 0.5), ("max_step", 0.1), ("jump_t", [0.5])):
        with pytest.raises(ValueError, match=name):
            event(lambda t, y: y - 0.5, method="rk4", options={"step_size": 0.1, name: value})
