"""Exact: the gradient of the discrete solve is that of `gradient="direct"`, for every scheme, control and way to step."""

from typing import Any

import pytest
import torch

from revsolve.cde import cdeint
from revsolve.paths.control import HermitePath, LinearPath, NaturalCubicPath
from revsolve.schemes.names import method_names, scheme
from tests.cde_problems import (
    BACKWARD,
    CONTROLS,
    FORMS,
    FORWARD,
    HIDDEN,
    KNOTS,
    MatrixField,
    ProductField,
    data,
    gradients,
    gradients_of,
    log_ode,
)
from tests.equations import worst_difference

# Differences come from the order of summation only; rounding of about 1e-16 an undone step stays far below.
EXACT = 1e-12

METHODS = [name for name in method_names() if name != "dop853"]
# Yoshida's substeps leave the step, and with the last step the path.
LEAVING = [name for name in METHODS if name.endswith(("yoshida", "s3"))]
REVERSIBLE = [name for name in METHODS if scheme(name).reversible and name not in LEAVING]
INSIDE = (0.9, 2.0, 2.9)
FEW = ["rev_rk4", "reversible_heun", "alf"]
FIXED: dict[str, Any] = {"step_size": 0.3}
KINKED: dict[str, dict[str, Any]] = {"linear": {}}  # where output times move, steps must end at the kinks


def assert_exact(control: str, times: tuple[float, ...], **solve: Any) -> None:
    wanted = gradients(CONTROLS[control], times, **{**solve, "gradient": "direct"})
    assert worst_difference(gradients(CONTROLS[control], times, **solve), wanted) < (EXACT, "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", REVERSIBLE)
def test_schemes(method: str, form: str) -> None:
    assert_exact("hermite", FORWARD, method=method, options={"form": form, **FIXED})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", LEAVING)
def test_schemes_whose_substeps_leave_the_step(method: str, form: str) -> None:
    assert_exact("hermite", INSIDE, method=method, options={"form": form, **FIXED})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "tsit5"])
def test_checkpoint(method: str, form: str) -> None:
    assert_exact("linear", FORWARD, method=method, gradient="checkpoint", options={"form": form, **FIXED})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("control", CONTROLS)
def test_controls(control: str, method: str, form: str) -> None:
    assert_exact(control, FORWARD, method=method, options={"form": form, **FIXED})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [*FEW, "reversible_heun4", "leapfrog"])
def test_backwards_in_time(method: str, form: str) -> None:
    assert_exact("linear", BACKWARD, method=method, options={"form": form})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [*FEW, "reversible_heun4", "leapfrog"])
@pytest.mark.parametrize("control", ["linear", "natural", "torchcde cubic", "no knots"])
def test_moving_times(control: str, method: str, form: str) -> None:
    assert_exact(control, FORWARD, moving=True, method=method, options={"form": form, **KINKED.get(control, FIXED)})


@pytest.mark.parametrize(("times", "moving"), [(FORWARD, False), (BACKWARD, True)])
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun", "alf"])
@pytest.mark.parametrize("control", ["linear with gaps", "natural", "torchcde linear", "no knots"])
def test_adaptive(control: str, method: str, times: tuple[float, ...], moving: bool) -> None:
    assert_exact(control, times, moving=moving, method=method, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_log_ode(depth: int, method: str, form: str) -> None:
    def solved(gradient: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        x, z0, func = data(), torch.randn(2, HIDDEN, dtype=torch.float64).requires_grad_(), MatrixField()
        path, field = log_ode(depth, x, func)
        zs = cdeint(path, field, z0, path.interval, method=method, gradient=gradient, options={"form": form})
        return gradients_of(zs, {"x": x, "z0": z0, **dict(func.named_parameters())})

    assert worst_difference(solved(None), solved("direct")) < (EXACT, "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
@pytest.mark.parametrize("path", [LinearPath, HermitePath, NaturalCubicPath])
def test_stacked(path: Any, method: str, form: str) -> None:
    """The solution of one equation is the control of the next."""

    def solved(gradient: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        x, first, second = data(), MatrixField(), MatrixField(HIDDEN, 2)
        z0, u0 = torch.randn(2, HIDDEN, dtype=torch.float64).requires_grad_(), torch.ones(2, 2, dtype=torch.float64)
        solve = {"method": method, "gradient": gradient, "options": {"form": form}}
        zs = cdeint(path(x, KNOTS), first, z0, KNOTS, **solve)
        us = cdeint(path(zs, KNOTS), second, u0, KNOTS[[0, -1]], **solve)
        inputs = {"x": x, "z0": z0, "first": first.map.weight, "second": second.map.weight}
        return gradients_of((zs, us), inputs)

    assert worst_difference(solved(None), solved("direct")) < (EXACT, "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf"])
def test_products(method: str, form: str) -> None:
    """A field known only by its products gives what the matrix gives."""

    def solved(field: type[MatrixField], gradient: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        x, z0, func = data(), torch.randn(2, HIDDEN, dtype=torch.float64).requires_grad_(), field()
        options = {"form": form, **FIXED}
        zs = cdeint(LinearPath(x, KNOTS), func, z0, KNOTS[[0, -1]], method=method, gradient=gradient, options=options)
        return gradients_of(zs, {"x": x, "z0": z0, **dict(func.named_parameters())})

    assert worst_difference(solved(ProductField, None), solved(MatrixField, "direct")) < (EXACT, "")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
def test_tuples(method: str, form: str) -> None:
    """Two states with a path each, each of which moves the other."""

    def solved(gradient: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        x, weight = data(), torch.randn(5, 5, dtype=torch.float64).requires_grad_()
        z0 = (
            torch.ones(2, 4, dtype=torch.float64).requires_grad_(),
            torch.ones(5, dtype=torch.float64).requires_grad_(),
        )

        def func(t: torch.Tensor, z: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mixed = torch.tanh(z[1] @ weight)
            return torch.sin(z[0] * mixed[0]).unsqueeze(-1).expand(2, 4, 3), (mixed + z[0].mean()).view(5, 1)

        paths = (LinearPath(x, KNOTS), HermitePath(x[0, :, :1], KNOTS))
        zs = cdeint(paths, func, z0, KNOTS[[0, -1]], method=method, gradient=gradient, options={"form": form})
        assert [z.shape for z in zs] == [(2, 2, 4), (2, 5)]
        return gradients_of(zs, {"x": x, "a": z0[0], "b": z0[1], "weight": weight})

    assert worst_difference(solved(None), solved("direct")) < (EXACT, "")


@pytest.mark.parametrize("form", FORMS)
def test_more_steps_than_a_table_holds(form: str) -> None:
    assert_exact("hermite", (0.0, 3.5), method="rev_midpoint", options={"form": form, "step_size": 3.5 / 40})


def test_random_products_are_replayed() -> None:
    class Dropping(ProductField):
        def prod(self, t: torch.Tensor, z: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().prod(t, z, dx), 0.5)

    func, z0 = Dropping(), torch.ones(2, HIDDEN, dtype=torch.float64).requires_grad_()
    X = LinearPath(data().detach(), KNOTS)
    # An inexact replay shows as a reconstruction that misses the stored states, which is a warning and thus an error here.
    solution = cdeint(X, func, z0, KNOTS, method="rev_rk4", restarts=4, full_output=True)
    solution.ys.sum().backward()
    assert solution.stats.reconstruction_error < EXACT
