"""Words of other packages: each has an answer that says what to write here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import revsolve
from revsolve import LinearPath, cdeint, method_names, odeint, odeint_event, sdeint
from revsolve.schemes.names import ELSEWHERE

ONE = torch.ones(1, dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


DOORS: dict[str, Any] = {
    "odeint": lambda **words: odeint(decay, ONE, [0.0, 1.0], **words),
    "odeint_event": lambda **words: odeint_event(
        decay, ONE, torch.tensor(0.0, dtype=torch.float64), event_fn=lambda t, y: y - 0.5, **words
    ),
    "cdeint": lambda **words: cdeint(
        LinearPath(torch.eye(3, 1).double()), lambda t, z: z[..., None], ONE, [0.0, 1.0], **words
    ),
    "sdeint": lambda **words: sdeint((decay, decay), ONE[None], [0.0, 1.0], dt=0.5, **words),
}
WORDS = {
    "adjoint_params": "leave it out",
    "adjoint_method": "leave it out",
    "adjoint_options": "leave it out",
    "t_eval": ".* as the argument of times",
    "saveat": ".* as the argument of times",
    "step_size": r"write (options=\{'step_size': \.\.\.\}|dt=)",  # the latter in sdeint
    "jump_t": r"write options=\{'jump_t': \.\.\.\}",
    "backend": "leave it out, there is only one",
    "solver": "write method=",
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("word", "says"), WORDS.items())
def test_keywords(door: str, word: str, says: str) -> None:
    with pytest.raises(TypeError, match=f"has no keyword '{word}': {says}"):
        DOORS[door](**{word: "something"})


@pytest.mark.parametrize("door", DOORS)
def test_keywords_that_are_none_are_not_given(door: str) -> None:
    DOORS[door](adjoint_options=None, adjoint_params=None)


def test_other_keywords_are_unexpected() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'metod'"):
        DOORS["odeint"](metod="rk4")
    with pytest.raises(TypeError, match="'max_iter': did you mean 'max_steps'"):
        revsolve.fixed_point(torch.cos, torch.ones(2), max_iter=9)  # type: ignore[call-arg]


def test_a_seed_belongs_to_the_path() -> None:
    with pytest.raises(TypeError, match=r"no keyword 'seed': pass bm=BrownianPath\(t0, t1, size, seed="):
        DOORS["sdeint"](seed=3)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_method_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method {name!r}: ") as raised:
        odeint(decay, ONE, [0.0, 1.0], method=name)
    quoted = str(raised.value).split("Known methods")[0].split("'")[3::2]
    assert quoted and set(quoted) <= {*method_names()}


@pytest.mark.parametrize(("name", "meant"), [("Tsit5", "tsit5"), ("dopri_5", "dopri5"), ("DOP853", "dop853")])
def test_names_that_are_nearly_right(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        odeint(decay, ONE, [0.0, 1.0], method=name)


def test_no_suggestion_is_better_than_a_wrong_one() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'qqq'\. Known methods"):
        odeint(decay, ONE, [0.0, 1.0], method="qqq")
    with pytest.raises(ValueError, match=r"unknown option 'qqq' for method 'rk4'\. Options"):
        odeint(decay, ONE, [0.0, 1.0], method="rk4", options={"qqq": 1})


@pytest.mark.parametrize("door", ["odeint", "sdeint"])
def test_imports_of_adjoints(door: str) -> None:
    with pytest.raises(ImportError, match=f"write from revsolve import {door}"):
        exec(f"from revsolve import {door}_adjoint")


def test_the_package_shows_its_public_names() -> None:
    assert set(dir(revsolve)) == {*revsolve.__all__, "__version__"}
    assert not hasattr(revsolve, "nothing")


STATES: dict[str, tuple[Any, Any]] = {
    "list for tuple": ((ONE, ONE), lambda t, y: [-y[0], -y[1]]),
    "tuple for list": ([ONE, ONE], lambda t, y: (-y[0], -y[1])),
    "inner list": ({"a": (ONE, ONE)}, lambda t, y: {"a": [-y["a"][0], -y["a"][1]]}),
    "other order": ({"a": ONE, "b": 2 * ONE}, lambda t, y: {"b": -y["b"], "a": -y["a"]}),
    "other order later": (
        {"a": ONE, "b": 2 * ONE},
        lambda t, y: {"b": -y["b"], "a": -y["a"]} if t > 0.3 else {"a": -y["a"], "b": -y["b"]},
    ),
}


@pytest.mark.parametrize(("y0", "func"), STATES.values(), ids=STATES)
def test_structures_that_mean_the_same(y0: Any, func: Any) -> None:
    y = odeint(func, y0, [0.0, 1.0], method="rk4", options={"step_size": 0.05})
    flat, begun = torch.utils._pytree.tree_leaves(y), torch.utils._pytree.tree_leaves(y0)
    assert [float(x[-1]) for x in flat] == pytest.approx([float(x) * math.exp(-1) for x in begun], abs=1e-6)


LATER: dict[str, tuple[Any, Any, str]] = {
    "tuple": (ONE, lambda y: (-y,), "structure of y0, one tensor, but it returned a tuple"),
    "list": (ONE, lambda y: [-y], "structure of y0, one tensor, but it returned a list"),
    "dict": (ONE, lambda y: {"a": -y}, "structure of y0, one tensor, but it returned a dict"),
    "number": (ONE, lambda y: -1.0, "must return tensors, but it returned float"),
    "shape": (ONE, lambda y: -y[None], r"shape of y0, \(1,\), but it returned \(1, 1\)"),
    "dtype": (ONE, lambda y: -y.float(), "dtype of y0, torch.float64, but it returned torch.float32"),
    "shape of a part": ((ONE, ONE), lambda y: (-y[0], -y[1][None]), r"shape of y0, \(1,\)"),
    "dtype of a part": ((ONE, ONE), lambda y: (-y[0], -y[1].float()), "dtype of y0"),
    "a part more": ((ONE, ONE), lambda y: (*y, ONE), "structure of y0"),
    "another key": ({"a": ONE}, lambda y: {"b": -y["a"]}, "structure of y0"),
}


@pytest.mark.parametrize("from_time", [0.0, 0.45])
@pytest.mark.parametrize(("y0", "value", "says"), LATER.values(), ids=LATER)
def test_values_of_another_kind_now_or_later(y0: Any, value: Any, says: str, from_time: float) -> None:
    def func(t: Tensor, y: Any) -> Any:
        return value(y) if t >= from_time else torch.utils._pytree.tree_map(torch.neg, y)

    with pytest.raises((ValueError, TypeError), match=says):
        odeint(func, y0, [0.0, 1.0], method="rev_rk4", options={"step_size": 0.1})


@pytest.mark.parametrize("atol", [0, 0.0, torch.zeros(2, dtype=torch.float64), [0.0, 1e-9]], ids=str)
@pytest.mark.parametrize("y0", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
def test_an_absolute_tolerance_of_zero_beside_a_component_of_zero(y0: list[float], atol: Any) -> None:
    y = odeint(decay, torch.tensor(y0, dtype=torch.float64), [0.0, 1.0], method="dopri5", rtol=1e-6, atol=atol)
    assert y[-1].tolist() == pytest.approx([math.exp(-1) * x for x in y0], abs=1e-5)


def test_a_component_that_leaves_zero_with_an_absolute_tolerance_of_zero() -> None:
    func = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    y = odeint(func, torch.tensor([0.0, 1.0]), [0.0, 1.0], method="dopri5", rtol=1e-4, atol=0.0)
    assert y[-1].tolist() == pytest.approx([math.sin(1), math.cos(1)], abs=1e-3)


MANY = torch.rand(1000)
MESSAGES: dict[str, dict[str, Any]] = {
    "rtol": {"rtol": -MANY},
    "atol": {"atol": -MANY},
    "times": {"t": [MANY]},
    "step": {"method": "rk4", "options": {"step_size": MANY}},
    "grid": {"method": "rk4", "options": {"grid_constructor": lambda *_: 2 + MANY.cumsum(0)}},
    "state": {"y0": [1.0, MANY.numpy()]},
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_hold_no_whole_tensors(case: str) -> None:
    call = {"y0": torch.ones(1000), "t": [0.0, 1.0], **MESSAGES[case]}
    with pytest.raises((ValueError, TypeError)) as raised:
        odeint(decay, call.pop("y0"), call.pop("t"), **call)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["lsoda", "RK23", "rk45", "BDF", "Radau"])
def test_names_of_other_packages_in_any_case(name: str) -> None:
    with pytest.raises(ValueError, match=r"is called '\w+' here|no methods for stiff equations"):
        odeint(decay, ONE, [0.0, 1.0], method=name)


@pytest.mark.parametrize("name", ["reversible_rk4", "Reversible_RK4"])
def test_reversible_twins_are_found(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'rev_rk4'"):
        odeint(decay, ONE, [0.0, 1.0], method=name)


@pytest.mark.parametrize(("word", "says"), [("dt0", "dt="), ("first_step", "dt="), ("min_step", "dt_min=")])
def test_keywords_of_sdeint_are_its_own(word: str, says: str) -> None:
    with pytest.raises(TypeError, match=f"has no keyword '{word}': write {says}"):
        DOORS["sdeint"](**{word: 0.1})
