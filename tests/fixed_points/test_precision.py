"""Pairs wider than the field, long iterations, and what is kept for the backward pass."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import fixed_point
from tests.fixed_points.cells import Convolution, Dense, difference, gradients


@pytest.mark.parametrize("num_steps", [4, 32, 500])
@pytest.mark.parametrize("beta", [0.5, 0.8, 0.9])
def test_float64_pair_of_a_float32_field(beta: float, num_steps: int) -> None:
    cell, x = Dense(), torch.randn(5, 6, requires_grad=True)
    found, unrolled = (
        gradients(
            cell, torch.zeros(5, 6), [*cell.parameters(), x], args=x, beta=beta, tol=0, max_steps=num_steps, gradient=g
        )
        for g in ("reversible", "direct")
    )
    assert difference(found, unrolled) < 1e-6  # float32 sums, in another order


@pytest.mark.parametrize("shape", [(), (6,), (5, 1)], ids=["one", "channel", "sample"])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_learnable_beta_of_a_float32_field(shape: tuple[int, ...], gradient: str) -> None:
    beta = torch.full(shape, 0.8, requires_grad=True)
    cell, x, z0 = Dense(), torch.randn(5, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    inputs = [*cell.parameters(), x, z0, beta]
    found, unrolled = (
        gradients(cell, z0, inputs, args=x, beta=beta, tol=0, max_steps=40, gradient=g) for g in (gradient, "direct")
    )
    assert difference(found, unrolled) < 1e-6  # float32 sums, in another order


@pytest.mark.parametrize("make", [Dense, Convolution], ids=["dense", "convolution"])
def test_float32_pair_of_a_bfloat16_field(make: Any) -> None:
    cell = make(8)
    x = torch.randn(4, 8, 5, 8)[..., : 8 if isinstance(cell, Dense) else 5].requires_grad_()
    grads = []
    for gradient in ("reversible", "direct"):
        # The cache would make one bfloat16 copy of every weight, in which the unrolled gradient of 64 uses is summed.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            options = {"beta": 0.9, "tol": 0, "max_steps": 32, "pair_dtype": torch.float32}
            z = fixed_point(cell, torch.zeros_like(x), args=x, gradient=gradient, **options)
        grads.append(torch.autograd.grad(z.square().sum(), [*cell.parameters(), x]))
    # Half of the digits that the field itself has are 4e-2; anchors keep what its roundings make of the pair far below.
    assert difference(*grads) < 1e-3


@pytest.mark.parametrize("tol", [0.0, 1e-30])
def test_float32_pair_for_500_steps(tol: float) -> None:
    cell, x = Dense(), torch.randn(5, 6, requires_grad=True)
    options = {"args": x, "tol": tol, "max_steps": 500, "pair_dtype": torch.float32, "on_failure": "ignore"}
    found, unrolled = (
        gradients(cell, torch.zeros(5, 6), [*cell.parameters(), x], gradient=g, **options)
        for g in ("reversible", "direct")
    )
    assert difference(found, unrolled) < 1e-5


@pytest.mark.parametrize("num_steps", [4, 12])
@pytest.mark.parametrize("beta", [0.4, 0.5, 0.7, 0.75, 0.8, 0.9])
def test_a_cell_whose_gradients_are_a_thousand_times_as_sensitive_as_its_states(beta: float, num_steps: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 32, 16, 16, requires_grad=True), torch.randn(16, 32, 16, 16)
    cell = Convolution(32, 2)
    grads = []
    for gradient in ("reversible", "direct"):
        options = {"beta": beta, "tol": 0, "max_steps": num_steps, "gradient": gradient}
        z = fixed_point(cell, torch.zeros_like(x), args=x, **options)
        grads.append(torch.autograd.grad((weight * z).sum(), [*cell.parameters(), x]))
    # float32's own rounding changes these gradients by 6e-4; anchors twice as far apart would by 0.1 at beta = 0.8.
    assert difference(*grads) < 1e-5


@pytest.mark.parametrize(("beta", "num_steps"), [(0.5, 8), (0.75, 4), (1.5, 8), (1.25, 4)])
def test_nothing_is_rounded_where_1_minus_beta_is_a_power_of_one_half(beta: float, num_steps: int) -> None:
    cell, x = Convolution(32, 2), torch.randn(4, 32, 8, 8, requires_grad=True)
    options = {"beta": beta, "tol": 0, "max_steps": num_steps, "full_output": True}
    solution = fixed_point(cell, torch.zeros_like(x), args=x, **options)
    solution.z.sum().backward()
    assert solution.stats.num_stored_states == 3  # y at the start, and the last pair
    assert solution.stats.reconstruction_error == 0.0


def test_bfloat16_states() -> None:
    cell, x = Dense().bfloat16(), torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    z = fixed_point(cell, torch.zeros_like(x), args=x, tol=1e-2)
    assert z.dtype == torch.bfloat16
    assert torch.autograd.grad(z.sum(), x)[0].isfinite().all()


def numbers_kept(num_steps: int, gradient: str, beta: float = 0.5) -> int:
    """Of what autograd saves, other than parameters and x, in float32 numbers."""
    cell, x = Convolution(), torch.randn(2, 8, 5, 5, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = fixed_point(cell, torch.zeros_like(x), args=x, beta=beta, tol=0, max_steps=num_steps, gradient=gradient)
    own = {p.untyped_storage().data_ptr() for p in [*cell.parameters(), x]}
    del z
    return sum(t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in own)


def test_what_is_kept_does_not_grow_up_to_the_first_anchor() -> None:
    assert numbers_kept(2, "reversible") == numbers_kept(8, "reversible")


def test_an_anchor_is_one_pair() -> None:
    # Two states of 400 numbers in float64, eight steps apart.
    assert numbers_kept(40, "reversible") - numbers_kept(32, "reversible") == 2 * 2 * 400


def test_unrolling_keeps_far_more() -> None:
    assert numbers_kept(40, "direct") > 15 * numbers_kept(40, "reversible")


@contextlib.contextmanager
def default_device(device: torch.device):
    with torch.device(device):
        yield


def test_every_device(device: torch.device) -> None:
    with default_device(device):
        cell, x = Dense(), torch.randn(5, 6, requires_grad=True)
        found, unrolled = (
            gradients(cell, torch.zeros(5, 6), [*cell.parameters(), x], args=x, stop="sample", gradient=g)
            for g in ("reversible", "direct")
        )
    assert difference([g.cpu() for g in found], [g.cpu() for g in unrolled]) < 1e-6


def wide_tensors(size: int) -> int:
    """How many float64 tensors of so many numbers are alive."""
    found = [o for o in gc.get_objects() if type(o) is Tensor and o.dtype == torch.float64 and o.numel() == size]
    return len({o.untyped_storage().data_ptr() for o in found})


@pytest.mark.parametrize(("retain_graph", "most"), [(False, 2), (True, 4)])
def test_the_last_pair_is_given_back_once_undone(retain_graph: bool, most: int) -> None:
    cell, x = Convolution(), torch.randn(3, 8, 7, 5, requires_grad=True)  # of a size that no other test has
    alive: list[int] = []

    def f(z: Tensor) -> Tensor:
        alive.append(wide_tensors(x.numel()))
        return cell(z, x)

    z = fixed_point(f, torch.zeros_like(x), beta=0.5, tol=0, max_steps=4)
    alive.clear()
    first = torch.autograd.grad(z.sum(), x, retain_graph=retain_graph)[0]
    assert max(alive[2:]) == most  # in between both members of the pair have become others
    assert first.isfinite().all()


def test_a_graph_that_is_kept_can_be_used_again() -> None:
    cell, x = Convolution(), torch.randn(2, 8, 5, 5, requires_grad=True)
    z = fixed_point(cell, torch.zeros_like(x), args=x, beta=0.5, tol=0, max_steps=12)
    first = torch.autograd.grad(z.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z.sum(), x)
