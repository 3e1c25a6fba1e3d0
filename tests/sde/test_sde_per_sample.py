"""SDEs whose samples have times of their own: the law of the noise, and exact gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import SDE, sdeint
from tests.sde_problems import CHANNELS, DIM, NeuralSDE

EXACT = 1e-12
# Three samples: different lengths, one that begins late, one that waits.
TIMES = torch.tensor(((0.0, 1.0, 0.2), (0.5, 1.2, 0.2), (1.3, 1.9, 0.9), (1.4, 2.0, 0.9)), dtype=torch.float64)

pytestmark = pytest.mark.usefixtures("float64")


class Timed(NeuralSDE):
    """The time as a column, so that every sample sees its own."""

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return super().f(t.view(-1, 1), y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return super().g(t.view(-1, 1, 1) if self.noise_type == "additive" else t.view(-1, 1), y)


def gradients(sde: NeuralSDE, gradient: str | None, **settings: Any) -> Tensor:
    torch.manual_seed(7)
    y0 = torch.linspace(-1, 1, 3 * DIM).view(3, DIM).requires_grad_()
    out = sdeint(sde, y0, TIMES, gradient=gradient, **settings)
    states, ratios = out if settings.get("logqp") else (out, torch.zeros(()))
    loss = torch.sin(3 * states[1:]).sum() + ratios.square().sum()
    found = torch.autograd.grad(loss, [y0, *sde.parameters()], materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def difference(sde: NeuralSDE, **settings: Any) -> float:
    found, wanted = (gradients(sde, mode, **settings) for mode in (None, "direct"))
    assert wanted.norm() > 1e-3
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sde_type", ["stratonovich", "ito"])
@pytest.mark.parametrize("noise_type", CHANNELS)
@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun2", "rev_slowrk", "heun2"])
def test_gradient_is_direct(method: str, noise_type: str, sde_type: str) -> None:
    assert difference(Timed(noise_type, sde_type), method=method, dt=0.1) <= EXACT


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
@pytest.mark.parametrize("logqp", [False, True])
def test_adaptive_and_log_ratios(logqp: bool, method: str) -> None:
    way = {"adaptive": True, "rtol": 1e-2, "atol": 1e-2, "dt": 0.1, "dt_min": 1e-3}
    assert difference(Timed("diagonal"), method=method, logqp=logqp, **way) <= EXACT


@pytest.mark.parametrize("logqp", [False, True])
@pytest.mark.parametrize("noise_type", CHANNELS)
@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
def test_times_that_are_the_same_for_all(method: str, noise_type: str, logqp: bool) -> None:
    """With intervals of length one, the noise is that of the plain solve from the same seed."""

    def solved(ts: Tensor) -> Any:
        torch.manual_seed(3)
        sde, y0 = Timed(noise_type), torch.ones(4, DIM)
        out = sdeint(sde, y0, ts, method=method, dt=0.25, logqp=logqp)
        return torch.cat([x.flatten() for x in (out if logqp else (out,))])

    common = torch.tensor([0.0, 1.0, 2.0])
    # The same steps, whose lengths are rounded differently.
    assert torch.allclose(solved(common[:, None].expand(3, 4)), solved(common), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
def test_the_law_of_each_sample(method: str) -> None:
    """Ornstein-Uhlenbeck processes with stationary variance 1/2, seen at times of their own."""
    ts = torch.stack([torch.tensor([0.0, 0.5, 0.6]), torch.tensor([1.0, 1.2, 3.0])], 1).repeat_interleave(20_000, 1)
    torch.manual_seed(0)
    sde = SDE(lambda t, y: -y, lambda t, y: torch.ones_like(y))
    ys = sdeint(sde, torch.zeros(40_000, 1), ts, method=method, dt=0.05)[..., 0].view(3, 2, 20_000)
    passed = (ts[1:] - ts[0])[:, [0, 20_000]]
    # Standard errors of 20,000 samples: 1 % of a variance; the steps err by less.
    assert torch.allclose(ys[1:].var(-1), (1 - torch.exp(-2 * passed)) / 2, rtol=0.04)
    covariance = (ys[1] * ys[2]).mean(-1)
    decay = torch.exp(-(passed[1] - passed[0]))
    assert torch.allclose(covariance, decay * (1 - torch.exp(-2 * passed[0])) / 2, rtol=0.06)


def test_a_repeated_time_holds_the_state() -> None:
    torch.manual_seed(0)
    ys = sdeint(Timed("general"), torch.rand(3, DIM), TIMES, dt=0.1)
    assert torch.equal(ys[0, 2], ys[1, 2]) and torch.equal(ys[2, 2], ys[3, 2])
    assert not torch.equal(ys[1, 2], ys[2, 2])


def test_on_every_device(device: torch.device) -> None:
    torch.manual_seed(0)
    y0, sde = torch.rand(3, DIM, device=device).requires_grad_(), Timed("general").to(device)
    ys = sdeint(sde, y0, TIMES.to(device), dt=0.1)
    assert ys.device.type == device.type and ys.shape == (4, 3, DIM)
    (grad,) = torch.autograd.grad(ys.sum(), y0)
    assert bool(grad.isfinite().all())


def test_full_output() -> None:
    torch.manual_seed(0)
    solution = sdeint(Timed("scalar"), torch.rand(3, DIM), TIMES, dt=0.11, full_output=True)
    # The longest of each interval: 0.5, 0.8, 0.1 and steps of 0.11.
    assert solution.stats.num_steps == 5 + 8 + 1
    assert solution.ys.shape == (4, 3, DIM) and solution.ts.shape == (4, 3)


RAISES: dict[str, tuple[dict[str, Any], str]] = {
    "falls": ({"ts": TIMES.flip(0)}, r"ts must increase, but ts\[:, 0\] = \[1.4, "),
    "gradient": ({"ts": TIMES.clone().requires_grad_()}, "ts requires a gradient"),
    "no batch": ({"ts": TIMES[:, :2]}, r"ts of shape \(4, 2\) gives times of each sample, so y0"),
    "bm": ({"bm": torch.zeros(1)}, "bm is one path in one time"),
    "jump": ({"adaptive": True, "options": {"jump_t": [0.1]}}, "'jump_t' has no meaning"),
    "events": ({"event_fn": lambda t, y: y[0, 0]}, "sdeint has no events"),
    "dense": ({"ts": TIMES[:, 0], "options": {"dense": True}}, "sdeint has no dense output"),
}


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, message = RAISES[case]
    arguments: dict[str, Any] = {"y0": torch.ones(3, DIM), "ts": TIMES, **changed}
    with pytest.raises(ValueError, match=message):
        sdeint(Timed("diagonal"), **arguments)
