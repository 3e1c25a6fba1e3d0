"""Adaptive steps of each sample's own length: as if each were solved alone, with exact gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import HermitePath, LinearPath, cdeint, odeint
from tests.equations import Network, leaf, times_of_each, worst_difference

EXACT = 1e-12
OWN: dict[str, Any] = {"options": {"steps_of_each": True}, "rtol": 1e-3, "atol": 1e-4}


def gradients(**way: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network, rate, y0, t = Network().double(), leaf(), leaf(3, 3), times_of_each()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 5 * network.net(y) * torch.cos(5 * t)[:, None] - rate**2 * y

    ys = odeint(func, y0, t, **OWN, **way)
    inputs = {"y0": y0, "rate": rate, "t": t, **dict(network.net.named_parameters())}
    weights = torch.linspace(0.3, 1.7, ys.numel(), dtype=torch.float64).view(ys.shape)
    return dict(zip(inputs, torch.autograd.grad((weights * ys).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize("method", ["rev_bosh3", "rev_dopri5", "reversible_heun", "bosh3"])
def test_gradient_is_direct(method: str) -> None:
    assert worst_difference(gradients(method=method), gradients(method=method, gradient="direct")) < (EXACT, "")


def test_gradient_of_a_controlled_equation_is_direct() -> None:
    def found(gradient: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        x, z0, t = torch.randn(3, 5, 2, dtype=torch.float64).requires_grad_(), leaf(3, 4), times_of_each()
        matrix = torch.randn(4, 8, dtype=torch.float64).requires_grad_()
        X = HermitePath(x, torch.linspace(-0.5, 1.5, 5, dtype=torch.float64))
        zs = cdeint(X, lambda t, z: torch.tanh(z @ matrix).view(3, 4, 2), z0, t, gradient=gradient, **OWN)
        inputs = {"x": x, "z0": z0, "t": t, "matrix": matrix}
        return dict(zip(inputs, torch.autograd.grad(torch.sin(zs).sum(), list(inputs.values())), strict=True))

    assert worst_difference(found(None), found("direct")) < (EXACT, "")


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[:, 1], 10 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


Y0 = torch.stack([torch.linspace(-2, 2, 8), torch.linspace(1, -1, 8)], 1).double()  # jumps come at different times
SHARED = torch.tensor([[0.0], [5.0], [12.0]], dtype=torch.float64).expand(3, 8)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
@pytest.mark.parametrize("method", ["dopri5", "rev_dopri5"])
def test_each_sample_as_if_alone(method: str, tolerance: float) -> None:
    way: dict[str, Any] = {"method": method, "rtol": tolerance, "atol": tolerance, "full_output": True}
    exact = odeint(van_der_pol, Y0, SHARED[:, 0], method="dopri8", rtol=1e-12, atol=1e-12)
    own = odeint(van_der_pol, Y0, SHARED, options={"steps_of_each": True}, **way)
    alone = [odeint(van_der_pol, Y0[b, None], SHARED[:, b], **way) for b in (0, 3)]
    shared = odeint(van_der_pol, Y0, SHARED, **way)
    wrong, wrong_alone = (
        ((own.ys[:, b] - exact[:, b]).abs().max() for b in (0, 3)),
        [(solution.ys[:, 0] - exact[:, b]).abs().max() for solution, b in zip(alone, (0, 3), strict=True)],
    )
    assert max(wrong) < 10 * max(wrong_alone)  # errors of a jump's time scatter, from sample to sample, too
    # Waiting at outputs, and attempts that fail for one sample, take a few steps more.
    assert own.stats.num_steps < 1.4 * max(solution.stats.num_steps for solution in alone)
    assert own.stats.num_steps < shared.stats.num_steps


def swing(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(t).view(-1, 1) * y


def test_closed_form() -> None:
    t, y0 = times_of_each(), leaf(3, 2)
    ys = odeint(swing, y0, t, rtol=1e-9, atol=1e-10, options={"steps_of_each": True})
    wanted = y0 * torch.exp(torch.sin(t) - torch.sin(t[0]))[..., None]
    assert torch.allclose(ys, wanted, atol=1e-8)
    got, closed = (torch.autograd.grad(y.square().sum(), (t, y0)) for y in (ys, wanted))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(got, closed, strict=True))


def test_on_every_device(device: torch.device) -> None:
    y0 = torch.ones(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    ys = odeint(swing, y0, times_of_each().detach().to(device), **OWN)
    wanted = torch.exp(torch.sin(times_of_each()) - torch.sin(times_of_each()[0]))[..., None].expand(4, 3, 2)
    assert ys.device.type == device.type
    assert torch.allclose(ys.cpu(), wanted, atol=1e-2)
    assert torch.allclose(torch.autograd.grad(ys[-1].sum(), y0)[0].cpu(), wanted[-1], atol=1e-2)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_states_of_any_shape(shape: tuple[int, ...]) -> None:
    ys = odeint(lambda t, y: -y, torch.ones(shape), times_of_each().detach().float(), **OWN)
    wanted = (
        torch.exp(-(times_of_each() - times_of_each()[0])).float().view(4, 3, *[1] * (len(shape) - 1)).expand(4, *shape)
    )
    assert torch.allclose(ys, wanted, atol=1e-2)


def test_a_field_that_draws_random_numbers() -> None:
    """The draw follows from the number of the step, which undoing it repeats."""
    y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    ys = odeint(lambda t, y: -y * (1 + 0.1 * torch.rand(3, 2)), y0, times_of_each().detach(), method="rev_bosh3", **OWN)
    (grad,) = torch.autograd.grad(ys.sum(), y0)  # a mismatch would be a warning, and thus an error here
    assert bool(grad.isfinite().all())


RAISES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fixed steps": ({"options": {"steps_of_each": True, "step_size": 0.1}}, ValueError, "but steps are fixed here"),
    "norm": ({"options": {"steps_of_each": True, "norm": torch.max}}, ValueError, "option 'norm' measures all"),
    "one time for all": ({"t": torch.tensor([0.0, 1.0])}, ValueError, r"pass t\[:, None\]"),
    "too many": (
        {"options": {"steps_of_each": True, "max_num_steps": 3}},
        RuntimeError,
        "max_num_steps = 3 was reached",
    ),
    "a singularity": (
        {"func": lambda t, y: y**2 * torch.tensor([[0.0], [1.0], [0.0]]), "t": torch.tensor([[0.0] * 3, [2.0] * 3])},
        RuntimeError,
        "the step size of sample 1 fell below rounding",
    ),
}


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, kind, message = RAISES[case]
    options = {"steps_of_each": True}
    arguments = {
        "func": swing,
        "y0": torch.ones(3, 2),
        "t": times_of_each().detach().float(),
        "options": options,
        **changed,
    }
    with pytest.raises(kind, match=message):
        odeint(**arguments)


def test_kinks_are_refused() -> None:
    X = LinearPath(torch.randn(3, 4, 1))
    with pytest.raises(ValueError, match="lie elsewhere for every sample"):
        cdeint(X, lambda t, z: z.unsqueeze(-1), torch.ones(3, 2), torch.tensor([[0.0] * 3, [2.5] * 3]), **OWN)
