"""Controlled equations until an event: when and where, and the gradients of both, those of the path's data included."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import odeint_event
from revsolve.cde import cdeint
from revsolve.paths.control import HermitePath, LinearPath
from tests.cde_problems import CONTROLS, FORMS, KNOTS, MatrixField, ProductField, data
from tests.equations import worst_difference

ENDS = KNOTS[[0, -1]]
# Times are found to rounding, and closed forms differ by the error of the solve: below 1e-9 with these steps.
CLOSE = 1e-8
EXACT = 1e-12
RISING = torch.tensor([0.0, 0.9, 1.4, 1.5, 2.6, 2.9, 3.4], dtype=torch.float64)
PATHS: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda x: LinearPath(x, KNOTS),
    "hermite": lambda x: HermitePath(x, KNOTS),
    "natural": CONTROLS["natural"],
}
WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {"method": "rev_dopri5", "rtol": 1e-12, "atol": 1e-13},
    "checkpoint": {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12},
    "fixed": {"method": "rev_rk4", "options": {"step_size": 0.005}},
}


def grown(X: Any, z0: Tensor, level: Tensor, **solve: Any) -> tuple[Tensor, Tensor]:
    """When exp(X) passes a level, and where a second state is then, which feels the level but does not move the first."""

    def func(t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[0], torch.ones_like(z[0])]).unsqueeze(-1)

    event_t, zs = cdeint(X, func, z0, ENDS, event_fn=lambda t, z: z[0] - level, **solve)
    return event_t, zs[1, 1]


def closed(X: Any, z0: Tensor, level: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The same from X(t) - X(0) = log(level / z0), solved by a step of Newton's method from close by."""
    rise = torch.log(level / z0[0])
    t = near.detach()
    t = t - (X.evaluate(t) - X.evaluate(ENDS[0]) - rise)[0] / X.derivative(t).detach()[0]
    return t, z0[1] + rise


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("linear", "adaptive"),
        ("linear", "checkpoint"),
        *((path, way) for path in ("hermite", "natural") for way in WAYS),
    ],
)
def test_closed_forms(path: str, way: str) -> None:
    inputs = {
        "x": RISING[:, None].clone().requires_grad_(),
        "z0": torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True),
        "level": torch.tensor(4.4, dtype=torch.float64, requires_grad=True),
    }
    X = PATHS[path](inputs["x"])
    got = grown(X, inputs["z0"], inputs["level"], **WAYS[way])
    wanted = closed(X, inputs["z0"], inputs["level"], got[0])
    assert torch.allclose(torch.stack(got), torch.stack(wanted), rtol=0, atol=CLOSE)
    found = [gradients(outputs, inputs) for outputs in (got, wanted)]
    assert worst_difference(*found) < (CLOSE, "")


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    total = sum(weight * x.sum() for weight, x in zip((1.0, 2.0), outputs, strict=True))
    found = torch.autograd.grad(total, list(inputs.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def until(path: Callable[[Tensor], Any], field: type[MatrixField], **solve: Any) -> dict[str, Tensor]:
    """The gradients of when and where the states have come as far as a parameter says."""
    torch.manual_seed(0)
    x, func = data(), field()
    z0 = torch.full((2, 4), 0.1, dtype=torch.float64, requires_grad=True)
    level = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    event_t, zs = cdeint(
        path(x), func, z0, ENDS, event_fn=lambda t, z: z.square().sum() - level * torch.cos(t), **solve
    )
    return gradients((event_t, zs), {"x": x, "z0": z0, "level": level, **dict(func.named_parameters())})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf", "rev_bosh3"])
@pytest.mark.parametrize("path", ["linear", "natural", "hermite with gaps", "torchcde cubic"])
@pytest.mark.parametrize("field", [MatrixField, ProductField])
def test_gradient_is_that_of_the_discrete_event(field: type[MatrixField], path: str, method: str, form: str) -> None:
    way: dict[str, Any] = {"method": method, "options": {"form": form, "step_size": 0.3}}
    got, wanted = (until(CONTROLS[path], field, gradient=mode, **way) for mode in (None, "direct"))
    assert worst_difference(got, wanted) < (EXACT, "")


@pytest.mark.parametrize(
    "way", [{"method": "rev_bosh3", "rtol": 1e-3}, {"method": "reversible_heun"}], ids=["adaptive", "knots"]
)
@pytest.mark.parametrize("path", ["linear", "natural"])
def test_gradient_is_direct_on_other_steps(path: str, way: dict[str, Any]) -> None:
    got, wanted = (until(CONTROLS[path], MatrixField, gradient=mode, **way) for mode in (None, "direct"))
    assert worst_difference(got, wanted) < (EXACT, "")


def test_one_after_another() -> None:
    """Gradients reach the start of a second solve, which began where the first ended."""

    def times(gradient: str | None) -> dict[str, Tensor]:
        x = RISING[:, None].clone().requires_grad_()
        X, z, t = HermitePath(x, KNOTS), torch.ones(1, dtype=torch.float64), ENDS[0]
        for level in (2.0, 5.0):
            solver = functools.partial(cdeint, X)
            way: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.3}, "gradient": gradient}
            event = {"event_fn": lambda t, z, level=level: z[0] - level, "odeint_interface": solver}
            t, zs = odeint_event(lambda t, z: z.unsqueeze(-1), z, t, **event, **way)
            z = zs[1] * 0.5
        return gradients((t, z), {"x": x})

    assert worst_difference(times(None), times("direct")) < (EXACT, "")


def test_second_derivatives() -> None:
    x = RISING[:, None].clone().requires_grad_()
    level = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    event_t, _ = grown(LinearPath(x, KNOTS), torch.ones(2, dtype=torch.float64), level, **WAYS["adaptive"])
    (slope,) = torch.autograd.grad(event_t, level, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, level)
    # On the piece from (0.7, 0.9) to (1.0, 1.4): t = 0.7 + (log(level) - 0.9) 0.3 / 0.5.
    assert slope.item() == pytest.approx(0.6 / 3.0, abs=CLOSE)
    assert curvature.item() == pytest.approx(-0.6 / 9.0, abs=CLOSE)


def test_on_every_device(device: torch.device) -> None:
    x = RISING[:, None].clone().to(device).requires_grad_()
    X, z0 = HermitePath(x, KNOTS.to(device)), torch.ones(1, dtype=torch.float64, device=device)
    t = ENDS.clone().to(device).detach().requires_grad_()
    event_t, zs = cdeint(
        X,
        lambda t, z: z.unsqueeze(-1),
        z0,
        t,
        event_fn=lambda t, z: z - 3.0,
        method="rev_rk4",
        options={"step_size": 0.05},
    )
    assert event_t.device.type == zs.device.type == device.type
    slope, slope_t = torch.autograd.grad(event_t, (x, t))
    # X(t) - X(0) = log 3: moving all the data moves nothing, nor does moving t[1].
    assert slope.sum().item() == pytest.approx(0.0, abs=1e-6)
    assert slope_t[1].item() == 0.0


def test_full_output() -> None:
    X, z0 = LinearPath(RISING[:, None].expand(3, 7, 1), KNOTS), torch.ones(3, 1, dtype=torch.float64)
    event_t, solution = cdeint(
        X, lambda t, z: z.unsqueeze(-1), z0, ENDS, event_fn=lambda t, z: z.sum() - 12.0, full_output=True
    )
    assert torch.equal(solution.ts, torch.stack([ENDS[0], event_t]))
    assert solution.ys.shape == (3, 2, 1)
    assert solution.ys[:, 1].sum().item() == pytest.approx(12.0, abs=1e-12)
    assert {0.0, 0.7} <= set(solution.times)  # steps land on the kinks


RAISES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "never": (
        {"event_fn": lambda t, z: z[0] + 1},
        RuntimeError,
        r"no event by t = 3\.5.*or give the path over a longer",
    ),
    "never, fixed": (
        {"event_fn": lambda t, z: z[0] + 1, "method": "rev_rk4", "options": {"step_size": 0.3}},
        RuntimeError,
        r"no event by t = 3\.5.* after 12 steps",
    ),
    "begins at the end": ({"t": torch.tensor([3.5, 4.5])}, ValueError, "the path ends at t = 3.5, where the solve"),
    "begins outside": ({"t": torch.tensor([-1.0, 1.0])}, ValueError, "t = -1.0 lies outside the interval"),
    "a moving start and kinks": ({"t": ENDS.clone().requires_grad_()}, ValueError, r"but the field jumps at t = 0\.7"),
    "dense": ({"options": {"dense": True}}, ValueError, "unknown option 'dense'"),
    "three times": ({"t": KNOTS[:3]}, ValueError, "holds 3 times"),
}


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, kind, message = RAISES[case]
    arguments: dict[str, Any] = {"t": ENDS, "event_fn": lambda t, z: z[0] - 2, **changed}
    X, z0 = LinearPath(RISING[:, None], KNOTS), torch.ones(1, dtype=torch.float64)
    with pytest.raises(kind, match=message):
        cdeint(X, lambda t, z: z.unsqueeze(-1), z0, **arguments)
