"""torch.compile around a solve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import BrownianPath, LinearPath, cdeint, fixed_point, odeint, sdeint
from tests.front_doors import BATCH, SIZE, difference, make_net, make_y0

pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo of torch 2.9 cannot follow every solve")

Field = Callable[[Tensor], Tensor]


def path(device: torch.device | str = "cpu", scale: float = 1.0) -> LinearPath:
    data = torch.tensor([[0.0, 0.0], [0.5, 0.3], [-0.2, 0.9]], device=device)
    return LinearPath(scale * data.expand(BATCH, 3, 2))


def through_odeint(field: Field, y0: Tensor, X: LinearPath, **solve: Any) -> Tensor:
    settings = {"method": "rev_rk4", "options": {"step_size": 0.5}, "restarts": 4, **solve}
    return odeint(lambda t, y: field(y), y0, settings.pop("t", [0.0, 1.0]), **settings)


def through_sdeint(field: Field, y0: Tensor, X: LinearPath, **solve: Any) -> Tensor:
    settings = {"method": "reversible_heun", "dt": 0.5, "restarts": 4, **solve}
    return sdeint((lambda t, y: field(y), lambda t, y: 0.3 * (1 + 0.3 * y)), y0, [0.0, 0.7, 1.0], **settings)


def through_cdeint(field: Field, y0: Tensor, X: LinearPath, **solve: Any) -> Tensor:
    settings = {"method": "rev_heun2", "options": {"step_size": 0.7}, "restarts": 4, **solve}
    return cdeint(X, lambda t, z: torch.stack([field(z), z], -1), y0, [0.0, 2.0], **settings)


def through_fixed_point(field: Field, y0: Tensor, X: LinearPath, **solve: Any) -> Tensor:
    return fixed_point(lambda z: 0.5 * torch.tanh(field(z)) + y0, y0, **{"tol": 0.0, "max_steps": 3, **solve})


DOORS = [through_odeint, through_sdeint, through_cdeint, through_fixed_point]
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


def squared(door: Any, field: Field, **solve: Any) -> Callable[[Tensor, LinearPath], Tensor]:
    return lambda y0, X: door(field, y0, X, **solve).square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("door", [door for door in DOORS if door is not through_sdeint])
def test_a_training_step_around_a_solve_compiles_into_one_graph(door: Any, backend: str, device: torch.device) -> None:
    net, y0, X = make_net(device=device).float(), make_y0(torch.float32, device), path(device)
    loss, inputs = squared(door, net), [y0, *net.parameters()]
    wanted = torch.autograd.grad(loss(y0, X), inputs)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(y0, X), inputs)
    assert difference(list(found), list(wanted)) < 1e-5  # float32, other kernels


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_noise_is_drawn_in_the_program(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New in every call; of one seed, those of the same draw outside, where the backend keeps to it."""
    net, y0, X = make_net().float(), make_y0(torch.float32), path()
    loss, inputs = squared(through_sdeint, net), [y0, *net.parameters()]
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        torch.manual_seed(3)
        first, second = compiled(y0, X), compiled(y0, X)
        found = torch.autograd.grad(first, inputs)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    torch.manual_seed(3)
    wanted = torch.autograd.grad(loss(y0, X), inputs)
    assert difference(list(found), list(wanted)) < 1e-5
    assert not torch.allclose(first, second)


def test_a_compiled_solve_follows_the_path_that_it_is_given() -> None:
    net, y0 = make_net().float(), make_y0(torch.float32)
    loss = squared(through_cdeint, net)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for X in (path(), path(scale=2.0)):
        torch.testing.assert_close(compiled(y0, X), loss(y0, X))


@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun", "alf4_s3"])
def test_nothing_is_weighted_by_alpha(method: str) -> None:
    """inductor of torch 2.13 leaves it out in torch.add(x, a @ b, alpha=alpha)."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    A, y0, X = torch.randn(SIZE, SIZE), make_y0(torch.float32).detach(), path()
    solve = torch.compile(lambda y0: through_odeint(lambda y: y @ A, y0, X, method=method), backend=keep)
    assert solve(y0).isfinite().all()
    assert graphs and not any("alpha" in node.kwargs for graph in graphs for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun", "alf4_s3"])
def test_a_linear_field(method: str) -> None:
    A, y0, X = torch.randn(SIZE, SIZE).requires_grad_(), make_y0(torch.float32), path()
    loss = squared(through_odeint, lambda y: y @ A, method=method)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(y0, X), (y0, A))
    assert difference(list(found), list(torch.autograd.grad(loss(y0, X), (y0, A)))) < 1e-5


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "adaptive": (through_odeint, {"method": "rev_dopri5", "options": {}}, "adaptive steps are chosen"),
    "times": (through_odeint, {"t": torch.tensor([0.0, 1.0])}, "give a list of times"),
    "given noise": (through_sdeint, {"bm": BrownianPath(0.0, 1.0, (BATCH, SIZE))}, "leave out bm="),
    "area": (through_sdeint, {"method": "rev_slowrk"}, "space-time area"),
    "path": (lambda field, y0, X: through_cdeint(field, y0, path()), {}, "make it outside"),
    "tol": (through_fixed_point, {"tol": 1e-3}, "use tol=0"),
}


@pytest.mark.parametrize(("door", "solve", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_compile_says_why(door: Any, solve: dict[str, Any], message: str) -> None:
    loss = torch.compile(squared(door, make_net().float(), **solve), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        loss(make_y0(torch.float32), path())
