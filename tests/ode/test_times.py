"""Times: exact where they are given exactly, told apart in the field's dtype or not, and nobody else's to change."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revsolve import odeint, odeint_event, sdeint

D = torch.float64
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "rk4": {"method": "rk4", "options": {"step_size": 0.1}},
    "rev_rk4": {"method": "rev_rk4", "options": {"step_size": 0.1}},
    "alf4": {"method": "alf4", "options": {"step_size": 0.1}},
    "direct": {"method": "rev_rk4", "options": {"step_size": 0.1}, "gradient": "direct"},
    "checkpoint": {"method": "rk4", "options": {"step_size": 0.1}, "gradient": "checkpoint"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@given(
    points=st.integers(2, 300),
    start=st.sampled_from([0.0, 0.3, -7.0, 100.0, 5000.0]),
    spacing=st.sampled_from([0.01, 0.1, 0.7, 1.0, 3.0]),
    backward=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_a_float32_grid_with_its_own_spacing_takes_one_step_an_interval(
    points: int, start: float, spacing: float, backward: bool
) -> None:
    t = torch.linspace(start, start + spacing * (points - 1), points)
    t = t.flip(0) if backward else t
    found = odeint(decay, torch.zeros(1), t, method="euler", options={"step_size": spacing}, full_output=True)
    assert found.stats.num_steps == points - 1


def test_a_float32_grid_of_sdeint_takes_one_step_an_interval() -> None:
    ts = torch.linspace(0, 10, 101)
    sde = (lambda t, y: -y, lambda t, y: 0 * y)
    assert sdeint(sde, torch.zeros(1, 1), ts, dt=0.1, full_output=True).stats.num_steps == 100


@pytest.mark.parametrize("t", [[0.0, 0.1, 0.3], (0, 0.1, 0.3)], ids=["list", "tuple"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("options", [{}, {"dense": True}], ids=str)
def test_numbers_stay_in_double_precision(t: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    found = odeint(decay, torch.ones(1, dtype=dtype), t, options=options, full_output=True)
    assert found.ts.dtype == D and found.ts.tolist() == [0.0, 0.1, 0.3]
    assert found.ys.dtype == dtype


@pytest.mark.parametrize("offset", [0.0, 1.7e9])
def test_dense_output_is_evaluated_where_asked(offset: float) -> None:
    t = torch.tensor([0.0, 1.0], dtype=D) + offset
    found = odeint(decay, torch.ones(1, dtype=D), t, rtol=1e-11, atol=1e-12, options={"dense": True}, full_output=True)
    for asked in (0.1, 0.3):
        exact = (asked + offset) - offset
        assert float(found.evaluate(asked + offset)) == pytest.approx(math.exp(-exact), abs=1e-10)
        assert float(found.derivative(asked + offset)) == pytest.approx(-math.exp(-exact), abs=1e-8)


@pytest.mark.parametrize("way", [{}, {"method": "rk4", "options": {"step_size": 0.05}}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("t0", [1e4, 1e6, 1.7e9])
def test_events_of_float32_states_at_large_times(t0: float, way: dict[str, Any]) -> None:
    t, y = odeint_event(decay, torch.ones(1), torch.tensor(t0, dtype=D), event_fn=lambda t, y: y - 0.5, **way)
    assert float(t) - t0 == pytest.approx(math.log(2), abs=1e-3)
    assert float(y[1]) == pytest.approx(0.5, abs=1e-3)


INDISTINCT = {
    "fixed": ([1.7e9, 1.7e9 + 600.0], {"method": "rk4", "options": {"step_size": 60.0}}),
    "outputs": ([1.7e9, 1.7e9 + 10.0, 1.7e9 + 20.0], {}),
    "adaptive": ([1.7e9, 1.7e9 + 3600.0], {"options": {"max_step": 30.0}}),
    "backward": ([1e7 + 1.0, 1e7], {"method": "euler", "options": {"step_size": 0.1}}),
}


@pytest.mark.parametrize(("t", "way"), INDISTINCT.values(), ids=INDISTINCT)
def test_times_that_the_dtype_cannot_tell_apart_are_announced(t: list[float], way: dict[str, Any]) -> None:
    func = lambda t, y: -1e-3 * y  # noqa: E731
    with pytest.warns(
        UserWarning, match=r"torch.float32, which cannot tell these steps apart: count times from zero"
    ) as seen:
        odeint(func, torch.ones(1), torch.tensor(t, dtype=D), **way)
    assert seen[0].filename == __file__
    odeint(func, torch.ones(1, dtype=D), torch.tensor(t, dtype=D), **way)


def swaying(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(t) * y


def swaying_in_place(t: Tensor, y: Tensor) -> Tensor:
    t += 1.0
    return torch.cos(t - 1.0) * y


@every_way
def test_a_field_may_change_its_time(way: dict[str, Any]) -> None:
    def gradient(func: Any) -> tuple[Tensor, Tensor]:
        y0 = torch.ones(2, dtype=D, requires_grad=True)
        y = odeint(func, y0, [0.0, 0.55, 1.0], **way)
        return y.detach(), torch.autograd.grad(y[-1].sum(), y0)[0]

    for found, wanted in zip(gradient(swaying_in_place), gradient(swaying), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12)


def test_a_field_may_change_its_time_in_inference_mode() -> None:
    with torch.inference_mode():
        found, wanted = (
            odeint(func, torch.ones(2, dtype=D), [0.0, 1.0], **WAYS["rk4"]) for func in (swaying_in_place, swaying)
        )
        assert torch.allclose(found, wanted, rtol=1e-12)


@every_way
@pytest.mark.parametrize("wants", [True, False])
def test_a_solve_at_a_single_time_returns_a_tensor_of_its_own(way: dict[str, Any], wants: bool) -> None:
    y0 = torch.ones(2, dtype=D, requires_grad=wants)
    y = odeint(decay, y0, [0.5], **way)
    y.detach().mul_(3)
    assert y0.tolist() == [1.0, 1.0]
    if wants:
        y.sum().backward()
        assert y0.grad is not None and y0.grad.tolist() == [1.0, 1.0]


def test_a_loop_of_single_steps_warns_once_at_the_line_of_the_call() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for i in range(5):
            odeint(decay, torch.ones(1, dtype=D), [0.1 * i, 0.1 * i + 0.07], method="euler")
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("grad", [True, False])
def test_warnings_about_tolerances_name_the_line_of_the_call(grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.warns(UserWarning, match="no effect") as seen:
        odeint(decay, torch.ones(1), [0.0, 1.0], rtol=1e-3, **WAYS["rk4"])
    assert seen[0].filename == __file__
