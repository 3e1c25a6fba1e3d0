"""Inverse: an update taken back is as if it had never been made, for any scheme and numbers; and its cotangents are right."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import method_names
from revsolve.core.arithmetic import linear
from revsolve.core.coupling import CouplingUpdate, State, advance, pull_back, scheduled
from revsolve.core.tape import Grads, Memo, Tape
from revsolve.schemes.increment import OneEvaluation
from revsolve.schemes.names import scheme

REVERSIBLE = [name for name in method_names() if scheme(name).reversible]
SIZES = st.floats(-5, 5, allow_nan=False)
STEPS = st.floats(1e-3, 0.5) | st.floats(-0.5, -1e-3)


class Field:
    """The term h f(t, x) of a smooth field that depends on a tensor."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.num_calls = 0

    def value(self, t: Any, x: Tensor) -> Tensor:
        self.num_calls += 1
        return torch.sin(self.weight * x + t)

    def control(self, t: Any, t0: Any, t1: Any) -> Any:
        return t1 - t0

    def product(self, value: Tensor, control: Any) -> tuple[Tensor, Any]:
        return value, control


def no_audit(outputs: Any, own: Any) -> None:
    pass


def started(name: str, y: Tensor, t0: float, t1: float, memo: Memo) -> State:
    pair: State = (y,)
    for update in scheme(name).restart:
        pair = advance(scheduled(update, t0, t1), pair, memo)
    return pair


@pytest.mark.parametrize("name", REVERSIBLE)
@given(y=st.lists(SIZES, min_size=1, max_size=4), t0=SIZES, h=STEPS)
def test_undo_after_advance(name: str, y: list[float], t0: float, h: float) -> None:
    """Some twenty additions of numbers below 20 are rounded either way; velocities are divided by the step once more."""
    term = Field(torch.tensor(0.7, dtype=torch.float64))
    before = pair = started(name, torch.tensor(y, dtype=torch.float64), t0, t0 + h, Memo(term))
    for update in scheme(name).updates:
        pair = advance(scheduled(update, t0, t0 + h), pair, Memo(term))
    tape = Tape(term, (), no_audit)
    with torch.enable_grad():
        for update in reversed(scheme(name).updates):
            pair = pull_back(scheduled(update, t0, t0 + h), pair, Grads(), tape)
    assert pair[1] is not None
    assert before[1] is not None
    torch.testing.assert_close(pair[0], before[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(pair[1], before[1], rtol=0, atol=1e-12 / min(1.0, abs(h)))


COEFFICIENTS = st.floats(-2, 2).filter(lambda c: abs(c) > 0.1)
LINE = OneEvaluation(0.3)


@given(keep=COEFFICIENTS, mix=COEFFICIENTS, gain=COEFFICIENTS, t0=SIZES, h=STEPS, rate=st.booleans())
def test_one_update(keep: float, mix: float, gain: float, t0: float, h: float, rate: bool) -> None:
    """Any coefficients, also as tensors: the pair comes back, and all cotangents are those of automatic differentiation."""
    numbers = [torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in (keep, mix, gain, 0.7)]
    pair = tuple(torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cotangents = [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    update = CouplingUpdate(0, 1, *numbers[:3], increment=LINE, start=0.2, end=0.9, rate=rate)
    term = Field(numbers[3])
    after = advance(scheduled(update, t0, t0 + h), pair, Memo(term))
    wanted = torch.autograd.grad(after, [*pair, *numbers], cotangents)

    tape = Tape(term, numbers, no_audit)
    grads = Grads(*cotangents)
    with torch.enable_grad():
        undone = pull_back(scheduled(update, t0, t0 + h), tuple(x.detach() for x in after), grads, tape)
        tape.flush(grads)
    size = 1 + max(float(x.detach().abs().max()) for x in after) / abs(keep)
    torch.testing.assert_close(undone[0].detach(), pair[0].detach(), rtol=0, atol=1e-14 * size)
    torch.testing.assert_close(undone[1].detach(), pair[1].detach(), rtol=0, atol=0)
    torch.testing.assert_close([grads[0], grads[1], *tape.sums], list(wanted), rtol=1e-11, atol=1e-11)


def test_plain_numbers_are_as_good_as_tensors() -> None:
    y, z = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    numbers = CouplingUpdate(0, 1, keep=0.75, mix=0.5, gain=-2.0, increment=LINE)
    keep, mix, gain = torch.tensor([0.75, 0.5, -2.0], dtype=torch.float64)
    tensors = replace(numbers, keep=keep, mix=mix, gain=gain)
    term = Field(torch.tensor(0.7, dtype=torch.float64))
    got, wanted = (advance(scheduled(update, 0.0, 0.1), (y, z), Memo(term))[0] for update in (tensors, numbers))
    torch.testing.assert_close(got, wanted, rtol=1e-15, atol=1e-15)


def test_an_overwritten_member_is_restored_not_undone() -> None:
    copy = CouplingUpdate(1, 0, keep=0.0, mix=1.0)
    y, z, grad_y, grad_z = torch.randn(4, 3).unbind()
    grads = Grads(grad_y, grad_z)
    tape = Tape(Field(torch.ones(())), (), no_audit)
    pair = pull_back(scheduled(copy, 0.0, 0.1), (y, y), grads, tape, restored=(y, z))
    assert pair == (y, z)
    assert grads[1] is None
    torch.testing.assert_close(grads[0], grad_y + grad_z, rtol=0, atol=0)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_undoing_evaluates_once_per_evaluation(name: str) -> None:
    term = Field(torch.tensor(0.7, dtype=torch.float64))
    pair = started(name, torch.ones(2, dtype=torch.float64), 0.0, 0.1, Memo(term))
    forward, backward = Memo(term), Tape(term, (), no_audit)
    grads = Grads(*torch.ones(2, 2, dtype=torch.float64))
    for update in scheme(name).updates:
        pair = advance(scheduled(update, 0.0, 0.1), pair, forward)
    with torch.enable_grad():
        for update in reversed(scheme(name).updates):
            pair = pull_back(scheduled(update, 0.0, 0.1), pair, grads, backward)
    assert forward.num_evaluations == backward.memo.num_evaluations > 0


def test_a_value_is_kept_for_the_same_state_and_time_only() -> None:
    term = Field(torch.ones(()))
    memo, x = Memo(term), torch.ones(2)
    calls = [(0.5, x), (0.5, x), (0.5, x.clone()), (0.25, x), (0.5, x)]
    values = [memo.value(t, y) for t, y in calls]
    assert memo.num_evaluations == term.num_calls == 4
    assert values[0] is values[1]


@given(keep=COEFFICIENTS | st.sampled_from([0.0, 1.0, -1.0]), mix=COEFFICIENTS | st.sampled_from([0.0, 1.0, 2.0]))
def test_linear_is_a_linear_combination(keep: float, mix: float) -> None:
    target, source = torch.randn(2, 5, dtype=torch.float64).unbind()
    got = linear(keep, target, mix, source)
    torch.testing.assert_close(got, keep * target + mix * source, rtol=1e-14, atol=1e-14)
