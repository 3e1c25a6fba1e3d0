"""Fields that compute in unusual ways: with sparse tensors, derivatives of their own, scripted code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from revsolve import odeint
from tests.front_doors import difference

Field = Callable[[Tensor, Any], Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()

    def forward(self, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(y)))


def sparse_weights(net: Net) -> Field:
    places = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])
    return lambda t, y: torch.sparse.mm(torch.sparse_coo_tensor(places, net.first.bias, (3, 3)), net(y))


def sparse_weights_of_outside(net: Net) -> Field:
    graph = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]), net.first.bias.exp(), (3, 3))
    return lambda t, y: torch.sparse.mm(graph, net(y))


def messages(net: Net) -> Field:
    to, of = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    return lambda t, y: torch.zeros_like(y).index_add_(0, to, net(y[of])) - y


def gradient_of_an_energy(net: Net) -> Field:
    return lambda t, y: vmap(grad(lambda x: net(x).sin().sum()))(y)


def forward_mode(net: Net) -> Field:
    return lambda t, y: net(y) + jvp(net, (y,), (torch.ones_like(y),))[1]


def scripted(net: Net) -> Field:
    code = torch.jit.script(net)
    return lambda t, y: code(y)


def straight_through(net: Net) -> Field:
    return lambda t, y: net(y + (torch.round(4 * y) / 4 - y).detach())


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


def reversed_gradients(net: Net) -> Field:
    return lambda t, y: net(Reversal.apply(y, 0.5 + float(t.detach())))


FIELDS = [
    sparse_weights,
    sparse_weights_of_outside,
    messages,
    gradient_of_an_energy,
    forward_mode,
    pytest.param(scripted, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")),
    straight_through,
    reversed_gradients,
]
STEPS: dict[str, Any] = {"options": {"step_size": 0.125}}


def at_times(field: Field, y0: Any, method: str, mode: str) -> list[Tensor]:
    return [*leaves(odeint(field, y0, [0.0, 0.5, 1.0], method=method, gradient=mode, **STEPS))]


def between(field: Field, y0: Any, method: str, mode: str) -> list[Tensor]:
    settings = {"method": method, "gradient": mode, "options": {"dense": True, "step_size": 0.125}}
    return [*leaves(odeint(field, y0, [0.0, 1.0], full_output=True, **settings).evaluate([0.3, 0.7]))]


def at_an_event(field: Field, y0: Any, method: str, mode: str) -> list[Tensor]:
    height = lambda t, y: t - 0.6 + 0.01 * sum(x.sum() for x in leaves(y)).tanh()  # noqa: E731
    t, states = odeint(field, y0, [0.0, 1.0], method=method, gradient=mode, event_fn=height, **STEPS)
    return [t, *leaves(states)]


def leaves(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("outputs", [at_times, between, at_an_event], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("method", "mode"), [("rk4", "checkpoint"), ("rev_rk4", "reversible")])
@pytest.mark.parametrize("make", FIELDS, ids=lambda make: make.__name__)
def test_gradient_is_direct(make: Any, method: str, mode: str, outputs: Any) -> None:
    def gradient(mode: str) -> list[Tensor]:
        torch.manual_seed(0)
        net, y0 = Net(), torch.linspace(-0.9, 1.0, 9, dtype=torch.float64).view(3, 3).requires_grad_()
        loss = sum(x.square().sum() for x in outputs(make(net), y0, method, mode))
        return list(torch.autograd.grad(loss, [y0, *net.parameters()]))

    assert difference(gradient(mode), gradient("direct")) < 1e-10


@pytest.mark.parametrize("outputs", [at_times, between, at_an_event], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("method", "mode"), [("rk4", "checkpoint"), ("rev_rk4", "reversible")])
def test_a_flow_that_differentiates_by_its_state(method: str, mode: str, outputs: Any) -> None:
    """As continuous normalising flows do: requires_grad of the state is set in the field."""

    def gradient(mode: str) -> list[Tensor]:
        torch.manual_seed(0)
        net, y0 = Net(), torch.linspace(-0.9, 1.0, 9, dtype=torch.float64).view(3, 3).requires_grad_()

        def field(t: Tensor, state: Any) -> Any:
            with torch.enable_grad():
                y = state[0] if state[0].requires_grad else state[0].requires_grad_()
                rate = net(y)
                columns = [torch.autograd.grad(rate[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(3)]
            return rate, -sum(columns)

        loss = sum(x.square().sum() for x in outputs(field, (y0, y0[:, 0]), method, mode))
        return list(torch.autograd.grad(loss, [y0, *net.parameters()], materialize_grads=True))

    assert difference(gradient(mode), gradient("direct")) < 1e-10


@pytest.mark.parametrize("mode", ["reversible", "direct"])
def test_dense_output_keeps_what_the_field_was_made_with(mode: str) -> None:
    class Driven(Net):
        gain = 1.0

        def forward(self, y: Tensor) -> Tensor:
            return self.gain * super().forward(y)

    def gradient(change: bool) -> list[Tensor]:
        torch.manual_seed(0)
        Driven.gain, y0 = 1.0, torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        net = Driven()
        (values,) = between(lambda t, y: net(y), y0, "rev_rk4", mode)
        Driven.gain = 5.0 if change else 1.0
        return list(torch.autograd.grad(values.square().sum(), [y0, *net.parameters()]))

    assert difference(gradient(True), gradient(False)) < 1e-12
