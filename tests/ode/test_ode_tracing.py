"""What the field depends on is found wherever it is held; what cannot be found raises, and is never dropped."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import ReconstructionWarning, odeint
from tests.equations import leaf, relative_difference

TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
GLOBAL = {"weight": torch.eye(3, dtype=torch.float64)}
EXACT = 1e-12  # the order of summation only, as in test_ode_exactness.py
FIXED: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.05}}

Field = Callable[[Tensor, Tensor], Tensor]
Holder = Callable[[Tensor], Field]


class Holding:
    """A callable object, and a bound method, that use a tensor of their own."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight)

    def method(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight)


class Attribute(nn.Module):
    """A module with a tensor that is no parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight)


def free(weight: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ weight)


def held_by_global(weight: Tensor) -> Field:
    GLOBAL["weight"] = weight
    return lambda t, y: torch.tanh(y @ GLOBAL["weight"])


def held_by_default(weight: Tensor) -> Field:
    def field(t: Tensor, y: Tensor, held: Tensor = weight) -> Tensor:
        return torch.tanh(y @ held)

    return field


def held_by_namespace(weight: Tensor) -> Field:
    settings = SimpleNamespace(deep={"weight": [weight]})
    return lambda t, y: torch.tanh(y @ settings.deep["weight"][0])


def held_by_nested_function(weight: Tensor) -> Field:
    def inner(y: Tensor) -> Tensor:
        return y @ weight

    return lambda t, y: torch.tanh(inner(y))


def held_by_decorated(weight: Tensor) -> Field:
    @functools.wraps(free)
    def wrapped(t: Tensor, y: Tensor) -> Tensor:
        return free(weight, t, y)

    return wrapped


HOLDERS: dict[str, Holder] = {
    "closure": lambda w: lambda t, y: torch.tanh(y @ w),
    "nested function": held_by_nested_function,
    "partial": lambda w: functools.partial(free, w),
    "bound method": lambda w: Holding(w).method,
    "callable object": Holding,
    "attribute of a module": Attribute,
    "module in a closure": lambda w: lambda t, y: Attribute(w)(t, y),
    "default argument": held_by_default,
    "global": held_by_global,
    "namespace": held_by_namespace,
    "decorated": held_by_decorated,
    "list": lambda w, /: (lambda held: lambda t, y: torch.tanh(y @ held[0]))([w]),
    "view": lambda w: (lambda held: lambda t, y: torch.tanh(y @ held))(w.T),
}
ORIGINS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda w: w,
    "intermediate result": lambda w: torch.sin(w) * 2,
}


def gradient(field: Field, inputs: list[Tensor], **solve: Any) -> list[Tensor]:
    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    loss = odeint(field, y0, TIMES, **solve).square().sum()
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_found_wherever_it_is_held(holder: Holder, origin: Callable[[Tensor], Tensor], mode: str) -> None:
    weight = leaf(3, 3)
    field = holder(origin(weight))
    (got,), (wanted,) = (gradient(field, [weight], gradient=g, **FIXED) for g in (mode, "direct"))
    assert relative_difference(got, wanted) < EXACT
    assert wanted.norm() > 0.1


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_results_computed_from_one_another(mode: str) -> None:
    """One closed-over tensor is computed from another: each path's gradient counts once."""
    weight = leaf(3, 3)
    first = torch.sin(weight)
    second = first @ weight
    field = lambda t, y: torch.tanh(y @ second) + y @ first - y @ weight  # noqa: E731
    (got,), (wanted,) = (gradient(field, [weight], gradient=g, **FIXED) for g in (mode, "direct"))
    assert relative_difference(got, wanted) < EXACT


class Remembering(torch.autograd.Function):
    """y * shift * weight; the node has an attribute of the name by which those of leaves know them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        ctx.variable = weight
        ctx.save_for_backward(y, shift)
        return y * shift * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        y, shift = ctx.saved_tensors
        return grad * shift * ctx.variable, grad * y * ctx.variable, grad * y * shift


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_below_a_function_of_the_users_own(mode: str) -> None:
    shift, weight = leaf(3), leaf(3)
    held = SimpleNamespace(shift=torch.sin(shift), weight=weight)  # found only by walking the graph
    field = lambda t, y: Remembering.apply(y, held.shift, held.weight)  # noqa: E731
    got, wanted = (gradient(field, [shift, weight], gradient=g, **FIXED) for g in (mode, "direct"))
    for mine, direct in zip(got, wanted, strict=True):
        assert relative_difference(mine, direct) < EXACT


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_a_state_computed_from_what_the_field_holds(mode: str) -> None:
    """An encoder gives both the initial state and a tensor of the field."""
    weight = leaf(3, 3)
    encoded = torch.sin(weight)

    def grad(g: str) -> Tensor:
        ys = odeint(lambda t, y: torch.tanh(y @ encoded) + weight, encoded * 2, TIMES, gradient=g, **FIXED)
        return torch.autograd.grad(ys.square().sum(), weight, retain_graph=True)[0]

    assert relative_difference(grad(mode), grad("direct")) < EXACT


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize(("start", "stop"), [(0.52, 2.0), (0.62, 0.68), (-1.0, 0.03)], ids=["late", "window", "early"])
def test_pieces_that_are_used_for_part_of_the_time(start: float, stop: float, mode: str) -> None:
    """Held where it can be seen, a tensor may be used whenever the field likes."""
    weights = [leaf(3, 3), leaf(3, 3)]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ weights[int(start < float(t) < stop)])

    got, wanted = (gradient(field, weights, gradient=g, restarts=8, **FIXED) for g in (mode, "direct"))
    assert relative_difference(torch.stack(got), torch.stack(wanted)) < EXACT


class Hidden:
    """Holds a tensor where no search goes."""

    __slots__ = ("secret",)

    def __init__(self, weight: Tensor) -> None:
        self.secret = iter([weight]).__reduce__  # a bound method of a builtin iterator

    def weight(self) -> Tensor:
        return self.secret()[1][0][0]


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize(("start", "stop"), [(0.52, 2.0), (0.62, 0.78)], ids=["late", "window"])
def test_hidden_and_first_used_late_raises(start: float, stop: float, mode: str) -> None:
    """What cannot be found when the field is first called is noticed when gradients are taken: an error, not a wrong gradient."""
    weight, hidden = leaf(3, 3), Hidden(leaf(3, 3))

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ (hidden.weight() if start < float(t) < stop else weight))

    with pytest.raises(RuntimeError, match=r"depends on a tensor .* did not use when it was first called"):
        gradient(field, [weight], gradient=mode, restarts=8, **FIXED)


@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "alf4"])
def test_hidden_and_all_that_wants_a_gradient_raises(method: str) -> None:
    """Nothing else asks for a backward pass that would notice: the solve would have no gradient, without a word."""
    hidden, way = Hidden(leaf(3, 3)), {"method": method, "options": {"step_size": 0.05}}

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ hidden.weight()) if t > 0.52 else -y

    y0 = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"depends on a tensor of shape \(3, 3\) that it did not use when it was first"
    ):
        odeint(field, y0, TIMES, **way)
    with torch.no_grad():
        assert not odeint(field, y0, TIMES, **way).requires_grad
    direct = odeint(field, y0, TIMES, gradient="direct", **way)  # autograd sees every step
    assert torch.autograd.grad(direct.sum(), hidden.weight())[0].abs().min() > 0


def test_a_solve_without_gradients_costs_no_more_calls() -> None:
    calls: list[Tensor] = []
    field = lambda t, y: calls.append(t) or torch.sin(y)  # noqa: E731
    solution = odeint(field, torch.ones(3), TIMES, full_output=True, **FIXED)
    assert len(calls) == solution.stats.num_evaluations
    assert solution.stats.num_stored_states == 0


def test_hidden_but_used_at_once_is_found() -> None:
    weight = leaf(3, 3)
    hidden = Hidden(weight)
    field = lambda t, y: torch.tanh(y @ hidden.weight())  # noqa: E731
    (got,), (wanted,) = (gradient(field, [weight], gradient=g, **FIXED) for g in ("reversible", "direct"))
    assert relative_difference(got, wanted) < EXACT


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_parameters_changed_in_place_before_backward_raise(mode: str) -> None:
    field = nn.Linear(3, 3).double()
    ys = odeint(lambda t, y: field(y), torch.ones(2, 3, dtype=torch.float64), TIMES, gradient=mode, **FIXED)
    with torch.no_grad():
        field.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf4"])
def test_dropout_is_replayed_as_it_was(method: str, mode: str) -> None:
    """The same draws forward and backward: the gradient is that of a direct solve with the same seed."""
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 3)).double()

    def grad(g: str) -> list[Tensor]:
        torch.manual_seed(5)
        solve = {**FIXED, "method": method, "restarts": 6}
        return gradient(lambda t, y: net(y), list(net.parameters()), gradient=g, **solve)

    got, wanted = (torch.cat([x.flatten() for x in grad(g)]) for g in (mode, "direct"))
    assert relative_difference(got, wanted) < EXACT


def test_the_random_state_is_left_as_one_draw_leaves_it() -> None:
    """A solve through a random field consumes one seed, however many steps it takes."""
    net = nn.Dropout(0.5)
    states = []
    for step in (0.5, 0.05):
        torch.manual_seed(3)
        y0 = torch.ones(4, dtype=torch.float64, requires_grad=True)
        odeint(lambda t, y: net(y), y0, TIMES, method="rev_rk4", options={"step_size": step}).sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_field_that_changes_between_calls_is_noticed() -> None:
    """A counter that no replay can repeat: undoing misses the stored states, and the certificate says so."""
    calls = iter(range(10_000))
    field = lambda t, y: -y * (1 + 0.1 * next(calls))  # noqa: E731
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    ys = odeint(field, y0, TIMES, restarts=5, **FIXED)
    with pytest.warns(ReconstructionWarning, match="make sure that the field is deterministic"):
        ys.sum().backward()


def test_a_detached_use_gives_no_gradient() -> None:
    used, detached = leaf(3, 3), leaf(3, 3)
    field = lambda t, y: torch.tanh(y @ used) @ detached.detach()  # noqa: E731
    got, wanted = (gradient(field, [used], gradient=g, **FIXED) for g in ("reversible", "direct"))
    assert relative_difference(got[0], wanted[0]) < EXACT
