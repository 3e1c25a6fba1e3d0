"""Calls as torchdiffeq takes them: whoever changes the import gets the same solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor

import revsolve
from revsolve import odeint

T = torch.tensor([0.0, 0.4, 1.3], dtype=torch.float64)
FINE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
CLOSE = 5e-6  # at output times theirs interpolates, with an error of 2e-6 for bosh3 and 9e-7 for dopri8


def swing(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1] * torch.cos(t), -torch.sin(y[0])])


def swing_in_parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return y[1].sum() * torch.cos(t), -torch.sin(y[0]).expand(1)


def jumps(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t < 0.7, y, -2.0 * y)


LONE = torch.tensor([1.0, 0.3], dtype=torch.float64)
PARTS = (torch.tensor(1.0, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
CALLS: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "nothing said": (swing, LONE, {}),
    "no method": (swing, LONE, {"method": None, **FINE}),
    "dopri5": (swing, LONE, {"method": "dopri5", **FINE}),
    "bosh3": (swing, LONE, {"method": "bosh3", **FINE}),
    "dopri8": (swing, LONE, {"method": "dopri8", **FINE}),
    "euler": (swing, LONE, {"method": "euler"}),
    "midpoint": (swing, LONE, {"method": "midpoint"}),
    "heun2": (swing, LONE, {"method": "heun2"}),
    "heun3": (swing, LONE, {"method": "heun3"}),
    "grid": (
        swing,
        LONE,
        {
            "method": "heun3",
            "options": {"grid_constructor": lambda func, y0, t: torch.linspace(0, 1.3, 14, dtype=torch.float64)},
        },
    ),
    "no options": (swing, LONE, {"method": "dopri5", "options": None, **FINE}),
    "tolerances of each entry": (swing, LONE, {"rtol": torch.full((2,), 1e-9), "atol": torch.full((2,), 1e-9)}),
    "tolerances of each part": (swing_in_parts, PARTS, {"rtol": (1e-9, 1e-8), "atol": (1e-9, torch.tensor([1e-8]))}),
    "norm of the parts": (
        swing_in_parts,
        PARTS,
        {"options": {"norm": lambda y: torch.maximum(y[0].abs(), y[1].abs().max())}, **FINE},
    ),
    "times of steps": (swing, LONE, {"options": {"step_t": torch.tensor([0.3, 1.1], dtype=torch.float64)}, **FINE}),
    "times of jumps": (
        jumps,
        LONE,
        {"method": "dopri5", "options": {"jump_t": torch.tensor([0.2, 0.7], dtype=torch.float64)}, **FINE},
    ),
    "first step": (swing, LONE, {"method": "dopri5", "options": {"first_step": torch.tensor(0.01)}, **FINE}),
    "limits": (
        swing,
        LONE,
        {
            "method": "dopri5",
            "options": {"safety": 0.8, "ifactor": 5.0, "dfactor": 0.3, "min_step": 1e-6, "max_step": 0.1},
            **FINE,
        },
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_of_torchdiffeq(call: tuple[Callable[..., Any], Any, dict[str, Any]]) -> None:
    func, y0, way = call
    ours, theirs = odeint(func, y0, T, **way), torchdiffeq.odeint(func, y0, T, **way)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=CLOSE)


NUMBERS = [0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}")
@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "reversible_heun"])
def test_numbers_of_any_kind(method: str, number: Any) -> None:
    found = odeint(swing, LONE, T, method=method, options={"step_size": number})
    assert torch.equal(found, odeint(swing, LONE, T, method=method, options={"step_size": 0.25}))


ELSEWHERE = {
    "restart": "restarts=",
    "perturb": "leave it out",
    "dtype": "leave it out",
    "interp": "leave it out",
    "solver": "method=",
}


@pytest.mark.parametrize(("name", "says"), ELSEWHERE.items())
def test_options_that_only_others_have(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"option {name!r} does not exist here: .*{says}"):
        odeint(swing, LONE, T, options={name: 4})


NAMES = (
    "step_size",
    "grid_constructor",
    "first_step",
    "safety",
    "max_step",
    "step_t",
    "jump_t",
    "norm",
    "coupling",
    "eta",
    "dense",
)


@pytest.mark.parametrize("method", ["dopri5", "rev_rk4", "reversible_heun"])
@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_none_is_not_given(name: str, method: str) -> None:
    fixed = {} if method == "dopri5" else {"step_size": 0.1}
    found = odeint(swing, LONE, T, method=method, options={name: None} | fixed)
    assert torch.equal(found, odeint(swing, LONE, T, method=method, options=fixed))


def test_tolerances_of_parts_fit_the_state() -> None:
    with pytest.raises(ValueError, match="rtol must have the structure of y0"):
        odeint(swing_in_parts, PARTS, T, rtol=(1e-3, 1e-3, 1e-3))
    with pytest.raises(ValueError, match=r"atol .*\(3,\).* does not fit .*\(1,\)"):
        odeint(swing_in_parts, PARTS, T, atol=(1e-3, torch.ones(3)))


def test_parts_of_loose_tolerances_are_loose() -> None:
    loose, tight = (
        odeint(swing_in_parts, PARTS, T, rtol=(1e-9, r), atol=(1e-9, r), full_output=True) for r in (1e-2, 1e-9)
    )
    assert loose.stats.num_steps < tight.stats.num_steps


def test_the_norm_sees_the_parts() -> None:
    """Of another part than the fast one, it takes few steps: no vector of all parts is passed off as them."""
    fast = lambda t, y: (-y[0], 30 * torch.cos(30 * t) * y[1])  # noqa: E731
    ours, theirs = {}, {}
    for part in (0, 1):
        way = {"method": "dopri5", "options": {"norm": lambda y, part=part: y[part].abs().max()}, **FINE}
        ours[part] = odeint(fast, PARTS, T, full_output=True, **way).stats.num_steps
        calls: list[Tensor] = []
        torchdiffeq.odeint(lambda t, y: calls.append(t) or fast(t, y), PARTS, T, **way)  # noqa: B023
        theirs[part] = len(calls) // 6
    assert 3 * ours[0] < ours[1]
    assert 3 * theirs[0] < theirs[1]


def test_no_name_is_missing() -> None:
    """What torchdiffeq has and is not here is listed in docs/migration.md."""
    assert {"odeint", "odeint_event"} <= set(revsolve.__all__)
