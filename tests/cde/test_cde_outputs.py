"""Controlled equations between the steps (dense output), and at times of each sample's own."""

import itertools
import math
from typing import Any

import pytest
import torch
import torchcde
from torch import Tensor

from revsolve import Solution
from revsolve.cde import cdeint
from revsolve.paths.control import HermitePath, LinearPath
from tests.cde_problems import CONTROLS, FORMS, HIDDEN, KNOTS, MatrixField, ProductField, Wave, data, gradients_of
from tests.equations import worst_difference

ENDS = KNOTS[[0, -1]]
BETWEEN = torch.linspace(0, 3.5, 301, dtype=torch.float64)
EXACT = 1e-12
LINE = LinearPath(torch.tensor([0.0, 0.9, 0.4, 0.5, -0.6, 0.9, 0.4], dtype=torch.float64)[:, None], KNOTS)
CURVE = Wave(torch.tensor([0.3, 1.0, 0.5], dtype=torch.float64))


def growth(t: Tensor, z: Tensor) -> Tensor:
    """dz = z (dX0 + dX1 + ...)"""
    return z.unsqueeze(-1).expand(*z.shape, 3 if z.shape[-1] == 3 else 1)


def grown(X: Any, t: Tensor) -> Tensor:
    return torch.exp((X.evaluate(t) - X.evaluate(torch.zeros_like(t))).sum(-1))


def values(X: Any, t: Tensor) -> Tensor:
    return torch.stack([grown(X, s) for s in t])


def solved(X: Any, size: int, **way: Any) -> Solution:
    options = {"dense": True, **way.pop("options", {})}
    return cdeint(X, growth, torch.ones(size, dtype=torch.float64), ENDS, options=options, full_output=True, **way)


def error(X: Any, size: int, **way: Any) -> float:
    found = solved(X, size, **way).evaluate(BETWEEN)[:, 0]
    return float((found - values(X, BETWEEN)).abs().max())


@pytest.mark.parametrize(
    ("method", "form", "order"),
    [
        ("rev_bosh3", "derivative", 3),
        ("rev_rk4", "derivative", 4),
        ("reversible_heun", "derivative", 2),
        ("reversible_heun", "increment", 2),
    ],
)
def test_order_between_the_steps(method: str, form: str, order: int) -> None:
    coarse, fine = (error(CURVE, 3, method=method, options={"form": form, "step_size": 3.5 / n}) for n in (64, 128))
    assert abs(math.log2(coarse / fine) - order) < 0.35  # slopes scatter by this for so few steps


@pytest.mark.parametrize("method", ["tsit5", "rev_dopri5"])
def test_kinks_do_not_hurt(method: str) -> None:
    """Steps end at kinks, and so do the polynomials between them."""
    solution = solved(LINE, 1, method=method, rtol=1e-7, atol=1e-7)
    at = torch.tensor(solution.times, dtype=torch.float64)
    errors = [float((solution.evaluate(t)[:, 0] - values(LINE, t)).abs().max()) for t in (at, BETWEEN)]
    # A piece of one or two steps knows only two or three of them, one order or so less than the method.
    assert errors[1] < max(30 * errors[0], 1e-6)
    assert len(at) < 60


def test_the_derivative_jumps_with_the_path() -> None:
    solution = solved(LINE, 1, rtol=1e-9, atol=1e-9)
    t = torch.tensor([0.3, 0.7, 1.0, 3.5], dtype=torch.float64)
    slopes = torch.tensor([0.9 / 0.7, -0.5 / 0.3, 0.1 / 0.6, -0.5 / 0.9], dtype=torch.float64)  # of the piece after
    wanted = slopes * values(LINE, t)
    assert torch.allclose(solution.derivative(t)[:, 0], wanted, atol=1e-6)


def test_increments_know_a_straight_line_within_each_step() -> None:
    X = LinearPath(torch.tensor([0.0, 1.0, 0.0])[:, None])
    solution = cdeint(
        X,
        lambda t, z: torch.ones(1, 1),
        torch.zeros(1),
        X.interval,
        method="reversible_heun",
        options={"dense": True, "form": "increment", "step_size": 0.5},
        full_output=True,
    )
    assert solution.evaluate(torch.tensor([0.25, 0.5, 1.25])).flatten().tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert solution.derivative(torch.tensor([0.25, 1.25])).flatten().tolist() == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [{}, {"step_size": 0.3}], ids=["knots", "fixed"])
@pytest.mark.parametrize("field", [MatrixField, ProductField])
@pytest.mark.parametrize("control", ["linear", "natural", "torchcde linear"])
def test_dense_gradient_is_direct(control: str, field: type[MatrixField], steps: dict[str, Any], form: str) -> None:
    def gradients(gradient: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        x, z0, func = data(), torch.randn(2, HIDDEN, dtype=torch.float64).requires_grad_(), field()
        options = {"dense": True, "form": form, **steps}
        way: dict[str, Any] = {"method": "rev_midpoint", "options": options, "gradient": gradient}
        solution = cdeint(CONTROLS[control](x), func, z0, KNOTS[[0, 2, 6]], full_output=True, **way)
        t = torch.tensor([0.2, 1.7, 2.55], dtype=torch.float64, requires_grad=True)
        outputs = (solution.ys, solution.derivative(t))
        return gradients_of(outputs, {"x": x, "z0": z0, "t": t, **dict(func.named_parameters())})

    assert worst_difference(gradients(None), gradients("direct")) < (EXACT, "")


# Three samples: different lengths, one backwards, one that waits.
TIMES = ((0.0, 3.4, 0.2), (1.5, 2.8, 0.2), (2.3, 0.4, 0.9), (3.4, 0.1, 0.9))
LOOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
FIXED: dict[str, Any] = {"options": {"step_size": 0.11}}


def times() -> Tensor:
    return torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)


def three(control: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 3, dtype=torch.float64).requires_grad_()
    return x, control(x)


@pytest.mark.parametrize(
    "way",
    [FIXED, LOOSE, {"options": {"form": "increment", "step_size": 0.11}}],
    ids=["fixed", "adaptive", "increment"],
)
@pytest.mark.parametrize("field", [MatrixField, ProductField])
@pytest.mark.parametrize("control", ["hermite", "torchcde cubic"])
def test_gradient_of_each_is_direct(control: str, field: type[MatrixField], way: dict[str, Any]) -> None:
    def gradients(gradient: str | None) -> dict[str, Tensor]:
        x, X = three(CONTROLS[control])
        z0, func, t = torch.ones(3, HIDDEN, dtype=torch.float64).requires_grad_(), Timed(field()), times()
        zs = cdeint(X, func, z0, t, method="rev_bosh3", gradient=gradient, **way)
        assert zs.shape == (3, 4, HIDDEN)
        return gradients_of(zs, {"x": x, "z0": z0, "t": t, **dict(func.named_parameters())})

    assert worst_difference(gradients(None), gradients("direct")) < (EXACT, "")


class Timed(torch.nn.Module):
    """A field whose time is a column, so that every sample sees its own."""

    def __init__(self, field: MatrixField) -> None:
        super().__init__()
        self.field = field
        if isinstance(field, ProductField):
            self.prod = lambda t, z, dx: field.prod(t[:, None], z, dx)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field.forward(t[:, None], z)


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize(
    ("control", "form"),  # slopes at kinks would follow the rounding of times
    [("linear", "increment"), *itertools.product(["natural", "torchcde cubic"], FORMS)],
)
def test_each_sample_as_if_alone(control: str, form: str, sample: int) -> None:
    x, _ = three(CONTROLS[control])
    t, x, func = times().detach(), x.detach(), MatrixField()
    z0 = torch.rand(3, HIDDEN, dtype=torch.float64)

    def steps_of_its_own(func: Any, z0: Tensor, t: Tensor) -> Tensor:
        counts = [int(n) for n in torch.ceil(times().diff(dim=0).abs().amax(1) / 0.11).tolist()]
        inner = [a + (b - a) * i / n for (a, b), n in zip(itertools.pairwise(t), counts, strict=True) for i in range(n)]
        return torch.stack([*inner, t[-1]])

    way: dict[str, Any] = {"method": "rev_midpoint", "restarts": 3}
    together = cdeint(CONTROLS[control](x), Timed(func), z0, t, options={"step_size": 0.11, "form": form}, **way)
    options = {"grid_constructor": steps_of_its_own, "form": form}
    alone = cdeint(CONTROLS[control](x[sample, None]), func, z0[sample, None], t[:, sample], options=options, **way)
    # Times are rounded differently.
    assert torch.allclose(together[sample], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("control", ["linear", "hermite with gaps", "torchcde linear"])
def test_steps_land_on_the_kinks_of_every_sample(control: str) -> None:
    x = torch.randn(3, 7, 3, dtype=torch.float64)
    X, t, z0 = HIDDEN_LAST[control](x), times().detach(), torch.ones(3, 3, dtype=torch.float64)
    solution = cdeint(X, growth, z0, t, rtol=1e-8, atol=1e-9, full_output=True)
    wanted = torch.exp(sum_of(X, t) - sum_of(X, t[:1]))
    assert torch.allclose(solution.ys, wanted[..., None].expand(3, 4, 3), rtol=1e-6)
    # Without landing on them, an error of 1e-8 at a kink would take steps of 1e-8.
    assert solution.stats.num_rejected < solution.stats.num_steps


HIDDEN_LAST = {**CONTROLS, "hermite with gaps": lambda x: HermitePath(x, KNOTS, lengths=[7, 5, 6])}


def sum_of(X: Any, t: Tensor) -> Tensor:
    """The sum of the channels of every sample at its own times, (batch, T)."""
    return torch.stack([X.evaluate(t[:, b].contiguous())[b].sum(-1) for b in range(3)])


def test_gradient_of_the_times_of_each() -> None:
    x, X = three(CONTROLS["natural"])
    t, z0 = times(), torch.ones(3, 3, dtype=torch.float64)
    zs = cdeint(X, growth, z0, t, method="rk4", options={"step_size": 0.02})
    wanted = (sum_of(X, t) - sum_of(X, t[:1]))[..., None].expand(3, 4, 3)
    got, closed = (torch.autograd.grad(y.sum(), (t, x), retain_graph=True) for y in (zs.log(), wanted))
    # RK4 errs by 7e-3 with these steps, and by 0.2 with steps twice as long: the path is steep.
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(got, closed, strict=True))


@pytest.mark.parametrize("control", ["linear", "hermite", "torchcde cubic"])
def test_on_every_device(control: str, device: torch.device) -> None:
    x, knots = torch.randn(3, 7, 3, dtype=torch.float64, device=device), KNOTS.to(device)
    X = MADE[control](x, knots)
    z0, t = torch.ones(3, 3, dtype=torch.float64, device=device), times().detach().to(device)
    zs = cdeint(X, growth, z0, t, rtol=1e-6, atol=1e-8)
    dense = cdeint(X, growth, z0, knots[[0, -1]], rtol=1e-8, atol=1e-9, options={"dense": True}, full_output=True)
    begun, wanted = dense.evaluate(t[0].cpu()), dense.evaluate(t.cpu())  # (3, ..., 3)
    own = torch.arange(3, device=device)
    ratio = wanted[own, :, own] / begun[own, own][:, None]  # what grows from one time of a sample to another
    assert zs.device.type == ratio.device.type == device.type
    # Adaptive steps look at the whole batch, in which one sample grows five hundredfold.
    assert torch.allclose(zs, ratio, rtol=1e-3, atol=1e-3)


MADE: dict[str, Any] = {
    "linear": LinearPath,
    "hermite": HermitePath,
    "torchcde cubic": lambda x, knots: torchcde.CubicSpline(
        torchcde.hermite_cubic_coefficients_with_backward_differences(x, knots), knots
    ),
}


RAISES: dict[str, tuple[dict[str, Any], str]] = {
    "dense with kinks and moving times": (
        {"t": ENDS.clone().requires_grad_(), "options": {"dense": True}},
        r"but the field jumps at t = 0\.7",
    ),
    "kinks and moving times of each": ({"t": times()}, "dX/dt jumps .* times on the way"),
    "outside of the path": ({"t": times().detach() + 1}, "lies outside the interval"),
    "no step size": ({"t": times().detach(), "method": "rev_rk4"}, "'rev_rk4'"),
    "dense and each": ({"t": times().detach(), "options": {"dense": True}}, "'dense' has no meaning"),
}


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, message = RAISES[case]
    arguments: dict[str, Any] = {"method": "rev_dopri5", **changed}
    X, z0 = LinearPath(torch.randn(3, 7, 3, dtype=torch.float64), KNOTS), torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        cdeint(X, growth, z0, **arguments)
