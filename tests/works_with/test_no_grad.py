"""Solves without gradients: states made in inference mode, and fields that do what autograd cannot record."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import cdeint, fixed_point, odeint, odeint_event, sdeint
from revsolve.paths.control import LinearPath
from tests.front_doors import DOORS

A = torch.tensor([[-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64)
FIELDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda t, y: A @ y,
    "out": lambda t, y: torch.mv(A, y, out=torch.empty(2, dtype=torch.float64)),
    "numpy": lambda t, y: torch.from_numpy(A.numpy() @ y.numpy()),
    "in place": lambda t, y: y.new_empty(2).copy_(A @ y).add_(0.0),
}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "dopri5": {"method": "dopri5"},
    "rk4": {"method": "rk4", "options": {"step_size": 0.05}},
    "rev_rk4": {"method": "rev_rk4", "options": {"step_size": 0.05}},
    "alf4": {"method": "alf4", "options": {"step_size": 0.05}},
    "direct": {"method": "rev_rk4", "options": {"step_size": 0.05}, "gradient": "direct"},
}
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("made", ["plain", "inference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FIELDS)
def test_fields_without_gradients(name: str, way: str, mode: str, made: str) -> None:
    with torch.inference_mode(made == "inference"):
        y0 = torch.ones(2, dtype=torch.float64)
    with MODES[mode]():
        found = odeint(FIELDS[name], y0, [0.0, 1.0], **WAYS[way])[-1].tolist()
    # y1 = exp(-2 t), and y0' = -y0 + y1 / 2
    assert found == pytest.approx([1.5 * math.exp(-1) - 0.5 * math.exp(-2), math.exp(-2)], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_other_doors(mode: str) -> None:
    with torch.inference_mode():
        y0 = torch.ones(1, 2, dtype=torch.float64)
    decay = lambda t, y: -y  # noqa: E731
    with MODES[mode]():
        event_t, _ = odeint_event(
            decay, y0, torch.tensor(0.0, dtype=torch.float64), event_fn=lambda t, y: y[0, 0] - 0.5
        )
        assert float(event_t) == pytest.approx(math.log(2), abs=1e-6)
        X = LinearPath(torch.linspace(0, 1, 5, dtype=torch.float64)[None, :, None])
        z = cdeint(X, lambda t, z: -z[..., None], y0, [0.0, 4.0], method="rk4")
        assert z[0, -1].tolist() == pytest.approx([math.exp(-1)] * 2, abs=1e-3)
        y = sdeint((decay, lambda t, y: 0 * y), y0, [0.0, 1.0], dt=0.01)
        assert y[-1, 0].tolist() == pytest.approx([math.exp(-1)] * 2, abs=1e-3)
        assert fixed_point(lambda z: 0.5 * z + 1, y0).tolist()[0] == pytest.approx([2.0, 2.0], abs=1e-2)


@pytest.mark.parametrize("door", DOORS)
def test_a_gradient_in_inference_mode_is_refused_and_under_no_grad_right(door: str) -> None:
    """Autograd records nothing in inference mode: gradients of the field would be zero."""
    layer, y0 = torch.nn.Linear(3, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    y = DOORS[door](lambda y: 0.3 * torch.tanh(layer(y)), y0)
    (wanted,) = torch.autograd.grad(y.sum(), layer.weight, retain_graph=True)
    loss = y.sum()
    with torch.no_grad():
        assert torch.equal(torch.autograd.grad(loss, layer.weight, retain_graph=True)[0], wanted)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch.inference_mode\(\)"):
        torch.autograd.grad(loss, layer.weight)
