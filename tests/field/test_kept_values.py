"""Fields that keep values, begin late or write into their own memory: right as a twin that does not, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from revsolve import odeint, reversible_loop
from tests.front_doors import DOORS, difference
from tests.hostile import (
    BUFFERS,
    KEEPERS,
    KEEPERS_BY_KEY,
    KEEPERS_ELSEWHERE,
    KEEPERS_HIDDEN,
    KEEPERS_LATE,
    LATE,
    OTHERS,
    REASONS,
    ByKeysHidden,
    Hostile,
    LateLayer,
    caching,
    made,
    start_of,
)

# Undoing 5 relaxations by half, or 10 steps, multiplies roundings by some hundreds.
TOLERANCE = 1e-9
MODES: dict[str, Any] = {
    "odeint": ["reversible", "checkpoint"],
    "cdeint": ["reversible"],
    "sdeint": ["reversible", "checkpoint"],
}
CASES = [(name, mode) for name in DOORS for mode in MODES.get(name, ["reversible"])]


def gradients(door: Callable[..., Tensor], field: Hostile, batch: int, **settings: Any) -> list[Tensor]:
    torch.manual_seed(1)
    y0 = start_of(batch).requires_grad_()
    with caching(field):
        loss = door(field, y0, **settings).square().sum()
        return list(torch.autograd.grad(loss, [y0, *field.parameters()], materialize_grads=True))


def loop_of(field: Hostile, y0: Tensor, **settings: Any) -> Tensor:
    return reversible_loop(lambda y: 0.2 * torch.tanh(field(y)), y0, num_steps=5, **settings)


def right_or_refused(door: Callable[..., Tensor], kind: type[Hostile], batch: int = 4, **settings: Any) -> None:
    wanted = gradients(door, made(kind, start_of(batch), plain=True), batch, **{**settings, "gradient": "direct"})
    field = made(kind, start_of(batch), plain=False)
    try:
        found = gradients(door, field, batch, **settings)
    except (RuntimeError, ValueError) as refusal:
        with pytest.raises(type(refusal), match=REASONS):
            raise
    else:
        assert difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize(
    "kind", [*KEEPERS, *KEEPERS_LATE, *KEEPERS_HIDDEN, *LATE, *OTHERS], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize(("door", "mode"), CASES, ids=str)
def test_the_gradient_is_right_or_refused(door: str, mode: str, kind: type[Hostile]) -> None:
    right_or_refused(DOORS[door], kind, gradient=mode)


@pytest.mark.parametrize("door", [DOORS["odeint"], DOORS["cdeint"], loop_of], ids=["odeint", "cdeint", "loop"])
def test_what_is_kept_by_keys_where_nobody_looks_is_refused(door: Callable[..., Tensor]) -> None:
    with pytest.raises(RuntimeError, match="kept from an earlier call"):
        gradients(door, made(ByKeysHidden, start_of(4), plain=False), 4)


@pytest.mark.parametrize("kind", [*KEEPERS, *KEEPERS_LATE, *LATE, *OTHERS], ids=lambda kind: kind.__name__)
def test_the_direct_gradient_is_that_of_autograd(kind: type[Hostile]) -> None:
    right_or_refused(DOORS["odeint"], kind, gradient="direct")


@pytest.mark.parametrize("kind", BUFFERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mode", [True, False], ids=["grad", "no_grad"])
def test_states_are_those_of_new_tensors(door: str, kind: type[Hostile], mode: bool) -> None:
    y0, found = start_of(4), []
    for plain in (True, False):
        field = made(kind, y0, plain).requires_grad_(False)
        with torch.set_grad_enabled(mode):
            torch.manual_seed(1)
            found.append(DOORS[door](field, y0, **({} if door == "fixed_point" else {"restarts": 4})))
        assert not field.memory[0].requires_grad
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "kind", [*KEEPERS, *KEEPERS_ELSEWHERE, *KEEPERS_HIDDEN, *KEEPERS_BY_KEY], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
def test_solves_and_calls_of_one_field_with_one_gradient(kind: type[Hostile], mode: str) -> None:
    """What a solve leaves in a field is no constant of the next, nor of the field's own use."""

    def gradient(plain: bool, gradient: str) -> list[Tensor]:
        field, y0 = made(kind, start_of(4), plain), start_of(4).requires_grad_()
        first = DOORS["odeint"](field, y0, gradient=gradient, restarts=4)[-1]
        again, then = (
            DOORS["odeint"](field, torch.stack([y0, first])[0], gradient=gradient, restarts=4)[-1],
            field(first),
        )
        loss = first.sum() + again.square().sum() + then.square().sum()
        return list(torch.autograd.grad(loss, [y0, *field.parameters()], materialize_grads=True))

    try:
        found = gradient(False, mode)
    except (RuntimeError, ValueError) as refusal:
        with pytest.raises(type(refusal), match=f"{REASONS}|backward through the graph a second time"):
            raise
    else:
        assert difference(found, gradient(True, "direct")) < TOLERANCE


@pytest.mark.parametrize("method", ["rev_rk4", "rk4", "reversible_heun"])
def test_memory_of_a_field_stays_without_gradients(method: str) -> None:
    """Where none are recorded, though the field itself would record them."""
    memory = torch.zeros(2, dtype=torch.float64)

    def rotation(t: Tensor, y: Tensor) -> Tensor:
        memory[0], memory[1] = y[1], -y[0]
        return memory

    with torch.no_grad():
        y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = odeint(rotation, y0, [0.0, 1.0], method=method, options={"step_size": 0.05})
    assert not (memory.requires_grad or y.requires_grad)


@pytest.mark.parametrize(
    "kind", [*KEEPERS_LATE, *KEEPERS_HIDDEN, *KEEPERS_BY_KEY, *LATE, *OTHERS], ids=lambda kind: kind.__name__
)
def test_the_gradient_of_a_loop_is_right_or_refused(kind: type[Hostile]) -> None:
    right_or_refused(loop_of, kind)


class Driven(torch.nn.Module):
    """A field driven by numbers and a module, wherever they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3).double() for _ in range(3))
        self.layer, self.listed, self.named, self.far = self.layers[0], [1.0, [1.0]], {"gain": 1.0}, SimpleNamespace()

    def forward(self, y: Tensor) -> Tensor:
        return self.far.gain * self.listed[0] * torch.tanh(self.listed[1][0] * self.named["gain"] * self.layer(y))

    def drive(self, n: int) -> None:
        self.layer, self.far.gain = self.layers[n], 1.0 + n
        self.listed[0], self.listed[1][0], self.named["gain"] = 0.5 + n, 1.0 - 0.2 * n, 1.0 + 0.1 * n


@pytest.mark.parametrize(("door", "mode"), CASES, ids=str)
def test_each_solve_finds_what_it_was_made_with(door: str, mode: str) -> None:
    def gradient(mode: str) -> list[Tensor]:
        torch.manual_seed(1)
        field, y0, loss = Driven(), start_of(4).requires_grad_(), torch.zeros(())
        for n in range(3):
            field.drive(n)
            loss = loss + DOORS[door](field, y0, gradient=mode).square().sum()
        return list(torch.autograd.grad(loss, [y0, *field.parameters()]))

    assert difference(gradient(mode), gradient("direct")) < TOLERANCE


def by_functorch(door: Callable[..., Tensor], field: Hostile) -> list[Tensor]:
    inputs = {"y0": start_of(4), **{name: p.detach() for name, p in field.named_parameters()}}

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        weights = {name: x for name, x in inputs.items() if name != "y0"}
        settings = {} if door is DOORS["fixed_point"] else {"restarts": 4}
        with caching(field):
            return door(lambda y: functional_call(field, weights, (y,)), inputs["y0"], **settings).square().sum()

    torch.manual_seed(1)
    return list(grad(loss)(inputs).values())


@pytest.mark.parametrize("kind", [*KEEPERS, *KEEPERS_LATE, *KEEPERS_BY_KEY, LateLayer], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("door", ["odeint", "cdeint", "fixed_point"])
def test_the_gradient_of_torch_func_is_right_or_refused(door: str, kind: type[Hostile]) -> None:
    wanted = by_functorch(DOORS[door], made(kind, start_of(4), plain=True))
    field = made(kind, start_of(4), plain=False)
    try:
        found = by_functorch(DOORS[door], field)
    except RuntimeError as refusal:
        with pytest.raises(RuntimeError, match=REASONS):
            raise refusal
    else:
        assert difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("method", ["rev_rk4", "rk4"])
def test_an_attribute_set_before_the_product_of_torch_func_is_that_of_the_solve(method: str) -> None:
    class Scaled(torch.nn.Module):
        drive: Any = 1.0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.drive * torch.sin(y)

    field, found = Scaled(), []
    for later in (1.0, 5.0):
        field.drive = 1.0
        solve = lambda y: odeint(field, y, [0.0, 1.0], method=method, options={"step_size": 0.1})[-1]  # noqa: E731
        y, pull = vjp(solve, start_of(4))
        field.drive = later
        found.append(pull(torch.ones_like(y))[0])
    assert torch.equal(*found)


def test_a_field_that_changes_its_state_in_place_is_refused() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            y.mul_(2.0)
        return -y

    with pytest.raises(ValueError, match="changes its state in place"):
        odeint(field, torch.ones(2), [0.0, 1.0])


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("method", ["rk4", "rev_rk4"])
def test_a_sparse_matrix_whose_entries_have_gradients(method: str, layout: torch.layout) -> None:
    entries, y0 = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.ones(3, 2, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        dense = torch.zeros(3, 3, dtype=y.dtype).index_put(
            (torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2, 0])), entries
        )
        return torch.tanh(torch.sparse.mm(dense.to_sparse(layout=layout), y))

    found = [
        torch.autograd.grad(odeint(func, y0, torch.linspace(0, 1, 9), method=method, gradient=gradient).sum(), entries)
        for gradient in (None, "direct")
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class Feature(nn.Module):
    """Keeps its hidden layer, as modules keep their attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        self.hidden: Any = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.first(y))
        return self.second(self.hidden)


@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "alf", "dopri5"])
def test_a_gradient_of_what_a_field_keeps_of_its_state_is_refused(method: str) -> None:
    field, y0 = Feature(), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        y = odeint(field, y0, torch.linspace(0.0, 1.0, 9), method=method)[-1]
        torch.testing.assert_close(field.hidden.detach(), torch.tanh(field.first(y)).detach(), rtol=0.2, atol=0.2)
        y.sum().backward()  # that of the state is right
        y = odeint(field, y0, torch.linspace(0.0, 1.0, 9), method=method)[-1]
        with pytest.raises(RuntimeError, match="from its state and kept"):
            (y.sum() + field.hidden.sum()).backward()


class Penalty(nn.Module):
    """Adds up a penalty beside what it returns, in an attribute or a list."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.listed, self.penalty, self.penalties = listed, torch.zeros((), dtype=torch.float64), []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value = torch.tanh(self.layer(y))
        if self.listed:
            self.penalties.append(value.square().mean())
        else:
            self.penalty = self.penalty + value.square().mean()
        return value

    @property
    def total(self) -> Tensor:
        return sum(self.penalties, start=self.penalty)


@pytest.mark.parametrize("listed", [False, True], ids=["attribute", "list"])
@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "alf", "dopri5"])
def test_a_gradient_of_what_a_field_adds_up_beside_its_value_is_refused(method: str, listed: bool) -> None:
    field, t = Penalty(listed), torch.linspace(0.0, 1.0, 9)
    y0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    y = odeint(field, y0, t, method=method)[-1]
    with pytest.raises(RuntimeError, match=r"kept, such as a penalty|a second time"):
        (y.sum() + field.total).backward()


@pytest.mark.parametrize("method", ["rev_rk4", "rk4"])
def test_what_a_field_records_late_stays(method: str) -> None:
    """In lists, dictionaries and attributes; only what it uses again is forgotten."""

    class Recording(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3).double()
            self.middle, self.listed, self.by_time = None, [], {}  # type: Any, list[Tensor], dict[float, Tensor]

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if t > 0.4:
                self.middle = y if self.middle is None else self.middle
                self.listed.append(y)
                self.by_time[float(t)] = y
            return torch.tanh(self.layer(y))

    field = Recording()
    y = odeint(field, start_of(4), [0.0, 1.0], method=method, options={"step_size": 0.25})
    recorded = field.middle, [*field.listed], dict(field.by_time)
    assert recorded[0] is not None and len(recorded[1]) >= 4 and len(recorded[2]) >= 3
    y[-1].sum().backward()
    assert field.middle is recorded[0] and field.by_time == recorded[2]
    assert all(a is b for a, b in zip(field.listed, recorded[1], strict=False)) and len(field.listed) >= len(
        recorded[1]
    )


def test_a_hidden_leaf_like_those_of_the_field_in_a_short_window_is_refused() -> None:
    hidden = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    unfold = itertools.repeat(hidden)  # where nobody looks

    def field(t: Tensor, y: Tensor) -> Tensor:
        value = torch.sin(y) + torch.zeros_like(y).requires_grad_()
        return value * next(unfold) if 0.3 < t < 0.45 else value

    def gradient(mode: str) -> Tensor:
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
        y = odeint(field, y0, [0.0, 1.0], method="rk4", options={"step_size": 0.125}, gradient=mode)
        # by y0, too: where nothing is asked for that the solve knows of, autograd does not call its backward pass
        return torch.autograd.grad(y[-1].sum(), (hidden, y0), materialize_grads=True)[0]

    assert gradient("direct").abs().sum() > 0
    with pytest.raises(RuntimeError, match="did not use when it was first called"):
        gradient("checkpoint")
