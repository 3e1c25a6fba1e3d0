"""Explicit symmetric multistep schemes written as coupling updates: a specification of what the engine would have to offer.

With members y_n, ..., y_{n-5}, every update reads one member and writes the oldest, which becomes y_{n+1}; then the members are
renumbered. The engine takes states of any number of members; what it would have to learn is to remember a value of the field for
each of them, and to renumber them.
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from revsolve.core.arithmetic import moment
from revsolve.core.coupling import CouplingUpdate, advance, scheduled
from revsolve.core.tape import Memo
from revsolve.schemes.increment import OneEvaluation

STEPS = 6
tensor = partial(torch.tensor, dtype=torch.float64)
ALPHA = [-1.0, 1.4, -1.0, 0.0, 1.0, -1.4, 1.0]  # rho(x) = (x^2 - 1)(x^2 + 1)(x^2 - 1.4 x + 1), ascending
OLDEST = STEPS - 1


def slope_weights() -> list[float]:
    """The symmetric beta_1, ..., beta_5 of order 6: the method is exact for t, t^3 and t^5 about its middle."""
    odd = (1, 3, 5)
    nodes = [1 - STEPS / 2, 2 - STEPS / 2, 0.0]
    matrix = [[q * x ** (q - 1) * (1 if x == 0 else 2) for x in nodes] for q in odd]
    rhs = [sum(a * (j - STEPS / 2) ** q for j, a in enumerate(ALPHA)) for q in odd]
    first, second, middle = torch.linalg.solve(tensor(matrix), tensor(rhs)).tolist()
    return [first, second, middle, second, first]


def updates() -> list[CouplingUpdate]:
    """One step. Member k is y_{n-k}, so that j = 5 - k; its slope is that at k steps before the beginning of the step."""
    mixes = [CouplingUpdate(OLDEST, OLDEST - j, mix=-a) for j, a in enumerate(ALPHA[1:-1], 1) if a != 0.0]
    slopes = [
        CouplingUpdate(OLDEST, OLDEST - j, gain=b, increment=OneEvaluation(float(j - OLDEST)))
        for j, b in enumerate(slope_weights(), 1)
    ]
    return mixes + slopes


class Field:
    """y' = i y, and the number of times that it was asked."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.slopes: dict[int, tuple[Tensor, Tensor]] = {}  # by member: where it was asked, and its value there

    def value(self, t: float, x: Tensor) -> Tensor:
        self.num_calls += 1
        return torch.stack([-x[1], x[0]])

    def control(self, t: float, t0: float, t1: float) -> float:
        return t1 - t0

    def product(self, value: Tensor, control: float) -> tuple[Tensor, float]:
        return value, control

    def slope(self, t: float, x: Tensor) -> Tensor:
        """The value at a member of the state, which is remembered as long as the member is."""
        if id(x) not in self.slopes:
            self.slopes[id(x)] = x, self.value(t, x)
        return self.slopes[id(x)][1]


def change(update: CouplingUpdate, source: Tensor, field: Field, t0: float, t1: float) -> Tensor:
    """The term mix * source + gain * increment of an update."""
    if update.increment is None:
        return update.mix * source
    return update.gain * (t1 - t0) * field.slope(moment(t0, t1, update.increment.nodes[0]), source)


def step(members: list[Tensor], field: Field, t0: float, t1: float) -> list[Tensor]:
    new = sum((change(u, members[u.source], field, t0, t1) for u in updates()), members[OLDEST])
    return [new, *members[:OLDEST]]


def undo(members: list[Tensor], field: Field, t0: float, t1: float) -> list[Tensor]:
    new, *kept = members
    changes = [change(u, kept[u.source], field, t0, t1) for u in reversed(updates())]
    return [*kept, sum((-x for x in changes), new)]


def exact(t: float) -> Tensor:
    return tensor([math.cos(t), math.sin(t)])


def solved(num_steps: int, field: Field) -> tuple[list[Tensor], float]:
    h = 4.0 / num_steps
    members = [exact(n * h) for n in range(OLDEST, -1, -1)]
    for n in range(OLDEST, num_steps):
        members = step(members, field, n * h, (n + 1) * h)
    return members, h


def test_the_order_is_six():
    errors = [float((solved(n, Field())[0][0] - exact(4.0)).norm()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(6, abs=0.2)


def test_a_step_asks_the_field_once():
    field = Field()
    solved(40, field)
    assert field.num_calls == 40 - OLDEST + 4  # each new member, and the four before the first step


def test_steps_are_undone():
    members, h = solved(40, field := Field())
    for n in range(39, OLDEST - 1, -1):
        members = undo(members, field, n * h, (n + 1) * h)
    for k, member in enumerate(members):
        torch.testing.assert_close(member, exact((OLDEST - k) * h), rtol=1e-12, atol=1e-12)


def test_the_engine_updates_one_member_of_many():
    members = tuple(exact(0.1 * (OLDEST - k)) for k in range(STEPS))
    after, memo = members, Memo(Field())
    for update in updates():
        after = advance(scheduled(update, 0.5, 0.6), after, memo)
    assert len(after) == STEPS
    torch.testing.assert_close(after[OLDEST], step(list(members), Field(), 0.5, 0.6)[0])
