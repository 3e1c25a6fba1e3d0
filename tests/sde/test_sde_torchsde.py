"""`sdeint` beside torchsde's: the same calls, the same paths, the same results up to the error of the schemes."""

import pytest
import torch
import torchsde
from torch import Tensor

from revsolve import SDE, sdeint
from tests.sde_problems import DIM, NeuralSDE, noise_size

pytestmark = pytest.mark.usefixtures("float64")
BATCH = 16
TS = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


def interval(noise_type: str, area: bool = False) -> torchsde.BrownianInterval:
    area_kind = "space-time" if area else "none"
    return torchsde.BrownianInterval(
        0.0,
        1.0,
        noise_size(noise_type, BATCH),
        dtype=torch.float64,
        entropy=1,
        levy_area_approximation=area_kind,
        dt=2**-6,
    )


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive", "general"])
def test_same_scheme_on_the_same_path(noise_type: str) -> None:
    """With steps that are powers of two, torchsde takes no extra ones, so that both run the same recursion."""
    sde, y0, bm = NeuralSDE(noise_type), torch.randn(BATCH, DIM), interval(noise_type)
    theirs = torchsde.sdeint(sde, y0, TS, bm=bm, method="reversible_heun", dt=2**-6)
    ours = sdeint(sde, y0, TS, bm=bm, method="reversible_heun", dt=2**-6, restarts=None)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # 64 steps of rounding, with a parasitic mode


@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun2", "rev_rk4", "rev_slowrk"])
@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "additive"])
def test_different_schemes_agree_to_their_error(noise_type: str, method: str) -> None:
    sde, y0 = NeuralSDE(noise_type), torch.randn(BATCH, DIM)
    bm = interval(noise_type, area=True)
    theirs = torchsde.sdeint(sde, y0, TS, bm=bm, method="midpoint", dt=2**-6)
    ours = sdeint(sde, y0, TS, bm=bm, method=method, dt=2**-6)
    # Both have strong order 1, with constants of about |g'g| = 0.2.
    assert (ours - theirs).square().mean().sqrt() < 0.2 * 2**-6


@pytest.mark.parametrize("noise_type", ["diagonal", "scalar", "general"])
def test_ito(noise_type: str) -> None:
    sde, y0, bm = NeuralSDE(noise_type, "ito"), torch.randn(BATCH, DIM), interval(noise_type)
    theirs = torchsde.sdeint(sde, y0, TS, bm=bm, method="euler", dt=2**-9)
    ours = sdeint(sde, y0, TS, bm=bm, dt=2**-9)
    # Euler has strong order 1/2 with a constant of |g'g|/2 or so, here 0.1.
    assert (ours - theirs).square().mean().sqrt() < 0.1 * 2**-4.5


@pytest.mark.parametrize("noise_type", ["scalar", "additive", "general"])
def test_log_ratio(noise_type: str) -> None:
    sde, y0, bm = NeuralSDE(noise_type), torch.randn(BATCH, DIM), interval(noise_type)
    settings = {"bm": bm, "dt": 2**-6, "method": "reversible_heun", "logqp": True}
    states, ratios = torchsde.sdeint(sde, y0, TS, **settings)
    ours, our_ratios = sdeint(sde, y0, TS, restarts=None, **settings)
    assert our_ratios.shape == (len(TS) - 1, BATCH)
    torch.testing.assert_close(ours, states, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(our_ratios, ratios, rtol=1e-8, atol=1e-8)  # divisions by small g amplify rounding


def test_log_ratio_of_constant_excess_is_known() -> None:
    """f - h = 1/2 and g = 1/4 in each of 3 entries give |u|^2/2 = 3 * 2^2/2 = 6 per unit of time."""
    sde = SDE(lambda t, y: 0.5 - y, lambda t, y: torch.full_like(y, 0.25), h=lambda t, y: -y)
    _, ratios = sdeint(sde, torch.randn(BATCH, DIM), TS, dt=0.1, logqp=True)
    torch.testing.assert_close(ratios, torch.full((4, BATCH), 1.5), rtol=1e-13, atol=0.0)


class Renamed:
    noise_type, sde_type = "diagonal", "stratonovich"

    def pull(self, t: Tensor, y: Tensor) -> Tensor:
        return -y

    def shake(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * torch.cos(y)

    def prior(self, t: Tensor, y: Tensor) -> Tensor:
        return -2 * y


def test_names() -> None:
    y0, names = torch.randn(BATCH, DIM), {"drift": "pull", "diffusion": "shake", "prior_drift": "prior"}
    plain = SDE(Renamed().pull, Renamed().shake, h=Renamed().prior)
    settings = {"bm": interval("diagonal"), "dt": 0.1, "logqp": True}
    found = sdeint(Renamed(), y0, TS, names=names, **settings)
    expected = sdeint(plain, y0, TS, **settings)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", [torchsde.BrownianPath, torchsde.BrownianTree])
def test_other_paths_of_torchsde(kind: type) -> None:
    w0 = torch.zeros(BATCH, DIM)
    bm = kind(t0=0.0, w0=w0) if kind is torchsde.BrownianPath else kind(t0=0.0, w0=w0, t1=1.0, entropy=1)
    y0 = torch.randn(BATCH, DIM)
    one, two = (sdeint((lambda t, y: -y, lambda t, y: 0.3 * y), y0, TS, bm=bm, dt=0.05) for _ in range(2))
    assert torch.equal(one, two)


def test_manual_seed_repeats_the_noise() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return sdeint((lambda t, y: -y, lambda t, y: 0.3 * y), torch.ones(BATCH, DIM), TS, dt=0.05)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_may_be_tensors(adaptive: bool) -> None:
    def solved(dt: float | Tensor, dt_min: float | Tensor) -> Tensor:
        settings = {"bm": interval("diagonal"), "adaptive": adaptive}
        return sdeint((lambda t, y: -y, lambda t, y: 0.3 * y), y0, TS, dt=dt, dt_min=dt_min, **settings)

    y0 = torch.ones(BATCH, DIM)
    assert torch.equal(solved(torch.tensor(0.1), torch.tensor(0.01)), solved(0.1, 0.01))


def test_times_may_be_a_list_and_one_time_is_the_initial_state() -> None:
    sde, y0 = NeuralSDE("diagonal"), torch.randn(BATCH, DIM)
    assert sdeint(sde, y0, [0.0, 0.5], dt=0.1).shape == (2, BATCH, DIM)
    assert torch.equal(sdeint(sde, y0, [0.3]), y0[None])
    states, ratios = sdeint(sde, y0, [0.3], logqp=True)
    assert states.shape == (1, BATCH, DIM) and ratios.shape == (0, BATCH)


def test_full_output_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    out = sdeint(NeuralSDE("diagonal"), torch.randn(BATCH, DIM), TS, dt=0.1, full_output=True, progress=True)
    assert len(out.times) == out.stats.num_steps + 1 == 13
    assert "12/12" in capsys.readouterr().err
