"""`options={"restart": ...}` says the same as restarts=, in every solver that steps through time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from revsolve import Restarts, sdeint
from tests.front_doors import DOORS, make_net, make_y0

WAYS: dict[str, dict[str, Any]] = {
    "odeint": {"method": "rev_rk4", "options": {"step_size": 0.1}},
    "sdeint": {},
    "cdeint": {"options": {"step_size": 0.1}},
}
every_door = pytest.mark.parametrize("door", WAYS)


def solved(door: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    return DOORS[door](make_net(), make_y0(), full_output=True, **settings)


@pytest.mark.parametrize("given", [4, torch.tensor(3), None, "auto", Restarts(interval=2)], ids=str)
@every_door
def test_it_is_the_keyword(door: str, given: Any) -> None:
    way = WAYS[door]
    number = int(given) if isinstance(given, torch.Tensor) else given
    options = {**way.get("options", {}), "restart": given}
    assert solved(door, **{**way, "options": options}).stats == solved(door, **way, restarts=number).stats


@every_door
def test_both_are_refused(door: str) -> None:
    way = WAYS[door]
    options = {**way.get("options", {}), "restart": 4}
    with pytest.raises(ValueError, match=r"restarts=3 and options\['restart'\] = 4 say the same thing: give one"):
        solved(door, **{**way, "options": options, "restarts": 3})


@every_door
def test_plain_methods_have_none(door: str) -> None:
    way = WAYS[door]
    options = {**way.get("options", {}), "restart": 4}
    with pytest.raises(ValueError, match="restarts=4 has no meaning for 'heun_euler'"):
        solved(door, **{**way, "options": options, "method": "heun_euler"})


@pytest.mark.parametrize("way", [{"adaptive": True, "rtol": 1e-2, "atol": 1e-2}, {"method": "rev_heun2"}], ids=str)
def test_other_steps_of_sdeint(way: dict[str, Any]) -> None:
    assert solved("sdeint", **way, options={"restart": 3}).stats == solved("sdeint", **way, restarts=3).stats


def test_times_of_each_sample_of_sdeint() -> None:
    def stats(**settings: Any) -> Any:
        sde = (lambda t, y: -y, lambda t, y: 0.3 * y.cos())
        ts = torch.tensor([[0.0, 0.2], [1.0, 0.8]])
        return sdeint(sde, torch.ones(2, 3), ts, dt=0.05, full_output=True, **settings).stats

    assert stats(options={"restart": 3}) == stats(restarts=3)
