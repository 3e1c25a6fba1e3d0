"""Where a field has a kink or a jump, programs evaluate it on the side on which the eager solve does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import odeint
from tests.equations import relative_difference

RECORDED = {"backend": "eager"}
EXACT = 1e-12
D = torch.float64
JUMP = 0.5


@pytest.mark.parametrize("restarts", [None, 1, 4])
@pytest.mark.parametrize("method", ["rev_heun2", "reversible_heun", "leapfrog"])
def test_kinks_at_the_stored_start(method: str, restarts: int | None) -> None:
    """Every entry begins at a kink of its own, where undoing leads to either side."""
    torch.manual_seed(0)
    kinks = torch.randn(64, dtype=D)

    def gradient(**solve: Any) -> Tensor:
        y0 = kinks.clone().requires_grad_()
        field = lambda t, y: 3 * torch.relu(y - kinks) - 1 - 0.5 * torch.sin(y)  # noqa: E731
        y = odeint(field, y0, [0.0, 1.0], method=method, restarts=restarts, options={"step_size": 0.13}, **solve)[-1]
        return torch.autograd.grad(y.square().sum(), y0)[0]

    assert relative_difference(gradient(compile=RECORDED), gradient(gradient="direct")) < EXACT


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t < JUMP, -y, torch.cos(3 * t) + y)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("times", [[0.0, 0.2, 1.3], [1.3, 0.2, 0.0]], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun"])
def test_jumps_of_fixed_steps(method: str, mode: str, times: list[float], dtype: torch.dtype) -> None:
    def solved(**solve: Any) -> tuple[Tensor, Tensor]:
        y0 = torch.tensor([0.7, -0.2], dtype=dtype, requires_grad=True)
        options = {"step_size": 0.11, "jump_t": JUMP}
        ys = odeint(field, y0, times, method=method, options=options, **solve)
        return ys.detach(), torch.autograd.grad(ys[1].sum() + 2 * ys[2].sum(), y0)[0]

    got, wanted = solved(compile=RECORDED, gradient=mode), solved(gradient="direct")
    exact = EXACT if dtype is D else 1e-5
    assert max(map(relative_difference, got, wanted)) < exact


@pytest.mark.parametrize("method", ["rev_bosh3", "dopri5", "reversible_heun"])
def test_jumps_of_adaptive_steps(method: str) -> None:
    """As many evaluations as without programs, and the gradient of the same steps."""

    def solved(**solve: Any) -> tuple[Any, Tensor]:
        y0 = torch.tensor([0.7, -0.2], dtype=D, requires_grad=True)
        options = {"jump_t": JUMP, **solve.pop("options", {})}
        solve |= (
            {"restarts": 4} if method != "dopri5" else {}
        )  # automatic ones depend on the tolerance, which given steps have not
        found = odeint(field, y0, [0.0, 0.2, 1.3], method=method, options=options, full_output=True, **solve)
        return found, torch.autograd.grad(found.ys[1].sum() + 2 * found.ys[2].sum(), y0)[0]

    tight: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    got, gradient = solved(compile=RECORDED, **tight)
    eager, _ = solved(**tight)
    assert (got.stats.num_steps, got.stats.num_rejected) == (eager.stats.num_steps, eager.stats.num_rejected)
    steps = got.times
    wanted, same = solved(gradient="direct", options={"grid_constructor": lambda *_: steps})
    assert relative_difference(got.ys.detach(), wanted.ys.detach()) < EXACT
    assert relative_difference(gradient, same) < EXACT


@pytest.mark.parametrize(
    "way", [{"options": {"step_size": 0.1}}, {"rtol": 1e-3, "atol": 1e-3}], ids=["fixed", "adaptive"]
)
def test_velocities_at_jumps_are_refused(way: dict[str, Any]) -> None:
    options = {"jump_t": JUMP, **way.get("options", {})}
    with pytest.raises(ValueError, match=r"no jump_t with method 'alf'.*leave out compile="):
        odeint(field, torch.ones(2), [0.0, 1.0], method="alf", compile=RECORDED, **{**way, "options": options})
