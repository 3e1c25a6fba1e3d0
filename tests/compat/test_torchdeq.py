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
from tests.fixed_points.cells import Convolution, Dense, difference
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


class Graph(nn.Module):
    """An implicit graph network: X = relu(W X A + B), whose rows are features of all nodes, coupled by W."""

    def __init__(self, features: int = 4, nodes: int = 7) -> None:
        super().__init__()
        weight = torch.randn(features, features)
        self.weight = nn.Parameter(0.9 * weight / torch.linalg.matrix_norm(weight, float("inf")))
        ring = torch.roll(torch.eye(nodes), 1, 0)
        self.adjacency = (0.5 * (ring + ring.mT)).to_sparse()

    def forward(self, x: Tensor, b: Tensor) -> Tensor:
        return torch.relu(torch.sparse.mm(self.adjacency, (self.weight @ x).mT).mT + b)


@pytest.mark.parametrize("stop", ["all", "sample", "batch"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_rows_that_are_no_samples(stop: str, start: str) -> None:
    """Features whose bias is negative rest at 0 until others have grown."""
    graph, b = Graph(), torch.randn(4, 7) - torch.tensor([[0.0], [3.0], [0.0], [3.0]])
    x = torch.zeros(4, 7) if start == "zero" else torch.randn(4, 7)
    inputs, options = list(graph.parameters()), {"f_max_iter": 600, "f_tol": 1e-10}
    cores = {"reversible": {"stop": stop}, "sliced": {"ift": True, "b_tol": 1e-12, "b_max_iter": 300}}
    found, grads = [], []
    for core, own in cores.items():
        states, _ = get_deq(core=core, **options, **own)(injected(graph, b), x)
        found.append(states[-1])
        grads.append(torch.autograd.grad(states[-1].square().sum(), inputs))
    assert difference(found[:1], found[1:]) < 1e-8
    assert difference(*grads) < 1e-7


@pytest.mark.parametrize("stop", ["all", "sample", "batch"])
def test_rows_whose_residual_vanishes_at_first(stop: str) -> None:
    """Row 0 is off until row 1 has grown: the fixed point is (0.4, 2)."""
    weight, b = torch.tensor([[0.0, 0.5], [0.0, 0.5]]), torch.tensor([[-0.6], [1.0]])
    deq = get_deq(core="reversible", f_max_iter=200, f_tol=1e-9, stop=stop)
    (z,), stat = deq(lambda z: torch.relu(weight @ z + b), torch.zeros(2, 1))
    torch.testing.assert_close(z, torch.tensor([[0.4], [2.0]]), rtol=0, atol=1e-8)
    assert stat["nstep"].shape == (2,)


def scaled_cosine(*states: Tensor) -> Any:
    return tuple(0.5 * torch.cos(z) for z in states) if len(states) > 1 else 0.5 * torch.cos(states[0])


TWO = [torch.zeros(2, 3), torch.zeros(2, 3, 2, 2)]
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "latent diffusion": (torch.zeros(5, 3, 2, 2), {"solver_kwargs": {"m": 5, "lam": 1e-3, "beta": 1.0}}),
    "optical flow": (tuple(TWO), {"sradius_mode": False, "backward_writer": None}),
    "optical flow, watched": (tuple(TWO), {"backward_writer": lambda info: info["nstep"].mean()}),
    "implicit representation": (torch.zeros(9, 4), {"solver_kwargs": {}}),
    "implicit representation, no solver": (torch.zeros(9, 4), {"solver_kwargs": {"f_max_iter": 0}}),
    "language model": (torch.zeros(2, 5, 4), {}),
    "sequence": (torch.zeros(2, 4, 5), {"sradius_mode": True, "backward_writer": None}),
    "graph": (torch.zeros(4, 7), {}),
    "multiscale": (TWO, {"writer": object()}),
    "multiscale, large": (TWO, {"solver_kwargs": {"tau": 1.0}}),
    "vector": (torch.zeros(3), {}),
    "number": (torch.tensor(0.0), {}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_model_zoo(name: str, training: bool) -> None:
    z0, keywords = CALLS[name]
    deq = get_deq(namespace("--core", "reversible", "--f_tol", "1e-6", "--f_max_iter", "60")).train(training)
    states, stat = deq(scaled_cosine, z0, **keywords)
    reached = 1e-5 if keywords.get("solver_kwargs") != {"f_max_iter": 0} else 1.0
    for z, start in zip(*map(torch.utils._pytree.tree_leaves, (states[-1], z0)), strict=True):
        torch.testing.assert_close(z, torch.full_like(start, 0.450184), rtol=0, atol=reached)
    assert {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius"} <= stat.keys()


@pytest.mark.parametrize("leaf", [True, False])
def test_a_writer_sees_how_exactly_the_steps_were_undone(leaf: bool) -> None:
    cell, x, seen = Dense(), torch.randn(4, 6), []
    z0 = torch.zeros_like(x) if leaf else torch.zeros_like(x, requires_grad=True) * 1
    (z,), _ = get_deq(core="reversible", f_max_iter=80)(injected(cell, x), z0, backward_writer=seen.append)
    z.sum().backward()
    assert [(info["nstep"].item() > 2, info["abs_lowest"].item() < 1e-9) for info in seen] == [(True, True)]


def test_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    revsolve.torchdeq.add_deq_args(parser)
    args = parser.parse_args(["--core", "reversible", "--beta", "0.5", "--stop", "batch", "--on_failure", "ignore"])
    deq = get_deq(args)
    assert (deq.beta, deq.stop, deq.on_failure) == (0.5, "batch", "ignore")


def test_anchors_are_as_far_apart_as_asked() -> None:
    cell, x = Dense(), torch.randn(4, 6, requires_grad=True)

    def kept(every: int) -> int:
        deq = get_deq(core="reversible", f_max_iter=40, f_tol=0.0, beta=0.5, anchor_every=every, on_failure="ignore")
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            deq(injected(cell, x), torch.zeros_like(x))
        return len(saved)

    assert kept(1) - kept(20) == 2 * 19  # pairs


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
        (lambda: get_deq(core="reversible", stop="row")(torch.cos, torch.zeros(2, 3)), "stop must be one of"),
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
