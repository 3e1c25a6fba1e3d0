"""What torch may be told for the whole program does not change what a solve gives.

The default device "meta" stands for one that is not the state's: nothing that was made there by mistake can be computed with.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import (
    SDE,
    BrownianPath,
    HermitePath,
    LinearPath,
    NaturalCubicPath,
    cdeint,
    fixed_point,
    odeint,
    odeint_event,
    sdeint,
)
from revsolve.backends.inductor.programs import PROGRAMS

torch.manual_seed(0)
WEIGHT = torch.randn(2, 2, requires_grad=True)
Y0 = torch.randn(3, 2, requires_grad=True)
T = torch.tensor([0.0, 0.4, 1.0])
MOVING = T.clone().requires_grad_()
OF_EACH = torch.stack([T, T * 0.5, T * 0.7], dim=1)
DATA = torch.randn(3, 5, 2).cumsum(1)
START = torch.zeros(1)
STEPS = {"options": {"step_size": 0.1}}
EAGER = {"backend": "eager"}


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ WEIGHT) * torch.cos(t).reshape(-1, 1)


def noise(t: Tensor, y: Tensor) -> Tensor:
    return 0.3 * torch.sigmoid(y @ WEIGHT)


def matrix(t: Tensor, z: Tensor) -> Tensor:
    return 0.3 * torch.tanh(z @ WEIGHT).unsqueeze(-1) * z.unsqueeze(-2)


def ode(t: Tensor = T, **settings: Any) -> Callable[[], Tensor]:
    return lambda: odeint(field, Y0, t, **{"method": "rev_rk4", **STEPS, **settings})


def sde(equation: Any = (field, noise), **settings: Any) -> Callable[[], Tensor]:
    path = BrownianPath(0.0, 1.0, (3, 2), seed=1, levy_area="space-time")
    return lambda: sdeint(equation, Y0, T, **{"dt": 0.1, "bm": path, **settings})


def cde(path: Any, **settings: Any) -> Callable[[], Tensor]:
    return lambda: cdeint(path(DATA, torch.linspace(0, 1, 5, device="cpu")), matrix, Y0, T, **settings)


def deq(**settings: Any) -> Callable[[], Tensor]:
    return lambda: fixed_point(
        lambda z: 0.5 * torch.tanh(z @ WEIGHT) + 0.1, Y0, **{"max_steps": 60, "tol": 1e-4, **settings}
    )


def own_noise() -> Tensor:
    torch.manual_seed(1)
    return sdeint((field, noise), Y0, T, dt=0.1)


def event() -> Tensor:
    stop = lambda t, y: (y - Y0).square().sum() - 0.1  # noqa: E731
    found, ys = odeint_event(field, Y0, START, event_fn=stop, method="rev_dopri5")
    return found + ys.sum()


def dense() -> Tensor:
    solution = odeint(field, Y0, T, method="rev_dopri5", options={"dense": True}, full_output=True)
    return solution.evaluate(T[1])


SOLVES: dict[str, Callable[[], Tensor]] = {
    "ode": ode(),
    "ode, one evaluation": ode(method="reversible_heun"),
    "ode, checkpoint": ode(method="rk4"),
    "ode, adaptive": ode(method="rev_dopri5", options=None),
    "ode, numbers as tolerances": ode(method="rev_dopri5", options=None, rtol=1e-4, atol=1e-5),
    "ode, times": ode(MOVING),
    "ode, times, checkpoint": ode(MOVING, gradient="checkpoint"),
    "ode, times of each": ode(OF_EACH),
    "ode, steps of each": ode(OF_EACH, method="rev_dopri5", options={"steps_of_each": True}),
    "ode, programs": ode(compile=EAGER),
    "ode, programs, adaptive": ode(method="rev_dopri5", options=None, compile=EAGER),
    "ode, programs, checkpoint": ode(method="rk4", compile=EAGER),
    "ode, event": event,
    "ode, dense": dense,
    "sde": sde(),
    "sde, Ito": sde(SDE(field, noise, sde_type="ito")),
    "sde, area": sde(method="rev_slowrk"),
    "sde, own noise": own_noise,
    "sde, adaptive": sde(adaptive=True, rtol=1e-2, atol=1e-2),
    "sde, programs": sde(compile=EAGER),
    "cde, linear": cde(LinearPath),
    "cde, Hermite": cde(HermitePath),
    "cde, natural": cde(NaturalCubicPath, method="reversible_heun", options={"form": "increment"}),
    "cde, adaptive": cde(HermitePath, method="rev_dopri5"),
    "deq": deq(),
    "deq, steps": deq(tol=0.0, max_steps=10),
    "deq, implicit": deq(method="anderson", gradient="implicit", options={"b_method": "gmres"}),
}


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.filterwarnings("ignore:.*[Aa]nomaly")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SOLVES)
def test_a_solve_stays_the_same(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROGRAMS, "known", {})  # programs are made under the setting
    with SETTINGS[setting]():
        found = gradients(SOLVES[name])
    for got, wanted in zip(found, gradients(SOLVES[name]), strict=True):
        torch.testing.assert_close(got, wanted)


def gradients(solve: Callable[[], Tensor]) -> list[Tensor]:
    found = solve()
    wanted = [Y0, WEIGHT, MOVING]
    return [found, *torch.autograd.grad(found.square().sum(), wanted, materialize_grads=True)]
