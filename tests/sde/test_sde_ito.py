"""Ito equations are converted exactly: the correction against formulas, and solutions against known ones."""

from collections.abc import Callable
from contextlib import nullcontext
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import SDE, BrownianPath, sdeint
from revsolve.sde.derivative import differentiated
from revsolve.sde.ito import Shift, shift_of

pytestmark = pytest.mark.usefixtures("float64")
WEIGHT = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6], [0.7, 0.2, 0.3]], dtype=torch.float64)


def own(y: Tensor) -> Tensor:
    return torch.sin(y) + 2


def mixing(y: Tensor) -> Tensor:
    return torch.tanh(y @ WEIGHT.T)


def matrix(y: Tensor) -> Tensor:
    return torch.stack((y.roll(1, -1) * y, torch.cos(y)), -1)


def column(y: Tensor) -> Tensor:
    return mixing(y).unsqueeze(-1)


def constant(y: Tensor) -> Tensor:
    return torch.ones(*y.shape)


def full_correction(g: Tensor, jacobian: Tensor) -> Tensor:
    """-1/2 sum_{j,l} (d g_il / d y_j) g_jl for one sample: g (d, m), jacobian (d, m, d)."""
    return -0.5 * torch.einsum("ilj,jl->i", jacobian, g)


def as_matrix(noise_type: str, g: Tensor) -> Tensor:
    return torch.diag_embed(g) if noise_type == "diagonal" else g


def by_autograd(diffusion: Callable[[Tensor], Tensor], y: Tensor, shift: Shift, record: bool) -> Tensor | None:
    return shift(differentiated(lambda y: (y, diffusion(y)), y, record)[1])


def within_transforms(diffusion: Callable[[Tensor], Tensor], y: Tensor, shift: Shift, record: bool) -> Tensor | None:
    def found(y: Tensor) -> Tensor:
        got = by_autograd(diffusion, y, shift, record)
        return torch.zeros_like(y) if got is None else got

    return torch.func.vjp(found, y)[0]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("way", [by_autograd, within_transforms])
@pytest.mark.parametrize(
    ("noise_type", "diffusion"),
    [("diagonal", own), ("diagonal", mixing), ("diagonal", constant), ("scalar", column), ("general", matrix)],
)
def test_correction_is_the_full_formula(noise_type: str, diffusion, way, record: bool) -> None:
    y = torch.randn(5, 3).requires_grad_()
    found = way(diffusion, y, shift_of(noise_type, diffusion, y), record)
    found = torch.zeros_like(y) if found is None else found
    for_one = lambda x: as_matrix(noise_type, diffusion(x[None]))[0]  # noqa: E731
    expected = torch.stack([full_correction(for_one(x), torch.autograd.functional.jacobian(for_one, x)) for x in y])
    torch.testing.assert_close(found.detach(), expected, rtol=1e-13, atol=1e-14)  # rounding of sums of 3 products


def test_additive_noise_needs_none() -> None:
    assert shift_of("additive", matrix, torch.randn(5, 3)) is None


MIXES = {
    "diagonal": nn.BatchNorm1d(3).double(),
    "scalar": lambda y: (y * y.mean(0)).unsqueeze(-1),
    "general": lambda y: torch.stack((y * y.mean(0), torch.cos(y)), -1),
}


@pytest.mark.parametrize("noise_type", MIXES)
def test_a_batch_that_mixes_is_refused(noise_type: str) -> None:
    with pytest.raises(ValueError, match="other samples of the batch"):
        shift_of(noise_type, MIXES[noise_type], torch.randn(5, 3))


def test_samples_of_several_batch_dimensions_must_stay_apart_where_they_have_noise_of_their_own() -> None:
    rows = lambda y: (y * y.mean(1, keepdim=True)).unsqueeze(-1)  # noqa: E731
    with pytest.raises(ValueError, match="other samples of the batch"):
        shift_of("general", rows, torch.randn(5, 4, 3))


CUT_OFF = {"diagonal": own, "scalar": column, "general": matrix}


@pytest.mark.parametrize("noise_type", CUT_OFF)
def test_a_diffusion_without_derivative_is_refused(noise_type: str) -> None:
    sde = SDE(lambda t, y: -y, lambda t, y: CUT_OFF[noise_type](y.detach()), noise_type, "ito")
    with pytest.raises(ValueError, match=r"changes with y, but autograd finds no derivative.*method='euler'"):
        sdeint(sde, torch.randn(5, 3), [0.0, 1.0], dt=0.1)


def test_a_constant_or_random_diffusion_is_not_refused() -> None:
    assert shift_of("diagonal", constant, torch.randn(5, 3)) is not None
    assert shift_of("diagonal", torch.randn_like, torch.randn(5, 3)) is not None


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk", "euler"])
def test_geometric_brownian_motion(method: str) -> None:
    """dy = mu y dt + sigma y dW in the sense of Ito has y(1) = y0 exp(mu - sigma^2/2 + sigma W(1))."""
    mu, sigma = 0.3, 0.5
    bm = BrownianPath(0.0, 1.0, (500, 1), seed=0, dtype=torch.float64, levy_area="space-time", dt=2**-9)
    y0 = torch.ones(500, 1)
    sde = SDE(lambda t, y: mu * y, lambda t, y: sigma * y, sde_type="ito")
    exact = torch.exp(mu - sigma**2 / 2 + sigma * bm(0.0, 1.0))
    error = (sdeint(sde, y0, [0.0, 1.0], bm=bm, dt=2**-9, method=method)[-1] - exact).square().mean().sqrt()
    # Euler has strong order 1/2: sigma^2 sqrt(h/2) = 8e-3 times the size of y; without the correction the error is 0.2.
    assert error < 0.03


@pytest.mark.parametrize("noise_type", ["scalar", "general"])
def test_ito_and_stratonovich_spellings_agree(noise_type: str) -> None:
    """The drift with the correction added by hand, in the sense of Stratonovich, is the same equation."""
    diffusion = {"scalar": column, "general": matrix}[noise_type]
    drift = lambda y: -y  # noqa: E731

    def corrected(t: Tensor, y: Tensor) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: diffusion(x[None])[0]))(y)
        return drift(y) - 0.5 * torch.einsum("bilj,bjl->bi", jacobian, diffusion(y))

    ito = SDE(lambda t, y: drift(y), lambda t, y: diffusion(y), noise_type, "ito")
    stratonovich = SDE(corrected, lambda t, y: diffusion(y), noise_type)
    channels = {"scalar": 1, "general": 2}[noise_type]
    bm = BrownianPath(0.0, 1.0, (4, channels), seed=0, dtype=torch.float64, dt=0.1)
    y0 = torch.randn(4, 3)
    a, b = (sdeint(sde, y0, [0.0, 1.0], bm=bm, dt=0.1) for sde in (ito, stratonovich))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# What does not show in the derivative of g at the start: g_i depends on other entries.
HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a schedule that is zero at the start": lambda t, y: t * (1 + y.flip(-1)),
    "a schedule with a square": lambda t, y: 0.3 + t**2 * torch.sin(y.flip(-1)) * y,
    "a closed relu": lambda t, y: 0.3 + torch.relu(y.roll(1, -1) - 2.0) * y,
    "one of many pairs": lambda t, y: 0.3 + t * torch.cat((y[..., :1] * y[..., 2:3], y[..., 1:]), -1),
}


def by_own_derivative(g: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The drift -y with the correction added by hand."""

    def drift(t: Tensor, y: Tensor) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: g(t, x)))(y)
        return -y - 0.5 * jacobian.diagonal(dim1=-2, dim2=-1) * g(t, y)

    return drift


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", HIDDEN)
def test_coupled_entries_are_seen_wherever_they_hide(name: str, batch: int) -> None:
    g, y0 = HIDDEN[name], torch.tensor([[1.0, 0.3, -0.4]]).repeat(batch, 1) + 0.1 * torch.arange(batch).unsqueeze(-1)
    bm = BrownianPath(0.0, 1.0, (batch, 3), seed=1, dtype=torch.float64, dt=1 / 16)
    equations = SDE(lambda t, y: -y, g, "diagonal", "ito"), SDE(by_own_derivative(g), g)
    a, b = (sdeint(sde, y0, [0.0, 1.0], dt=1 / 16, bm=bm) for sde in equations)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
def test_a_layer_of_zeros_has_the_gradient_of_the_corrected_equation(gradient: str) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.zeros_(net[-1].weight)
    y0 = torch.tensor([[1.0, -0.5]]).repeat(2, 1)
    bm = BrownianPath(0.0, 1.0, (2, 2), seed=1, dtype=torch.float64, dt=1 / 16)
    g = lambda t, y: 0.3 + net(y)  # noqa: E731
    equations = SDE(lambda t, y: -y, g, "diagonal", "ito"), SDE(by_own_derivative(g), g)
    ends = [sdeint(sde, y0, [0.0, 1.0], dt=1 / 16, bm=bm, gradient=gradient)[-1] for sde in equations]
    a, b = (torch.autograd.grad((y.square().sum() + y[:, 0] @ y[:, 1]), net[-1].weight)[0] for y in ends)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


LOOSE = {"adaptive": True, "rtol": 0.1, "atol": 0.1, "dt_min": 1e-2}
SETTINGS: list[dict[str, Any]] = [{}, {"gradient": "direct"}, LOOSE]
# What begins later, in code that was not run at the start.
LATER: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "coupled entries": ("diagonal", own, mixing, "depends on another one"),
    "coupled entries behind a mask": (
        "diagonal",
        own,
        lambda y: torch.where(y.roll(1, -1) > 9, y.roll(1, -1), own(y)),
        "",
    ),
    "a batch mean": ("diagonal", own, lambda y: y - y.mean(0), "other samples of the batch"),
    "a batch mean, coupled": ("diagonal", mixing, lambda y: mixing(y - y.mean(0)), "other samples of the batch"),
    "a batch mean, scalar": ("scalar", column, lambda y: column(y - y.mean(0)), "other samples of the batch"),
    "a batch mean, general": ("general", matrix, lambda y: matrix(y - y.mean(0)), "other samples of the batch"),
    "a state": ("additive", lambda y: torch.ones(*y.shape, 2), matrix, "'additive', but g changes with y"),
    "a state that cancels": (
        "additive",
        lambda y: torch.ones(*y.shape, 2),
        lambda y: torch.stack((y, -y), -1),
        "additive",
    ),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("name", LATER)
def test_what_begins_later_is_right_or_refused(name: str, batch: int, settings: dict[str, Any]) -> None:
    noise_type, first, then, message = LATER[name]
    weight = torch.ones((), requires_grad=True)
    sde = SDE(lambda t, y: -weight * y, lambda t, y: first(y) if t < 0.35 else then(y), noise_type, "ito")
    solve = lambda: sdeint(sde, torch.randn(batch, 3), [0.0, 1.0], dt=1 / 16, **settings)  # noqa: E731
    with pytest.raises((ValueError, RuntimeError), match=message) if message else nullcontext():
        solve()


def test_additive_noise_of_a_stochastic_runge_kutta_method_is_held_to_its_name() -> None:
    sde = SDE(lambda t, y: -y, lambda t, y: matrix(y if t > 0.35 else torch.ones_like(y)), "additive")
    with pytest.raises(ValueError, match="'additive', but g changes with y"):
        sdeint(sde, torch.randn(5, 3), [0.0, 1.0], dt=1 / 16, method="rev_shark")


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "general"])
def test_an_ito_equation_in_inference_mode(noise_type: str) -> None:
    diffusion = {"diagonal": own, "scalar": column, "general": matrix}[noise_type]
    sde = SDE(lambda t, y: -y, lambda t, y: diffusion(y), noise_type, "ito")

    def solve() -> Tensor:
        torch.manual_seed(0)
        return sdeint(sde, torch.ones(2, 3), [0.0, 1.0], dt=0.25)

    with torch.inference_mode():
        inside = solve()
    assert torch.equal(inside.clone(), solve())


def test_general_noise_kept_by_autograd_looks_at_each_step_once() -> None:
    """Four times the steps take about four times as long in direct mode, not sixteen."""
    lin = nn.Linear(2, 6)
    sde = SDE(lambda t, y: -y, lambda t, y: torch.tanh(lin(y)).view(-1, 2, 3), "general", "ito")

    def seconds(num_steps: int) -> float:
        start = process_time()
        sdeint(sde, torch.zeros(8, 2), [0.0, 1.0], dt=1 / num_steps, gradient="direct", restarts=8)
        return process_time() - start

    seconds(10)
    assert seconds(160) < 8 * min(seconds(40), seconds(40))
