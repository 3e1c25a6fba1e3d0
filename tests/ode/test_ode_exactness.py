"""Exact: the gradient of the discrete solve is that of `gradient="direct"`, for every scheme, stepper, direction and input."""

from typing import Any

import pytest
import torch

from revsolve import Restarts, Tableau, alf, method_names, odeint, plain, reversible, reversible_heun
from revsolve.schemes.names import scheme
from tests.equations import BACKWARD, EQUATIONS, FORWARD, Network, gradients, leaf, worst_difference

# Differences come from the order of summation only. Undone steps carry rounding of about 1e-16 each; 40 of them stay below.
EXACT = 1e-12

ALIASES = {"dop853"}
METHODS = [name for name in method_names() if name not in ALIASES]
REVERSIBLE = [name for name in METHODS if scheme(name).reversible]
ADAPTIVE = [name for name in METHODS if scheme(name).error_order is not None]
FEW = ["rev_rk4", "rev_bosh3", "reversible_heun", "alf4_yoshida", "leapfrog"]

FIXED: dict[str, Any] = {"options": {"step_size": 0.11}}
LOOSE: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3}
RESTARTS = {"auto": "auto", "none": None, "every 3": 3, "every step": 1}
STEPS_AND_RESTARTS = {
    **{f"fixed, {name}": (FIXED, restarts) for name, restarts in RESTARTS.items()},
    **{f"adaptive, {name}": (LOOSE, restarts) for name, restarts in RESTARTS.items()},
    "fixed, budget": (FIXED, Restarts(budget=4)),  # a budget needs a known number of steps
}


@pytest.mark.parametrize("times", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_is_direct(method: str, times: tuple[float, ...]) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, times, method=method, gradient="checkpoint", **FIXED)
    wanted = gradients(equation, times, method=method, gradient="direct", **FIXED)
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("times", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", REVERSIBLE)
def test_reversible_is_direct(method: str, times: tuple[float, ...]) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, times, method=method, gradient="reversible", **FIXED)
    wanted = gradients(equation, times, method=method, gradient="direct", **FIXED)
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("times", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_is_direct(method: str, times: tuple[float, ...]) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, times, method=method, **LOOSE)
    wanted = gradients(equation, times, method=method, gradient="direct", **LOOSE)
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize(("steps", "restarts"), STEPS_AND_RESTARTS.values(), ids=STEPS_AND_RESTARTS)
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun", "alf4_yoshida"])
def test_with_and_without_restarts(method: str, steps: dict[str, Any], restarts: Any, gradient: str) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, FORWARD, method=method, restarts=restarts, gradient=gradient, **steps)
    wanted = gradients(equation, FORWARD, method=method, restarts=restarts, gradient="direct", **steps)
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("times", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("equation", EQUATIONS.values(), ids=EQUATIONS)
@pytest.mark.parametrize("method", FEW)
def test_every_kind_of_state(method: str, equation: Any, times: tuple[float, ...], gradient: str) -> None:
    equation = equation()
    got = gradients(equation, times, method=method, gradient=gradient, **FIXED)
    wanted = gradients(equation, times, method=method, gradient="direct", **FIXED)
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("equation", EQUATIONS.values(), ids=EQUATIONS)
@pytest.mark.parametrize("method", ["rev_dopri5", "reversible_heun"])
def test_every_kind_of_state_adaptively(method: str, equation: Any) -> None:
    equation = equation()
    got = gradients(equation, FORWARD, method=method, **LOOSE)
    wanted = gradients(equation, FORWARD, method=method, gradient="direct", **LOOSE)
    assert worst_difference(got, wanted) < (EXACT, "")


MINE = Tableau(a=[[], [0.25], [-2, 3]], b=[1 / 6, 0, 5 / 6], c=[0, 0.25, 1], order=1, name="mine")
SCHEMES = {
    "plain(mine)": plain(MINE),
    "rev(mine)": reversible(MINE),
    "rev(mine, 0.9)": reversible(MINE, coupling=0.9),
    "alf(0.8)": alf(0.8),
    "reversible_heun of three": reversible_heun((0.5, -0.25, 0.75)),
}


@pytest.mark.parametrize("method", [MINE, *SCHEMES.values()], ids=["mine", *SCHEMES])
def test_schemes_of_the_user(method: Any) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, FORWARD, method=method, **FIXED)
    wanted = gradients(equation, FORWARD, method=method, gradient="direct", **FIXED)
    assert worst_difference(got, wanted) < (EXACT, "")


GRIDS: dict[str, dict[str, Any]] = {
    "step to each time": {},
    "steps that do not divide": {"step_size": 0.17},
    "given points": {"grid_constructor": lambda func, y0, t: t.new_tensor([0.0, 0.05, 0.4, 0.9, 1.3])},
}


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "alf"])
def test_every_kind_of_grid(method: str, options: dict[str, Any]) -> None:
    equation = EQUATIONS["module"]()
    got = gradients(equation, FORWARD, method=method, options=options)
    wanted = gradients(equation, FORWARD, method=method, options=options, gradient="direct")
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("method", FEW)
def test_unused_parameters_get_zeros(method: str, gradient: str) -> None:
    field, y0 = Network().double(), leaf(2, 3)
    t = torch.tensor(FORWARD, dtype=torch.float64)
    odeint(field, y0, t, method=method, gradient=gradient, **FIXED).sum().backward()
    assert not field.unused.weight.grad.any()
    assert not field.unused.bias.grad.any()
    assert field.net[0].weight.grad.all()


@pytest.mark.parametrize("seed", range(2))
def test_float32_network_over_a_thousand_steps(seed: int) -> None:
    """Reconstruction and summation in float32 leave a difference of about sqrt(1000) roundings of 6e-8."""
    torch.manual_seed(seed)
    width = 64
    net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
    y0 = torch.randn(16, 2, requires_grad=True)
    inputs = [y0, *net.parameters()]

    def flat_gradient(gradient: str) -> torch.Tensor:
        ys = odeint(
            lambda t, y: net(y),
            y0,
            torch.linspace(0, 10, 11),
            method="rev_rk4",
            options={"step_size": 0.01},
            gradient=gradient,
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(ys.square().mean(), inputs)])

    got, wanted = flat_gradient("reversible"), flat_gradient("direct")
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
