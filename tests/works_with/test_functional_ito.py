"""Ito equations inside torch.func: their correction is a derivative within the field, and transforms go through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from revsolve import SDE, BrownianPath, sdeint
from tests.front_doors import difference, make_y0

EXACT = 1e-12  # relative; the order of summation, and rounding of undone steps
Params = dict[str, Tensor]

DIFFUSIONS: dict[str, tuple[str, Callable[[Tensor, Params], Tensor]]] = {
    "diagonal": ("diagonal", lambda y, p: torch.sin(p["own"] * y) + 2),
    "diagonal that mixes": ("diagonal", lambda y, p: torch.tanh(y @ p["mix"])),
    "diagonal and constant": ("diagonal", lambda y, p: p["own"].expand(y.shape)),
    "scalar": ("scalar", lambda y, p: torch.tanh(y @ p["mix"]).unsqueeze(-1)),
    "additive": ("additive", lambda y, p: p["mix"][:, :2].expand(*y.shape, 2)),
    "general": ("general", lambda y, p: torch.stack((torch.sin(y @ p["mix"]) * y, torch.cos(p["own"] * y)), -1)),
}
every_noise = pytest.mark.parametrize("noise", DIFFUSIONS)


def make_params() -> Params:
    generator = torch.Generator().manual_seed(0)
    sizes = {"drift": (3, 3), "mix": (3, 3), "own": (3,)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


class Solve:
    """An Ito equation solved as a function of its parameters and one sample, (3,), or a batch of them, (batch, 3)."""

    def __init__(self, noise: str, **settings: Any) -> None:
        self.noise, self.settings = noise, {"restarts": 4, "dt": 0.1, **settings}

    def __call__(self, params: Params, y0: Tensor) -> Tensor:
        noise_type, diffusion = DIFFUSIONS[self.noise]
        drift = lambda t, y: torch.tanh(y @ params["drift"]) - y * torch.cos(t)  # noqa: E731
        sde = SDE(drift, lambda t, y: 0.4 * diffusion(y, params), noise_type, "ito")
        return sdeint(sde, y0, [0.0, 0.5, 1.0], **self.settings)[1:]

    def loss(self, params: Params, y0: Tensor) -> Tensor:
        return self(params, y0).square().sum()


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return call()


def plain_gradients(loss: Callable[[Params, Tensor], Tensor], y0: Tensor) -> list[Tensor]:
    leaves = {name: p.requires_grad_() for name, p in make_params().items()}
    y = y0.detach().requires_grad_()
    value = seeded(lambda: loss(leaves, y))
    return list(torch.autograd.grad(value, [y, *leaves.values()], materialize_grads=True))


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk", "heun2"])
@every_noise
def test_grad_of_state_and_parameters(noise: str, method: str) -> None:
    settings = {"method": method} if method.startswith("rev") else {"method": method, "restarts": "auto"}
    loss, direct = Solve(noise, **settings).loss, Solve(noise, **settings, gradient="direct").loss
    by_params, by_y0 = seeded(lambda: grad(loss, argnums=(0, 1))(make_params(), make_y0().detach()))
    assert difference([by_y0, *by_params.values()], plain_gradients(direct, make_y0())) < EXACT


@every_noise
def test_vjp_jacrev_and_forward_mode(noise: str) -> None:
    y0, final = make_y0().detach()[0], lambda y: Solve(noise)(make_params(), y)
    direct = lambda y: Solve(noise, gradient="direct")(make_params(), y)  # noqa: E731
    wanted = seeded(lambda: torch.autograd.functional.jacobian(direct, y0))
    out, pull = seeded(lambda: vjp(final, y0))
    weights = torch.randn_like(out)
    assert difference([pull(weights)[0]], [torch.tensordot(weights, wanted, 2)]) < EXACT
    assert difference([seeded(lambda: jacrev(final)(y0))], [wanted]) < EXACT
    assert difference([seeded(lambda: jvp(final, (y0,), (y0,)))[1]], [wanted @ y0]) < EXACT
    assert difference([seeded(lambda: jacfwd(final, randomness="same")(y0))], [wanted]) < EXACT


@every_noise
def test_dual_numbers(noise: str) -> None:
    y0, final = make_y0().detach()[0], lambda y: Solve(noise)(make_params(), y)
    wanted = seeded(lambda: jacrev(final)(y0)) @ y0
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(seeded(lambda: final(forward_ad.make_dual(y0, y0)))).tangent
    assert found is not None
    assert difference([found], [wanted]) < EXACT


@pytest.mark.parametrize("gradient", [None, "direct"])
@every_noise
def test_vmap_is_the_solve_of_the_whole_batch(noise: str, gradient: str | None) -> None:
    params, y0 = make_params(), make_y0().detach()
    over_samples = vmap(Solve(noise, gradient=gradient), in_dims=(None, 0), out_dims=1, randomness="different")
    found, wanted = seeded(lambda: over_samples(params, y0)), seeded(lambda: Solve(noise)(params, y0))
    assert difference([found], [wanted]) < EXACT


@every_noise
def test_shared_noise_is_that_of_a_loop(noise: str) -> None:
    params, y0 = make_params(), make_y0().detach()
    found = seeded(lambda: vmap(Solve(noise), in_dims=(None, 0), randomness="same")(params, y0))
    assert difference([found], [torch.stack([seeded(lambda y=y: Solve(noise)(params, y)) for y in y0])]) < EXACT


@pytest.mark.parametrize("gradient", [None, "checkpoint"])
@every_noise
def test_per_sample_gradients(noise: str, gradient: str | None) -> None:
    y0 = make_y0().detach()
    per_sample = vmap(grad(Solve(noise, gradient=gradient).loss), in_dims=(None, 0), randomness="different")
    found = seeded(lambda: per_sample(make_params(), y0))
    direct = Solve(noise, gradient="direct")
    rows = [plain_gradients(lambda p, y, i=i: direct(p, y)[:, i].square().sum(), y0)[1:] for i in range(len(y0))]
    wanted = [torch.stack(column) for column in zip(*rows, strict=True)]
    assert difference(list(found.values()), wanted) < EXACT


@every_noise
def test_second_derivatives(noise: str) -> None:
    y0, loss = make_y0().detach()[0], lambda y: Solve(noise).loss(make_params(), y)
    direct = lambda y: Solve(noise, gradient="direct").loss(make_params(), y)  # noqa: E731
    wanted = seeded(lambda: torch.autograd.functional.hessian(direct, y0))
    assert difference([seeded(lambda: jacrev(jacrev(loss))(y0))], [wanted]) < EXACT


@every_noise
def test_no_more_states_are_kept_for_more_steps(noise: str) -> None:
    def kept(num_steps: int) -> int:
        solutions: list[Any] = []

        def loss(params: Params, y: Tensor) -> Tensor:
            noise_type, diffusion = DIFFUSIONS[noise]
            sde = SDE(lambda t, y: -y, lambda t, y: 0.1 * diffusion(y, params), noise_type, "ito")
            solution = sdeint(sde, y, [0.0, 1.0], dt=1 / num_steps, restarts=None, full_output=True)
            solutions.append(solution)
            return solution.ys.square().sum()

        vmap(grad(loss), in_dims=(None, 0), randomness="same")(make_params(), make_y0().detach())
        return solutions[0].stats.num_stored_states

    assert kept(2) == kept(16) == 3


def test_the_log_ratio_of_a_prior() -> None:
    y0 = make_y0().detach()

    def loss(scale: Tensor, y: Tensor, **mode: Any) -> Tensor:
        sde = SDE(lambda t, y: -scale * y, lambda t, y: torch.sin(y) + 2, sde_type="ito", h=lambda t, y: -y)
        return sdeint(sde, y, [0.0, 1.0], dt=0.1, logqp=True, restarts=4, **mode)[1].sum()

    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(seeded(lambda: loss(scale, y0, gradient="direct")), scale)
    assert difference([seeded(lambda: grad(loss)(scale.detach(), y0))], list(wanted)) < EXACT


WRONG = {
    "mixes samples": (SDE(lambda t, y: -y, lambda t, y: y * y.mean(0), sde_type="ito"), "other samples of the batch"),
    "no derivative": (SDE(lambda t, y: -y, lambda t, y: y.detach() + 2, sde_type="ito"), "finds no derivative"),
    "not additive": (
        SDE(lambda t, y: -y, lambda t, y: torch.stack([y, y], -1), "additive", "ito"),
        "noise_type is 'additive', but g changes with y",
    ),
}


@pytest.mark.parametrize("over", [lambda f: f, lambda f: vmap(f, randomness="same")], ids=["grad", "vmap"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_outside_is_refused_inside(wrong: str, over: Callable[..., Any]) -> None:
    sde, message = WRONG[wrong]
    y0 = torch.randn(2, 4, 3) if over(torch.sin) is not torch.sin else torch.randn(4, 3)
    with pytest.raises(ValueError, match=message):
        over(grad(lambda y: sdeint(sde, y, [0.0, 1.0], dt=0.1).sum()))(y0)


@pytest.mark.parametrize(
    "transform", [grad, jacrev, lambda f: vmap(grad(f), in_dims=0)], ids=["grad", "jacrev", "vmap"]
)
@every_noise
def test_a_brownian_path_that_is_made_inside(noise: str, transform: Any) -> None:
    """It is the one made outside, which the transform does not concern."""
    rates, y0 = torch.tensor([0.5, 1.5], dtype=torch.float64), make_y0().detach()
    size = {"scalar": (4, 1), "general": (4, 2), "additive": (4, 2)}.get(DIFFUSIONS[noise][0], (4, 3))
    make = lambda: BrownianPath(0.0, 1.0, size, seed=3, dtype=torch.float64)  # noqa: E731
    outside, others = make(), make_params()

    def loss(rate: Tensor, inside: bool) -> Tensor:
        params = {**others, "own": rate * torch.ones(3, dtype=torch.float64)}
        return Solve(noise, bm=make() if inside else outside).loss(params, y0)

    at = rates if transform not in (grad, jacrev) else rates[0]
    found, wanted = (transform(lambda rate, inside=inside: loss(rate, inside))(at) for inside in (True, False))
    assert difference([found], [wanted]) < EXACT or not wanted.any()
