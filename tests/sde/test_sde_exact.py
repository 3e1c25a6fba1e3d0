"""Gradients of `sdeint` are those of the discrete solve, whatever the scheme, the noise and the grid."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor, nn

from revsolve import SDE, BrownianPath, sdeint
from tests.sde_problems import CHANNELS, DIM, NeuralSDE, noise_size

EXACT = 1e-12  # a few thousand roundings of float64
BATCH = 4
ANY_NOISE = ("reversible_heun", "rev_heun2", "rev_midpoint", "rev_rk4", "rev_dopri5", "rev_slowrk")
ADDITIVE = ("rev_euler", "rev_shark", "rev_sra1")
EMBEDDED = ("reversible_heun", "rev_heun_euler", "rev_bosh3", "rev_slowrk")
NOISE_TYPES = tuple(CHANNELS)
GRIDS: dict[str, dict[str, Any]] = {
    "dt=0.1": {"ts": [0.0, 1.0], "dt": 0.1},
    "dt=0.05": {"ts": [0.0, 0.5, 1.0], "dt": 0.05},
    "misaligned": {"ts": [0.0, 0.13, 0.37, 1.0], "dt": 0.1},
}
ADAPTIVE = {"ts": [0.0, 0.37, 1.0], "dt": 0.1, "adaptive": True, "rtol": 1e-2, "atol": 1e-2, "dt_min": 1e-3}

pytestmark = pytest.mark.usefixtures("float64")


def gradient(sde: Any, tensors: list[Tensor], y0: Tensor, ts: list[float], **settings: Any) -> Tensor:
    """All gradients of a nonlinear loss of all outputs as one vector, over the same noise each time."""
    torch.manual_seed(7)
    out = sdeint(sde, y0, ts, **settings)
    states, ratios = out if settings.get("logqp") else (out, torch.zeros(()))
    loss = torch.sin(3 * states[1:]).sum() + ratios.square().sum()
    found = torch.autograd.grad(loss, [y0, *tensors], allow_unused=True, retain_graph=True)
    pairs = zip(found, [y0, *tensors], strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in pairs])


def difference(sde: Any, tensors: list[Tensor], gradient_mode: str = "reversible", **settings: Any) -> float:
    """Relative difference of a gradient mode to plain automatic differentiation."""
    y0 = torch.randn(BATCH, DIM, requires_grad=True)
    exact = gradient(sde, tensors, y0, gradient="direct", **settings)
    found = gradient(sde, tensors, y0, gradient=gradient_mode, **settings)
    assert exact.norm() > 1e-3
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("method", ANY_NOISE)
def test_fixed_steps(method: str, noise_type: str, grid: str) -> None:
    sde = NeuralSDE(noise_type)
    assert difference(sde, list(sde.parameters()), method=method, **GRIDS[grid]) <= EXACT


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ADDITIVE)
def test_fixed_steps_additive(method: str, grid: str) -> None:
    sde = NeuralSDE("additive")
    assert difference(sde, list(sde.parameters()), method=method, **GRIDS[grid]) <= EXACT


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("method", EMBEDDED)
def test_adaptive_steps(method: str, noise_type: str) -> None:
    sde = NeuralSDE(noise_type)
    assert difference(sde, list(sde.parameters()), method=method, **ADAPTIVE) <= EXACT


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("method", ["reversible_heun", "rev_midpoint", "rev_slowrk"])
def test_ito(method: str, noise_type: str) -> None:
    sde = NeuralSDE(noise_type, "ito")
    assert difference(sde, list(sde.parameters()), method=method, **GRIDS["misaligned"]) <= EXACT


@pytest.mark.parametrize("sde_type", ["ito", "stratonovich"])
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun2", "rev_slowrk"])
def test_log_ratio(method: str, noise_type: str, sde_type: str) -> None:
    sde = NeuralSDE(noise_type, sde_type)
    assert difference(sde, list(sde.parameters()), method=method, logqp=True, **GRIDS["misaligned"]) <= EXACT


@pytest.mark.parametrize("method", ["heun2", "rk4", "slowrk", "rev_heun2", "reversible_heun"])
def test_checkpointed(method: str) -> None:
    sde = NeuralSDE("general")
    assert difference(sde, list(sde.parameters()), "checkpoint", method=method, **GRIDS["misaligned"]) <= EXACT


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_tensors_closed_over(noise_type: str, grid: str) -> None:
    """A leaf behind an intermediate result that g holds, and a leaf in a lambda's closure."""
    scale, rate = torch.tensor(0.2, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    sde = NeuralSDE(noise_type, scale=torch.exp(scale) * 0.2)
    closed = SDE(lambda t, y: sde.f(t, rate * y), sde.g, noise_type)
    assert difference(closed, [scale, rate, *sde.parameters()], **GRIDS[grid]) <= EXACT


class Spelt(NeuralSDE):
    """The same SDE without f and g, but with what `methods` names."""

    def __init__(self, noise_type: str, methods: tuple[str, ...]) -> None:
        super().__init__(noise_type)
        own = {
            "drift": super().f,
            "f_and_g": lambda t, y: (NeuralSDE.f(self, t, y), NeuralSDE.g(self, t, y)),
            "g_prod": self.product,
            "f_and_g_prod": lambda t, y, v: (NeuralSDE.f(self, t, y), self.product(t, y, v)),
        }
        self.f = self.g = None  # type: ignore[assignment, method-assign]
        for name in methods:
            setattr(self, {"drift": "f"}.get(name, name), own[name])

    def product(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        g = NeuralSDE.g(self, t, y)
        return g * v if self.noise_type == "diagonal" else (g @ v.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
@pytest.mark.parametrize("methods", [("f_and_g",), ("drift", "g_prod"), ("f_and_g_prod",)], ids=" ".join)
def test_spellings(methods: tuple[str, ...], method: str, noise_type: str) -> None:
    torch.manual_seed(3)
    sde = Spelt(noise_type, methods)
    torch.manual_seed(3)
    plain = NeuralSDE(noise_type)
    bm = BrownianPath(0.0, 1.0, noise_size(noise_type, BATCH), dtype=torch.float64, levy_area="space-time", dt=0.1)
    settings = {"method": method, "bm": bm, **GRIDS["dt=0.1"]}
    y0 = torch.randn(BATCH, DIM, requires_grad=True)
    expected = gradient(plain, list(plain.parameters()), y0, **settings)
    found = gradient(sde, list(sde.parameters()), y0, **settings)
    assert (found - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize("make", [torchsde.BrownianInterval, BrownianPath])
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_given_paths(noise_type: str, make: Callable[..., Any]) -> None:
    bm = make(0.0, 1.0, noise_size(noise_type, BATCH), dtype=torch.float64)
    sde = NeuralSDE(noise_type)
    assert difference(sde, list(sde.parameters()), bm=bm, **GRIDS["misaligned"]) <= EXACT


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
def test_fields_that_draw_random_numbers(method: str) -> None:
    net = nn.Sequential(nn.Linear(DIM, 8), nn.Dropout(0.3), nn.Linear(8, DIM))
    sde = SDE(lambda t, y: net(y), lambda t, y: 0.2 + 0.1 * torch.sin(net(y)))
    assert difference(sde, list(net.parameters()), method=method, **GRIDS["dt=0.1"]) <= EXACT


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 4)])
def test_states_of_any_shape_for_diagonal_noise(shape: tuple[int, ...]) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    sde = (lambda t, y: -y, lambda t, y: scale * torch.cos(y))
    y0 = torch.randn(shape, requires_grad=True)
    expected, found = (gradient(sde, [scale], y0, gradient=mode, **GRIDS["misaligned"]) for mode in ("direct", None))
    assert (found - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize(
    ("method", "per_step"),
    [("reversible_heun", (1, 1)), ("rev_heun2", (4, 4)), ("rev_slowrk", (4, 10)), ("rev_shark", (4, 4))],
)
def test_field_is_evaluated_once_each_way(method: str, per_step: tuple[int, int]) -> None:
    """As often as the scheme says, forward, and as often again backward; stages that need f or g alone ask for it alone."""
    calls = {"f": 0, "g": 0}
    inner = NeuralSDE("additive")

    def counted(name: str, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Tensor, y: Tensor) -> Tensor:
            calls[name] += 1
            return field(t, y)

        return call

    sde = SDE(counted("f", inner.f), counted("g", inner.g), "additive")
    y0 = torch.randn(BATCH, DIM, requires_grad=True)
    seen = []
    for num_steps in (10, 20):
        calls.update(f=0, g=0)
        sdeint(sde, y0, [0.0, 1.0], dt=1 / num_steps, method=method, restarts=None)[-1].sum().backward()
        seen.append((calls["f"], calls["g"]))
    more = tuple(after - before for before, after in zip(*seen, strict=True))
    assert more == tuple(10 * 2 * n for n in per_step)


@pytest.mark.parametrize("method", ["reversible_heun", "rev_slowrk"])
def test_what_is_kept_does_not_grow_with_the_number_of_steps(method: str) -> None:
    sde, y0 = NeuralSDE("diagonal"), torch.randn(BATCH, DIM)

    def kept(num_steps: int) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            sdeint(sde, y0, [0.0, 1.0], dt=1 / num_steps, method=method, restarts=None)
        return sum(sizes)

    assert kept(64) == kept(16)
