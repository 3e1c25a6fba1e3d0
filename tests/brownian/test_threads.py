"""Threads that share a Brownian path, and copies of one: all have the values of its seed."""

import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchsde
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from revsolve import sdeint
from revsolve.brownian.path import BrownianPath
from revsolve.compat.torchsde import as_brownian

NUM_THREADS = 6
PATHS = {
    "tree": {"tol": 1e-3},
    "deep tree": {},
    "steps": {"dt": 2**-8},
    "uneven steps": {"grid": [0.0, 0.1, 0.15, 0.7, 1.0]},
    "steps and coarse leaves": {"dt": 0.1, "tol": 0.01},
}


def make(kind: str, **more: object) -> BrownianPath:
    return BrownianPath(0.0, 1.0, (3,), seed=5, levy_area="space-time", dtype=torch.float64, **PATHS[kind], **more)


def queries(seed: int) -> list[tuple[float, float, bool]]:
    """Spans on and off the knots, single steps and double ones, in both directions, with and without areas."""
    rng = random.Random(seed)
    steps = [(n * 2**-8, (n + k) * 2**-8) for n in range(100, 140) for k in (1, 2)]
    between = [(rng.random(), rng.random()) for _ in range(10)]
    spans = steps + between + [(0.1, 0.15), (0.7, 0.15), (0.0, 1.0)]
    return [(*rng.choice([span, span[::-1]]), rng.random() < 0.5) for span in rng.sample(spans, len(spans))]


def answers(path: Callable, asked: list[tuple[float, float, bool]]) -> torch.Tensor:
    return torch.cat([torch.cat(path(ta, tb, return_H=True)) if H else path(ta, tb) for ta, tb, H in asked])


def in_threads(work: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """[work(0), work(1), ...], at the same time."""
    together = threading.Barrier(NUM_THREADS)
    with ThreadPoolExecutor(NUM_THREADS, initializer=together.wait) as pool:
        return list(pool.map(work, range(NUM_THREADS)))


@pytest.fixture(params=[1e-6, 1e-4], ids=["eager switches", "rare switches"])
def _switches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads take turns in the middle of queries."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("kind", PATHS)
def test_threads_that_share_a_path_have_the_values_of_its_seed(kind: str) -> None:
    expected = [answers(make(kind), queries(n)) for n in range(NUM_THREADS)]
    path, state = make(kind), torch.get_rng_state()
    assert all(map(torch.equal, in_threads(lambda n: answers(path, queries(n))), expected))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_switches")
def test_random_numbers_of_other_threads_are_their_own() -> None:
    path = make("tree")

    def work(n: int) -> torch.Tensor:
        return torch.cat([torch.rand(4, dtype=torch.float64) + 0 * path(0.1, 0.2 + k * 1e-3)[0] for k in range(20)])

    assert len(torch.cat(in_threads(work)).unique()) == NUM_THREADS * 80


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun2", "rev_midpoint"])
def test_solves_in_threads_over_one_path_are_those_of_a_single_one(method: str) -> None:
    """Steps of different lengths, so that threads are in different places."""
    path = BrownianPath(0.0, 1.0, (4, 2), seed=3, dtype=torch.float64, dt=2**-7)

    def gradient(n: int) -> torch.Tensor:
        a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        sde = (lambda t, y: -y, lambda t, y: a * torch.cos(y))
        y = sdeint(sde, torch.ones(4, 2, dtype=torch.float64), [0.0, 1.0], dt=2.0 ** (-3 - n), bm=path, method=method)
        return torch.cat([y[-1].flatten(), *torch.autograd.grad(y[-1].sum(), [a])[0].reshape(1, 1)])

    expected = [gradient(n) for n in range(NUM_THREADS)]
    assert all(map(torch.equal, in_threads(gradient), expected))


@pytest.mark.usefixtures("_switches")
def test_threads_may_share_a_path_of_torchsde() -> None:
    """Its tree is built by the queries, so that values depend on their order: what is asked twice stays the same."""
    bm = torchsde.BrownianInterval(0.0, 1.0, (2, 3), dtype=torch.float64, entropy=3, levy_area_approximation="foster")
    asked = [query for query in queries(0) if query[0] != query[1]]
    seen = in_threads(lambda n: answers(as_brownian(bm), asked))
    again = answers(as_brownian(bm), asked)
    torch.testing.assert_close(torch.stack(seen), again.expand(NUM_THREADS, *again.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda path: pickle.loads(pickle.dumps(path))])
@pytest.mark.parametrize("kind", PATHS)
def test_a_copy_is_the_same_path(kind: str, copied: Callable) -> None:
    path = make(kind)
    expected = answers(path, queries(0))
    twin = copied(path)
    assert torch.equal(answers(twin, queries(0)), expected)
    assert torch.equal(answers(path, queries(0)), expected)
    assert repr(twin) == repr(path)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_path_of_torchsde_answers(copied: Callable) -> None:
    path = as_brownian(torchsde.BrownianPath(0.0, torch.zeros(2, 3)))
    assert copied(path)(0.2, 0.5).shape == (2, 3)


def test_fake_tensors_are_not_kept() -> None:
    path = BrownianPath(0.0, 1.0, (3,), seed=1, dt=0.5)
    with FakeTensorMode():
        fake = path(0.0, 0.5)
    assert type(fake) is FakeTensor
    assert type(path(0.0, 0.5)) is torch.Tensor
