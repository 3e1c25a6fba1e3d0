"""`cdeint` itself: what it returns, what it costs, its orders, what its increments are exact in, and what it refuses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchcde
from torch import Tensor

from revsolve.cde import cdeint
from revsolve.paths.control import Control, HermitePath, LinearPath, NaturalCubicPath
from tests.cde_problems import CHANNELS, FORMS, HIDDEN, KNOTS, MatrixField, Wave, data, log_ode, random_walk

ENDS = KNOTS[[0, -1]]


def rotation(t: Tensor, z: Tensor) -> Tensor:
    """dz0 = -z1 dX1, dz1 = z0 dX1, dz2 = (1 + z2) dX0: solved by an angle and an exponential."""
    zero = torch.zeros_like(z[..., 0])
    rows = [[zero, -z[..., 1], zero], [zero, z[..., 0], zero], [1 + z[..., 2], zero, zero]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rotated(moved: Tensor) -> Tensor:
    """The solution from (1, 0, 0) after the path has moved by `moved` (..., channels)."""
    angle = moved[..., 1]
    return torch.stack([torch.cos(angle), torch.sin(angle), torch.expm1(moved[..., 0])], -1)


def slope(errors: list[float], finer: float = 2.0) -> float:
    return math.log(errors[-2] / errors[-1], finer)


START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "form", "order"),
    [
        ("midpoint", "derivative", 2),
        ("rev_bosh3", "derivative", 3),
        ("rev_rk4", "derivative", 4),
        ("reversible_heun", "derivative", 2),
        ("reversible_heun4", "derivative", 4),
        ("alf", "derivative", 2),
        ("alf4", "derivative", 4),
        ("leapfrog", "derivative", 2),
        ("reversible_heun", "increment", 2),
        ("alf", "increment", 2),
    ],
)
def test_order_on_a_smooth_path(method: str, form: str, order: int) -> None:
    path = Wave(torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))
    wanted = rotated(path.evaluate(ENDS[1]) - path.evaluate(ENDS[0]))
    errors = [
        float(
            (
                cdeint(path, rotation, START, ENDS, method=method, options={"form": form, "step_size": 3.5 / n})[-1]
                - wanted
            ).norm()
        )
        for n in (32, 64, 128)
    ]
    assert abs(slope(errors) - order) < 0.2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "order"), [("reversible_heun", 2), ("rev_rk4", 4), ("reversible_heun4", 4)])
def test_order_on_a_rough_path(method: str, order: int, form: str) -> None:
    """Steps that divide the pieces of a piecewise-linear path see nothing of its kinks."""
    path = LinearPath(random_walk(9, 3, batch=1)[0] * 0.5, torch.linspace(0, 1, 9, dtype=torch.float64))
    wanted = rotated(path.evaluate(1.0) - path.evaluate(0.0))
    errors = [
        float(
            (
                cdeint(path, rotation, START, path.interval, method=method, options={"form": form, "step_size": 1 / n})[
                    -1
                ]
                - wanted
            ).norm()
        )
        for n in (32, 64, 128)
    ]
    assert abs(slope(errors) - order) < 0.3


@pytest.mark.parametrize("method", ["reversible_heun", "alf", "rev_rk4", "leapfrog"])
def test_increments_miss_nothing_of_the_path(method: str) -> None:
    """A constant matrix only adds up increments, however long the steps."""
    path = LinearPath(random_walk(101, 3, batch=2))
    matrix = torch.randn(4, 3, dtype=torch.float64)
    options = {"form": "increment", "step_size": 30.0}
    zs = cdeint(
        path,
        lambda t, z: matrix.expand(2, 4, 3),
        torch.zeros(2, 4, dtype=torch.float64),
        path.interval,
        method=method,
        options=options,
    )
    wanted = (path.evaluate(100.0) - path.evaluate(0.0)) @ matrix.T
    # Some forty roundings of numbers of order one.
    torch.testing.assert_close(zs[:, -1], wanted, rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_log_ode_of_depth_2_is_more_accurate_on_a_rough_path() -> None:
    x, matrix, z0 = random_walk(257, 2), MatrixField(2, 3).map, torch.ones(16, 3, dtype=torch.float64)

    def func(t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(matrix(z)).view(*z.shape, 2)

    t = torch.linspace(0, 3.5, 257, dtype=torch.float64)
    reference = cdeint(LinearPath(x, t), func, z0, t[[0, -1]], method="rk4")[:, -1]
    windows = t[::32]
    errors = []
    for depth in (1, 2):
        path, field = log_ode(depth, x, func, t, windows)
        end = cdeint(path, field, z0, windows[[0, -1]], method="rev_rk4")[:, -1]
        errors.append(float((end - reference).norm(dim=-1).mean()))
    # Strong orders 1/2 and 1 at windows of 1/8 of the time: a factor of about sqrt(8), here with a margin.
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("path", [HermitePath, NaturalCubicPath])
def test_agrees_with_torchcde(path: Any) -> None:
    coefficients = {
        HermitePath: torchcde.hermite_cubic_coefficients_with_backward_differences,
        NaturalCubicPath: torchcde.natural_cubic_coeffs,
    }[path]
    x, func, z0 = data().detach(), MatrixField(), torch.ones(2, HIDDEN, dtype=torch.float64)
    t = torch.arange(7, dtype=torch.float64)
    theirs = torchcde.CubicSpline(coefficients(x, t), t)
    wanted = torchcde.cdeint(theirs, func, z0, t, adjoint=False, method="midpoint", options={"step_size": 0.5})
    for control in (theirs, path(x, t)):
        got = cdeint(control, func, z0, t, adjoint=False, method="midpoint", options={"step_size": 0.5})
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "per_step"),
    [("reversible_heun", 1), ("alf", 1), ("rev_rk4", 8), ("rev_midpoint", 4)],
)
def test_evaluations(method: str, per_step: int) -> None:
    calls = 0

    class Counting(MatrixField):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().forward(t, z)

    X = LinearPath(random_walk(41, CHANNELS, batch=2))
    z0 = torch.ones(2, HIDDEN, dtype=torch.float64)
    solution = cdeint(X, Counting(), z0, X.interval, method=method, restarts=None, full_output=True)
    forward, calls = calls, 0
    solution.ys.sum().backward()
    # The first step of methods that keep a value or a velocity needs one more.
    assert 40 * per_step <= forward <= 40 * per_step + 1
    assert calls == forward == solution.stats.num_evaluations
    assert solution.times == X.grid_points.tolist()


class Watched(Control):
    """A path that counts how often it is asked what."""

    def __init__(self, path: Control) -> None:
        self.path, self.asked = path, {"one": 0, "many": 0}

    interval = property(lambda self: self.path.interval)
    grid_points = property(lambda self: self.path.grid_points)
    knots = property(lambda self: self.path.knots)
    jump_times = property(lambda self: self.path.jump_times)
    jumps = property(lambda self: self.path.jumps)
    tensors = property(lambda self: self.path.tensors)

    def evaluate(self, t: Any) -> Tensor:
        return self.path.evaluate(t)

    def derivative(self, t: Any, *, span: Any = None) -> Tensor:
        self.asked["one"] += 1
        return self.path.derivative(t, span=span)

    def increment(self, t0: Any, t1: Any) -> Tensor:
        self.asked["one"] += 1
        return self.path.increment(t0, t1)

    def derivatives(self, times: Any, *, spans: Any = None) -> Tensor:
        self.asked["many"] += 1
        return self.path.derivatives(times, spans=spans)

    def increments(self, grid: Any) -> Tensor:
        self.asked["many"] += 1
        return self.path.increments(grid)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "leapfrog"])
def test_a_fixed_grid_asks_the_path_once(method: str, form: str) -> None:
    X = Watched(HermitePath(data(), KNOTS))
    z0 = torch.ones(2, HIDDEN, dtype=torch.float64)
    cdeint(X, MatrixField(), z0, KNOTS, method=method, options={"form": form}).sum().backward()
    assert X.asked == {"one": 0, "many": 1}


def test_adaptive_steps_land_on_the_kinks() -> None:
    X = LinearPath(data().detach(), KNOTS)
    solution = cdeint(X, MatrixField(), torch.ones(2, HIDDEN, dtype=torch.float64), ENDS, full_output=True)
    assert set(KNOTS.tolist()) <= set(solution.times)
    assert solution.ys.shape == (2, 2, HIDDEN)


def test_knots_stay_put_when_output_times_move() -> None:
    """dz = A dX ends at A (X(T) - X(0)), and nothing but the last piece tells how that changes with T."""
    x, T = data().detach()[0], torch.tensor([0.0, 3.0], dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(HIDDEN, CHANNELS, dtype=torch.float64)
    zs = cdeint(
        LinearPath(x, KNOTS), lambda t, z: matrix, torch.zeros(HIDDEN, dtype=torch.float64), T, method="rev_rk4"
    )
    (grad,) = torch.autograd.grad(zs[-1].sum(), T)
    pieces = x.diff(dim=0) / KNOTS.diff().unsqueeze(-1)
    wanted = torch.stack([-(matrix @ pieces[0]).sum(), (matrix @ pieces[-1]).sum()])
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
def test_batches_of_any_shape(shape: tuple[int, ...]) -> None:
    x, z0 = torch.randn(*shape, 7, CHANNELS, dtype=torch.float64), torch.randn(*shape, HIDDEN, dtype=torch.float64)
    func = MatrixField()
    zs = cdeint(
        LinearPath(x),
        func,
        z0,
        torch.tensor([0.0, 3.0, 6.0], dtype=torch.float64),
        method="reversible_heun",
        restarts=3,
    )
    assert zs.shape == (*shape, 3, HIDDEN)
    alone = LinearPath(x.reshape(-1, 7, CHANNELS)[0])
    one = cdeint(alone, func, z0.reshape(-1, HIDDEN)[0], alone.interval, method="reversible_heun", restarts=3)
    torch.testing.assert_close(zs.reshape(-1, 3, HIDDEN)[0, -1], one[-1], rtol=1e-12, atol=1e-12)


def test_autocast_rounds_the_field_alone() -> None:
    x, func, z0 = random_walk(11, CHANNELS, batch=2).float(), MatrixField().float(), torch.ones(2, HIDDEN)
    X = LinearPath(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zs = cdeint(X, func, z0, X.interval, method="reversible_heun")
    assert zs.dtype == torch.float32
    # bfloat16 resolves 0.4 % of a field whose effect is of order one.
    torch.testing.assert_close(zs, cdeint(X, func, z0, X.interval, method="reversible_heun"), rtol=0.02, atol=0.02)


X, Z0 = LinearPath(torch.randn(2, 7, CHANNELS, dtype=torch.float64), KNOTS), torch.ones(2, HIDDEN, dtype=torch.float64)
CALL: dict[str, Any] = {"X": X, "func": MatrixField(), "z0": Z0, "t": KNOTS, "method": "reversible_heun"}
UNSORTED = torchcde.LinearInterpolation(torch.randn(2, 3, CHANNELS, dtype=torch.float64), KNOTS[:3])
UNSORTED._t = KNOTS[[0, 2, 1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"func": 3}, TypeError, "func must be callable as func.t, z., or have a method prod"),
        (
            {"func": lambda t, z: z},
            ValueError,
            r"must return \(\.\.\., hidden, channels\) = \(2, 4, 3\).*returned \(2, 4\)",
        ),
        ({"func": lambda t, z: (z, z)}, TypeError, "func must return tensors, but it returned tuple"),
        (
            {"func": lambda t, z: torch.ones(2, 4, 3)},
            TypeError,
            "the dtype of z0, torch.float64, but it returned torch.float32",
        ),
        (
            {"z0": Z0[:1]},
            ValueError,
            r"X\(t\) of shape .* \(2, 3\) and z0 of shape .* \(1, 4\) must have the same leading",
        ),
        ({"z0": Z0[0, 0]}, ValueError, r"z0 of shape \(\.\.\., hidden\) = \(\) must have"),
        ({"z0": Z0.float()}, TypeError, "X is of torch.float64 on cpu, but z0 of torch.float32 on cpu"),
        ({"z0": (Z0, Z0)}, ValueError, r"z0 holds 2 state\(s\) and X 1 path"),
        ({"t": KNOTS + 1}, ValueError, r"t = 4.5 lies outside the interval \[0.0, 3.5\] of the path"),
        ({"t": 1.0}, TypeError, "t must be a 1-D tensor or a list of numbers, .* but it is 1.0"),
        ({"t": KNOTS.flip(0)[[0, 2, 1]]}, ValueError, "t must be strictly monotone"),
        ({"X": UNSORTED, "t": KNOTS[:1]}, ValueError, "knots of X must be strictly increasing, but knot 2 at 0.7"),
        ({"X": object()}, TypeError, "a control needs evaluate, derivative and interval, but object lacks"),
        ({"options": {"form": "slope"}}, ValueError, "option form must be one of 'derivative', 'increment'"),
        ({"options": {"froms": "increment"}}, ValueError, "unknown option 'froms'.*did you mean 'form'"),
        (
            {"options": {"form": "increment"}, "rtol": 1e-3},
            ValueError,
            "form='increment' takes fixed steps, but rtol or atol",
        ),
        ({"adjoint": False, "gradient": "reversible"}, ValueError, "adjoint=False means gradient='direct'"),
        (
            {"t": KNOTS.clone().requires_grad_(), "method": "rev_rk4"},
            ValueError,
            r"t\[1\] = 0.7 lies where dX/dt jumps",
        ),
        (
            {"t": ENDS.clone().requires_grad_(), "method": "rev_rk4", "options": {"step_size": 0.01}},
            ValueError,
            "dX/dt jumps at 0.7, within a step that moves",
        ),
    ],
)
def test_messages(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cdeint(**{**CALL, **change})


def test_all_nan_channel() -> None:
    x = torch.randn(2, 7, 3).index_fill(-1, torch.tensor([1]), torch.nan)
    with pytest.raises(ValueError, match=r"channel 1 of sample \[0\] has no observation at all"):
        LinearPath(x)


LATER = {
    "hidden": lambda f: f[..., :1, :],
    "channels": lambda f: f[..., :1],
    "dimensions": lambda f: f.unsqueeze(0),
    "dtype": lambda f: f.float(),
    "no tensor": lambda f: None,
}


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "rk4"])
@pytest.mark.parametrize("name", LATER)
def test_a_field_that_changes_its_form_later_is_refused(name: str, method: str) -> None:
    path = LinearPath(torch.randn(3, 4, 2, dtype=torch.float64))
    matrix = lambda z: torch.tanh(z)[..., None] * torch.ones(2, dtype=torch.float64)  # noqa: E731
    func = lambda t, z: matrix(z) if t < 1.5 else LATER[name](matrix(z))  # noqa: E731
    with pytest.raises((ValueError, TypeError), match=r"func must return .*, but it returned"):
        cdeint(path, func, torch.zeros(3, 5, dtype=torch.float64), path.interval, method=method)


def test_products_may_change_their_increment_in_place() -> None:
    class Products:
        def __init__(self, half: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.half = half

        def prod(self, t: torch.Tensor, z: torch.Tensor, dX: torch.Tensor) -> torch.Tensor:
            return torch.tanh(z) + self.half(dX).sum(-1, keepdim=True)

    path = LinearPath(torch.randn(3, 6, 2, dtype=torch.float64))

    def solve(half: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        z0 = torch.zeros(3, 5, dtype=torch.float64)
        return cdeint(path, Products(half), z0, path.interval, method="rev_rk4")

    assert torch.equal(solve(lambda dX: dX.mul_(0.5)), solve(lambda dX: dX * 0.5))


def test_a_small_part_of_the_knots_is_worth_a_warning() -> None:
    path = LinearPath(torch.randn(3, 100, 2))
    with pytest.warns(UserWarning, match="t covers less than a tenth of the 100 knots of X"):
        cdeint(path, lambda t, z: z[..., None].expand(3, 5, 2), torch.zeros(3, 5), [0.0, 1.0], method="rk4")
