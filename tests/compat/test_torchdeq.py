"""The core "reversible" of torchdeq beside torchdeq's own."""

import argparse
import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdeq import add_deq_args, get_deq

import revsolve.torchdeq  # registers the core
from revsolve import ConvergenceWarning, fixed_point
from tests.fixed_point.cells import Convolution, Dense, difference
from tests.memory import most_held


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def injected(cell: nn.Module, x: Tensor) -> Any:
    return lambda z: cell(z, x)


def namespace(*argv: str) -> argparse.Namespace:
    """As in a program of torchdeq's users, which has arguments of its own."""
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("core", ["sliced", "indexing", "reversible"])
def test_every_core_finds_the_same_fixed_point(core: str, mode: str) -> None:
    cell, x = Dense(), torch.randn(4, 6)
    deq = get_deq(core=core, f_max_iter=400, f_tol=1e-9, f_stop_mode=mode)
    states, stat = deq(injected(cell, x), torch.zeros_like(x))
    reference = fixed_point(cell, torch.zeros_like(x), args=x, method="anderson", tol=1e-13)
    torch.testing.assert_close(states[-1], reference, rtol=0, atol=1e-7)
    assert (stat[f"{mode}_lowest"] < 1e-9).all()


def test_the_gradient_is_that_of_fixed_point() -> None:
    cell, x = Convolution(), torch.randn(2, 8, 4, 4, requires_grad=True)
    deq = get_deq(core="reversible", beta=0.7, f_max_iter=20, f_tol=0.0, on_failure="ignore")
    (z,), _ = deq(injected(cell, x), torch.zeros_like(x))
    expected = fixed_point(cell, torch.zeros_like(x), args=x, beta=0.7, tol=0, max_steps=10, gradient="direct")
    inputs = [*cell.parameters(), x]
    found, unrolled = (torch.autograd.grad(out.square().sum(), inputs) for out in (z, expected))
    assert difference(found, unrolled) < 1e-12


def test_its_gradient_is_closer_than_one_step() -> None:
    cell, x = Dense(norm=0.9), torch.randn(4, 6, requires_grad=True)
    grads = []
    for options in ({"core": "reversible"}, {"core": "sliced"}, {"core": "sliced", "ift": True, "b_tol": 1e-12}):
        deq = get_deq(f_max_iter=600, b_max_iter=600, f_tol=1e-12, **options)
        states, _ = deq(injected(cell, x), torch.zeros_like(x))
        grads.append(torch.autograd.grad(states[-1].square().sum(), [*cell.parameters(), x]))
    reversible, one_step, implicit = grads
    assert difference(reversible, implicit) < 1e-9
    assert difference(one_step, implicit) > 1e-2


@pytest.mark.parametrize(("autocast", "kept"), [(False, 12), (True, 16)], ids=["float32", "bfloat16"])
def test_memory_beside_phantom_gradients(autocast: bool, kept: int) -> None:
    """24 evaluations, of which the phantom gradient keeps the last ones; the reversible one keeps a float64 pair every 16."""
    cell, x = Convolution(32, 2).float(), torch.randn(8, 32, 16, 16, dtype=torch.float32, requires_grad=True)

    def train(core: str, **options: Any) -> None:
        deq = get_deq(core=core, f_max_iter=24, f_tol=0.0, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states, _ = deq(injected(cell, x), torch.zeros_like(x))
            states[-1].float().sum().backward()

    ours = most_held(lambda: train("reversible", beta=0.5, on_failure="ignore"))
    assert ours <= 0.42 * most_held(lambda: train("sliced", grad=kept, tau=0.5))


def test_lists_of_states() -> None:
    first, second = Dense(), Dense()
    x = torch.randn(4, 6, requires_grad=True)
    deq = get_deq(core="reversible", f_max_iter=200, f_tol=1e-8)
    states, stat = deq(lambda a, b: (first(b, x), second(a, x)), [torch.zeros(4, 6), torch.zeros(4, 6)])
    assert [len(states), *(s.shape for s in states[0])] == [1, (4, 6), (4, 6)]
    assert stat["nstep"].shape == (4,)
    sum(s.sum() for s in states[0]).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("options", "num"), [({"n_states": 3}, 3), ({"indexing": [4, 10]}, 3), ({}, 1)])
def test_sampled_states(options: dict[str, Any], num: int) -> None:
    cell, x = Dense(), torch.randn(4, 6, requires_grad=True)
    deq = get_deq(core="reversible", f_max_iter=30, f_tol=0.0, on_failure="ignore", **options)
    states, stat = deq(injected(cell, x), torch.zeros_like(x))
    assert len(states) == num
    assert stat["nstep"].tolist() == [30.0] * 4
    assert stat["abs_trace"].shape == (4, 15)
    assert all(torch.autograd.grad(s.sum(), x, retain_graph=True)[0].abs().sum() > 0 for s in states)


def test_eval_mode_keeps_gradients_and_may_go_on_for_longer() -> None:
    cell, x = Dense(), torch.randn(4, 6, requires_grad=True)
    deq = get_deq(core="reversible", f_max_iter=4, eval_factor=50, f_tol=1e-8).eval()
    states, stat = deq(injected(cell, x), torch.zeros_like(x), sradius_mode=True)
    assert (stat["abs_lowest"] < 1e-8).all()
    assert (stat["sradius"] < 1).all()
    assert torch.autograd.grad(states[-1].sum(), x)[0].isfinite().all()


def test_one_call_may_differ() -> None:
    cell, x = Dense(), torch.randn(4, 6)
    deq = get_deq(core="reversible", f_tol=1e-8, on_failure="ignore")
    _, stat = deq(injected(cell, x), torch.zeros_like(x), solver_kwargs={"f_max_iter": 6, "beta": 0.5})
    assert stat["nstep"].tolist() == [6.0] * 4


def test_the_program_s_own_arguments_may_stand_beside() -> None:
    deq = get_deq(namespace("--core", "reversible", "--f_max_iter", "12"))
    assert isinstance(deq, revsolve.torchdeq.DEQReversible)
    assert deq.f_max_iter == 12


def test_too_few_evaluations_are_said() -> None:
    deq = get_deq(core="reversible", f_max_iter=4, f_tol=1e-9)
    with pytest.warns(ConvergenceWarning, match="after 2 steps"):
        deq(lambda z: torch.cos(z), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: get_deq(core="reversible", stop_mode="rel"), "unknown key 'stop_mode'.*did you mean 'f_stop_mode'"),
        (
            lambda: get_deq(core="reversible", f_stop_mode="relative")(torch.cos, torch.zeros(2, 3)),
            "f_stop_mode must be",
        ),
        (
            lambda: get_deq(core="reversible")(torch.cos, torch.zeros(2, 3), solver_kwargs={"tol": 1}),
            "unknown key 'tol' in solver_kwargs",
        ),
        (lambda: get_deq(core="reversible")(torch.cos, torch.zeros(2, 3), backward_writer=print), "backward_writer"),
        (lambda: get_deq(core="reversible", beta=2.0)(torch.cos, torch.zeros(2, 3)), "beta must lie in"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_without_torchdeq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    monkeypatch.delitem(sys.modules, "revsolve.torchdeq")
    with pytest.raises(ImportError, match=r"pip install 'revsolve\[torchdeq\]'"):
        importlib.import_module("revsolve.torchdeq")
