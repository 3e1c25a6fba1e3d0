"""Layers whose buffers change as they are used, in training and from the zero start of `RevDEQ`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import RevDEQ, RevLoop, fixed_point
from tests.fixed_points.cells import difference

EXACT = 1e-9  # of gradients that pass through a normalised weight


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def spectral_of_old() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(8, 8))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))


def off_at_zero() -> nn.Module:
    """At 0 its output is 0, whatever the normalised weight is."""
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8, bias=False))


LAYERS = [spectral, spectral_of_old, batch_norm, off_at_zero]


class Cell(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.7 * self.layer(z) + x)


def by_function(cell: nn.Module, x: Tensor, z0: Tensor | None, **options: Any) -> Tensor:
    return fixed_point(cell, torch.zeros_like(x) if z0 is None else z0, args=x, beta=0.5, **options)


def by_module(cell: nn.Module, x: Tensor, z0: Tensor | None, **options: Any) -> Tensor:
    return RevDEQ(cell, beta=0.5, **options)(x, z0=z0)


def by_loop(cell: nn.Module, x: Tensor, z0: Tensor | None, **options: Any) -> Tensor:
    start = torch.zeros_like(x) if z0 is None else z0
    return RevLoop(cell, 10, scheme="momentum", gradient=options["gradient"])(start, x)


DOORS = [by_function, by_module, by_loop]
KINDS = {"fixed": {"tol": 0, "max_steps": 12}, "until": {"tol": 1e-6, "max_steps": 60, "on_failure": "ignore"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("door", DOORS)
def test_training(door: Callable[..., Tensor], make: Callable[[], nn.Module], start: str, kind: str) -> None:
    """The gradient is that of the solve unrolled, in two training steps, and both leave the same buffers behind."""
    fresh, x = Cell(make()), torch.randn(5, 8)
    z0 = None if start == "zero" else torch.randn(5, 8)
    found, buffers = [], []
    for gradient in ("reversible", "direct"):
        cell = copy.deepcopy(fresh)
        for _ in range(2):
            cell.zero_grad()
            door(cell, x, z0, gradient=gradient, **KINDS[kind]).square().sum().backward()
        found.append([p.grad for p in cell.parameters()])
        buffers.append(list(cell.buffers()))
    assert difference(*found) < EXACT
    assert difference(*buffers) < EXACT


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize("make", [spectral, spectral_of_old, off_at_zero])
@pytest.mark.parametrize("door", DOORS)
def test_a_solve_is_one_power_iteration(door: Callable[..., Tensor], make: Callable[[], nn.Module], start: str) -> None:
    fresh, x = Cell(make()), torch.randn(5, 8)
    z0 = None if start == "zero" else torch.randn(5, 8)
    once, solved = copy.deepcopy(fresh), copy.deepcopy(fresh)
    once(x, x)
    door(solved, x, z0, gradient="reversible", **KINDS["fixed"]).sum().backward()
    assert difference(solved.buffers(), once.buffers()) < 1e-12
