"""Times of jumps: a step that ends at one sees the field just before it, the next one sees it just after."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import cdeint, method_names, odeint
from revsolve.paths.control import HermitePath
from revsolve.schemes.names import scheme

JUMP = 0.5
OUTSIDE = {"alf4_yoshida", "alf4_s3", "reversible_heun4_yoshida", "reversible_heun4_s3"}  # evaluate beyond their steps
ADAPTIVE = [name for name in method_names() if scheme(name).error_order is not None and name not in OUTSIDE]
SIDES = {"before": torch.gt, "after": torch.ge}  # which of the two owns the jump itself


def field(side: str = "after", jump: float = JUMP) -> Any:
    """y' = -y, then y' = 10 - y: the solution is known."""
    return lambda t, y: torch.where(SIDES[side](t, jump), 10.0, 0.0).to(y) - y


def solution(t: float, jump: float = JUMP) -> float:
    return math.exp(-t) if t <= jump else 10 + (math.exp(-jump) - 10) * math.exp(jump - t)


def solved(times: list[float], y0: float = 1.0, dtype: torch.dtype = torch.float64, **way: Any) -> Any:
    func = way.pop("func", field())
    options = {"jump_t": JUMP, **way.pop("options", {})}
    return odeint(func, torch.tensor([y0], dtype=dtype), times, options=options, full_output=True, **way)


def error(found: Any, times: list[float], jump: float = JUMP) -> float:
    return max(abs(float(y) - solution(t, jump)) for y, t in zip(found.ys[:, 0], times, strict=True))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps_are_those_of_the_two_pieces(method: str, side: str) -> None:
    """About as many evaluations as if the solve had ended at the jump and begun anew, and the same accuracy."""
    times, way = [0.0, 0.3, 0.8, 1.0], {"method": method, "rtol": 1e-4, "atol": 1e-6}
    found = solved(times, func=field(side), **way)
    first = solved([0.0, 0.3, JUMP], func=lambda t, y: -y, options={"jump_t": None}, **way)
    second = solved([JUMP, 0.8, 1.0], solution(JUMP), func=lambda t, y: 10.0 - y, options={"jump_t": None}, **way)
    apart = first.stats.num_evaluations + second.stats.num_evaluations
    assert found.stats.num_evaluations < 1.5 * apart + 30
    assert error(found, times) < 3 * max(error(first, [0.0, 0.3, JUMP]), error(second, [JUMP, 0.8, 1.0])) + 1e-5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "method",
    ["bosh3", "dopri5", "rev_dopri5", "rev_rk4", "reversible_heun", "reversible_heun4", "alf", "alf4", "leapfrog"],
)
def test_fixed_steps_keep_their_order(method: str, side: str) -> None:
    """Steps of 0.07 do not meet the jump by themselves; those of leapfrog are to be equal."""
    times, h = ([0.0, 1.0], 0.1) if method == "leapfrog" else ([0.0, 0.3, 1.1], 0.07)
    coarse, fine = (
        error(solved(times, method=method, func=field(side), options={"step_size": h}), times) for h in (h, h / 2)
    )
    order = scheme(method).order
    assert math.log2(coarse / fine) > order - 0.5 or fine < 1e-9


@pytest.mark.parametrize("method", ["dopri5", "rev_dopri5", "rev_rk4", "reversible_heun", "alf4", "leapfrog"])
def test_backward_in_time(method: str) -> None:
    steps: dict[str, Any] = (
        {"options": {"step_size": 0.005}} if method in ("rev_rk4", "leapfrog") else {"rtol": 1e-7, "atol": 1e-8}
    )
    found = solved([1.0, 0.0], solution(1.0), method=method, **steps)
    assert float(found.ys[-1]) == pytest.approx(1.0, abs=2e-4)


GRADIENTS = {"adaptive": {"rtol": 1e-3, "atol": 1e-3}, "fixed": {"options": {"step_size": 0.11}}}


@pytest.mark.parametrize("times", [[0.0, 0.2, 1.3], [1.3, 0.2, 0.0]], ids=["forward", "backward"])
@pytest.mark.parametrize("steps", GRADIENTS)
@pytest.mark.parametrize("method", ["rev_bosh3", "rev_heun2", "reversible_heun", "alf", "alf4", "leapfrog"])
def test_gradient_is_direct(method: str, steps: str, times: list[float]) -> None:
    if method in ("leapfrog", "rev_heun2") and steps == "adaptive":
        pytest.skip("has no error estimate")

    def gradients(mode: str | None) -> list[Tensor]:
        rate, y0 = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.3, 0.7))
        t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
        func = lambda t, y: torch.where(t < JUMP, -rate * y, rate * torch.cos(3 * t) + y)  # noqa: E731
        way = GRADIENTS[steps]
        options = {"jump_t": [JUMP], **way.get("options", {})}
        ys = odeint(func, y0, t, method=method, gradient=mode, **{**way, "options": options})
        return list(torch.autograd.grad(ys[1].sum() + 2 * ys[2].sum(), (rate, y0, t)))

    for found, wanted in zip(gradients(None), gradients("direct"), strict=True):
        assert float((found - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("method", ["dopri5", "rev_dopri5"])
def test_gradient_of_the_times_is_the_field_there(method: str) -> None:
    t = torch.tensor([0.0, 0.2, 1.3], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    ys = odeint(field(), y0, t, method=method, rtol=1e-10, atol=1e-10, options={"jump_t": [JUMP]})
    (found,) = torch.autograd.grad(ys[1:].sum(), t)
    # Moving t[0] moves the start alone: y(t) = exp(t0 - t) up to the jump, and then on.
    first = solution(0.2) + solution(JUMP) * math.exp(JUMP - 1.3)
    assert found.tolist() == pytest.approx([first, -solution(0.2), 10 - solution(1.3)], abs=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_moving_output_at_a_jump_is_refused(place: int) -> None:
    times = [0.1, 0.4, 0.9]
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=rf"t\[{place}\] = {times[place]} lies where"):
        odeint(field(), torch.ones(1, dtype=torch.float64), t, options={"jump_t": [times[place]]})


@pytest.mark.parametrize(
    "way",
    [{"method": "rev_rk4", "options": {"step_size": 0.1}}, {"rtol": 1e-8, "atol": 1e-8}],
    ids=["fixed", "adaptive"],
)
def test_dense_output_ends_its_polynomials_there(way: dict[str, Any]) -> None:
    times = [0.0, 1.0]
    found = solved(times, **{**way, "options": {"dense": True, **way.get("options", {})}})
    between = torch.linspace(0, 1, 201, dtype=torch.float64)
    wanted = torch.tensor([solution(float(t)) for t in between], dtype=torch.float64)
    assert float((found.evaluate(between)[:, 0] - wanted).abs().max()) < 1e-5
    eps = 1e-9
    assert float(found.derivative(JUMP - eps)) == pytest.approx(-solution(JUMP), abs=1e-3)
    assert float(found.derivative(JUMP)) == pytest.approx(10 - solution(JUMP), abs=1e-3)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sides_are_told_in_the_dtype_of_the_field(dtype: torch.dtype, offset: float) -> None:
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.where(t < offset + 0.3, 0.0, 1.0).to(y) + 0 * y

    t = torch.tensor([offset, offset + 1.0], dtype=torch.float64)
    y = odeint(
        func, torch.zeros(1, dtype=dtype), t, method="dopri5", rtol=1e-4, atol=1e-5, options={"jump_t": [offset + 0.3]}
    )
    assert float(y[-1]) == pytest.approx(0.7, abs=1e-4)
    jump = torch.tensor(offset + 0.3, dtype=dtype)
    assert float(jump) not in seen
    assert float(torch.nextafter(jump, torch.full_like(jump, -math.inf))) in seen
    assert float(torch.nextafter(jump, torch.full_like(jump, math.inf))) in seen


def test_a_jump_costs_two_evaluations_at_most() -> None:
    """The value at the end of a step is not that at the beginning of the next."""
    smooth = lambda t, y: torch.cos(3 * t) * y  # noqa: E731
    with_jump, without = (
        solved([0.0, 0.5, 1.0], func=smooth, method="rev_dopri5", rtol=1e-6, atol=1e-6, options={"jump_t": jump}).stats
        for jump in (JUMP, None)
    )
    assert 0 <= with_jump.num_evaluations - without.num_evaluations <= 2


def test_many_jumps() -> None:
    """A field that changes its sign twenty times, known by its integral."""
    jumps = torch.arange(1, 20, dtype=torch.float64) / 20
    func = lambda t, y: torch.where((t >= jumps).sum() % 2 == 0, 1.0, -1.0).to(y) + 0 * y  # noqa: E731
    y = odeint(
        func,
        torch.zeros(1, dtype=torch.float64),
        [0.0, 1.0],
        method="dopri5",
        options={"jump_t": jumps},
        full_output=True,
    )
    assert float(y.ys[-1]) == pytest.approx(0.0, abs=1e-12)
    assert y.stats.num_rejected == 0


def test_an_event_after_a_jump() -> None:
    event_t, ys = odeint(
        field(),
        torch.ones(1, dtype=torch.float64),
        [0.0, 1.0],
        event_fn=lambda t, y: y - 5.0,
        options={"jump_t": [JUMP]},
    )
    assert float(event_t) == pytest.approx(JUMP + math.log((10 - math.exp(-JUMP)) / 5), abs=1e-6)
    assert float(ys[1]) == pytest.approx(5.0, abs=1e-6)


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_event_at_a_jump(dtype: torch.dtype, wants: bool) -> None:
    y0 = torch.ones(1, dtype=dtype, requires_grad=wants)
    func = lambda t, y: torch.where(t < JUMP, 0.0, 1e3).to(y) - y  # noqa: E731
    event_t, ys = odeint(func, y0, [0.0, 1.0], event_fn=lambda t, y: t - JUMP, options={"jump_t": JUMP})
    assert float(event_t.detach()) == pytest.approx(JUMP, abs=1e-6)
    assert float(ys[1].detach()) == pytest.approx(math.exp(-JUMP), abs=1e-4)
    if wants:
        (found,) = torch.autograd.grad(ys[1].sum(), y0)
        assert float(found) == pytest.approx(math.exp(-JUMP), abs=1e-4)


@pytest.mark.parametrize("way", [{"rtol": 1e-8, "atol": 1e-8}, {"method": "rev_rk4"}, {"method": "alf4"}], ids=str)
def test_jumps_of_the_field_of_a_controlled_equation(way: dict[str, Any]) -> None:
    X = HermitePath(torch.linspace(0, 1, 5, dtype=torch.float64)[:, None], torch.linspace(0, 1, 5, dtype=torch.float64))
    func = lambda t, z: (torch.where(t < 0.55, 0.0, 10.0).to(z) - z)[..., None]  # noqa: E731
    way = {**way, "options": {"jump_t": [0.55], **({} if "rtol" in way else {"step_size": 0.01})}}
    found = cdeint(X, func, torch.ones(1, dtype=torch.float64), [0.0, 1.0], full_output=True, **way)
    assert float(found.ys[-1]) == pytest.approx(solution(1.0, 0.55), abs=1e-5)
    assert found.stats.num_rejected < 4 or "rtol" not in way


@pytest.mark.parametrize("method", method_names())
def test_adaptive_steps_meet_their_tolerance_at_a_jump_or_are_refused(method: str) -> None:
    if scheme(method).error_order is None:
        pytest.skip("has no error estimate")
    tight = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    if scheme(method).stays_inside:
        assert error(solved([0.0, 1.0], **tight), [0.0, 1.0]) < 1e-3
        return
    with pytest.raises(ValueError, match="evaluates the field outside of its steps"):
        solved([0.0, 1.0], **tight)
    solved([0.0, 0.4], options={"jump_t": [JUMP]}, **tight)  # no jump in between
