"""How a Brownian path behaves: the same answers in any order, bounded memory, checked arguments."""

import collections
import contextlib
import gc
import inspect
import itertools
import math
import sys
import threading
import timeit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revsolve.brownian.path import BrownianPath

AREA = "space-time"
GRIDS = {
    "tree": {},
    "grid": {"dt": 0.1},
    "many blocks": {"dt": 2**-8},
    "uneven": {"grid": [0.0, 0.1, 0.15, 0.7, 1.0]},
    "grid finer than tol": {"dt": 0.1, "tol": 0.2},
    "coarse leaves": {"tol": 0.01},
}
TIMES = st.floats(0, 1) | st.integers(0, 32).map(lambda n: n / 32) | st.sampled_from([0.1, 0.15, 0.7])


def flat(answers):
    """Answers (W, H), one after the other."""
    return torch.cat([torch.cat(answer) for answer in answers])


@given(st.tuples(TIMES, TIMES, TIMES), st.sampled_from(sorted(GRIDS)))
def test_adjacent_spans_join_by_chens_relation(points, kind):
    a, b, c = sorted(points)
    path = BrownianPath(0.0, 1.0, (3,), seed=5, levy_area=AREA, dtype=torch.float64, **GRIDS[kind])
    (W, H), (W1, H1), (W2, H2) = (path(*span, return_H=True) for span in [(a, c), (a, b), (b, c)])
    torch.testing.assert_close(W, W1 + W2, rtol=0, atol=1e-13)
    # Written without division: H of a span near rounding of the times knows only its own size.
    expected = (b - a) * H1 + (c - b) * H2 + ((c - b) * W1 - (b - a) * W2) / 2
    torch.testing.assert_close((c - a) * H, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=12), st.sampled_from(sorted(GRIDS)), st.randoms())
def test_answers_repeat_in_any_order_and_direction(dtype, spans, kind, random):
    make = {"seed": 7, "dtype": dtype, "levy_area": AREA, **GRIDS[kind]}
    first, second = BrownianPath(0.0, 1.0, (2, 3), **make), BrownianPath(0.0, 1.0, (2, 3), **make)
    expected = {span: first(*span, return_H=True) for span in spans}
    shuffled = random.sample(spans, len(spans))
    again = spans[::-1] + shuffled
    asked_again = [path(ta, tb, return_H=True) for path in (first, second) for ta, tb in again]
    backwards = [path(tb, ta, return_H=True) for path in (first, second) for ta, tb in again]
    assert torch.equal(flat(asked_again), flat([expected[span] for span in again * 2]))
    assert torch.equal(flat(backwards), flat([(-expected[span][0], expected[span][1]) for span in again * 2]))


def test_sweeps_over_a_grid_agree_step_by_step():
    path = BrownianPath(0.0, 1.0, (3,), seed=1, dt=2**-9, levy_area=AREA)
    steps = list(itertools.pairwise(n * 2**-9 for n in range(513)))
    forward = [path(*step, return_H=True) for step in steps]
    backward = [path(*step, return_H=True) for step in reversed(steps)]
    assert torch.equal(flat(forward), flat(backward[::-1]))


def test_the_same_increments_with_and_without_areas_on_a_grid():
    with_areas, without = (BrownianPath(0.0, 1.0, (3,), seed=1, dt=0.1, levy_area=a) for a in (AREA, "none"))
    assert torch.equal(with_areas(0.1, 0.2), without(0.1, 0.2))


def test_the_default_seed_comes_from_torch_and_is_told():
    torch.manual_seed(3)
    first, other = BrownianPath(0.0, 1.0, (3,)), BrownianPath(0.0, 1.0, (3,))
    torch.manual_seed(3)
    again, told = BrownianPath(0.0, 1.0, (3,)), BrownianPath(0.0, 1.0, (3,), seed=first.seed)
    assert torch.equal(first(0.0, 0.3), again(0.0, 0.3))
    assert torch.equal(first(0.0, 0.3), told(0.0, 0.3))
    assert not torch.equal(first(0.0, 0.3), other(0.0, 0.3))


def test_queries_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    BrownianPath(0.0, 1.0, (3,), seed=1)(0.1, 0.3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_path_first_asked_in_inference_mode_serves_autograd():
    path = BrownianPath(0.0, 1.0, (3,), seed=1, dt=0.5)
    with torch.inference_mode():
        path(0.0, 0.5)
        path(0.1, 0.3)
    x = torch.ones(3, requires_grad=True)
    (x * path(0.0, 0.5) * path(0.1, 0.3)).sum().backward()
    assert torch.equal(x.grad, path(0.0, 0.5) * path(0.1, 0.3))


def ask_all(path, spans):
    collections.deque((path(ta, tb) for ta, tb in spans), maxlen=0)


def bytes_alive():
    """Storage of all tensors of this process, shared storage counted once."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


@pytest.mark.parametrize(
    ("num_steps", "times"),
    [
        pytest.param(10**5, [n / 10**5 for n in range(10**5 + 1)], id="grid"),
        pytest.param(1, [n / 2000 for n in range(2001)], id="tree"),
        pytest.param(1, [n / 10**5 for n in range(10**5 + 1)], id="long tree", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_queries(num_steps, times):
    path = BrownianPath(0.0, 1.0, (2,), seed=1, levy_area=AREA, grid=[n / num_steps for n in range(num_steps + 1)])
    spans = list(itertools.pairwise(times))
    ask_all(path, spans[: len(spans) // 4])
    early = bytes_alive()
    ask_all(path, spans)
    assert bytes_alive() <= early + 1024  # the last block may be longer or shorter


@pytest.mark.parametrize("options", [{"dt": 0.01}, {}])
def test_memory_is_given_back_with_the_thread_that_asked(options):
    path = BrownianPath(0.0, 1.0, (1000,), seed=1, **options)
    before = bytes_alive()
    for _ in range(4):
        thread = threading.Thread(target=path, args=(0.123, 0.456))
        thread.start()
        thread.join()
    assert bytes_alive() == before


def test_the_deepest_tree_needs_no_recursion():
    limit = sys.getrecursionlimit()
    path = BrownianPath(0.0, 20.0, (2,), seed=1, tol=1e-13, levy_area=AREA)
    sys.setrecursionlimit(len(inspect.stack()) + 40)
    try:
        W, H = path(math.pi, math.pi + 1e-12, return_H=True)
    finally:
        sys.setrecursionlimit(limit)
    assert torch.stack([W, H]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_times_a_rounding_outside_are_clamped(dtype):
    path = BrownianPath(0.1, 0.9, (3,), seed=1, dtype=dtype, levy_area=AREA)
    t0, t1 = (torch.tensor(t, dtype=dtype if dtype != torch.bfloat16 else torch.float32) for t in (0.1, 0.9))
    below, above = (torch.nextafter(t, t.new_tensor(x)) for t, x in ((t0, -1.0), (t1, 2.0)))
    assert torch.equal(path(below, above), path(0.1, 0.9))
    assert torch.equal(path(float(below), float(above)), path(0.1, 0.9))


def test_float32_times_fit_a_float64_path():
    path = BrownianPath(0.0, 0.3, (3,), seed=1, dtype=torch.float64)
    assert torch.equal(path(torch.tensor(0.0), torch.tensor(0.3)), path(0.0, 0.3))


def test_knots_are_met_up_to_rounding_of_the_times():
    path = BrownianPath(0.0, 1.0, (3,), seed=1, dt=0.1)
    assert torch.equal(path(0.1 + 0.2, 0.4), path(0.3, math.nextafter(0.4, 1.0)))


def test_an_empty_span_is_zero():
    W, H = BrownianPath(0.0, 1.0, (3,), seed=1, levy_area=AREA)(0.3, 0.3, return_H=True)
    assert torch.equal(torch.stack([W, H]), torch.zeros(2, 3))


@pytest.mark.parametrize(("ta", "tb"), [(-1e-6, 0.5), (0.5, 1 + 1e-6), (0.5, math.nan), (3.0, 0.5)])
def test_a_time_outside_is_refused(ta, tb):
    path = BrownianPath(0.0, 1.0, (3,), seed=1)
    with pytest.raises(ValueError, match=r"asked at t = .*, outside the path's interval \[0.0, 1.0\]"):
        path(ta, tb)


@pytest.mark.parametrize("span", [(0.0, 0.5), (0.1, 0.2)])
def test_an_area_is_refused_by_a_path_without(span):
    path = BrownianPath(0.0, 1.0, (3,), seed=1, dt=0.5)
    with pytest.raises(ValueError, match='make it with levy_area="space-time"'):
        path(*span, return_H=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t1": 0.0}, ValueError, "t0 < t1 is needed, but t0 = 0.0 and t1 = 0.0"),
        ({"t1": math.inf}, ValueError, "t1 = inf"),
        ({"dt": 0.1, "grid": [0.0, 1.0]}, ValueError, "grid and dt = 0.1 were both given"),
        ({"dt": -0.1}, ValueError, "dt must be positive, but is -0.1"),
        ({"dt": math.nan}, ValueError, "dt must be positive, but is nan"),
        ({"grid": [0.0, 0.5]}, ValueError, "grid must run from t0 = 0.0 to t1 = 1.0, but runs from 0.0 to 0.5"),
        ({"grid": []}, ValueError, "but runs nowhere"),
        ({"grid": [0.0, 0.5, 0.5, 1.0]}, ValueError, r"grid\[2\] = 0.5 follows grid\[1\] = 0.5"),
        ({"grid": torch.tensor([0.0, math.nan, 1.0])}, ValueError, r"grid\[1\] = nan follows grid\[0\] = 0.0"),
        ({"tol": 0.0}, ValueError, "tol must be .*, but is 0.0"),
        ({"levy_area": "foster"}, ValueError, "levy_area must be .*, but is 'foster'"),
        ({"dtype": torch.int64}, TypeError, "dtype must be floating, but is torch.int64"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, but is 0.5"),
        ({"seed": "a"}, TypeError, "seed must be an integer, but is 'a'"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        BrownianPath(**{"t0": 0.0, "t1": 1.0, "size": (3,)} | options)


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_query_does_not_wait_for_the_device():
    path = BrownianPath(0.0, 1.0, (64, 4), seed=1, dt=0.01, levy_area=AREA, device="cuda")
    with waiting_is_an_error():
        answers = [path(ta, tb, return_H=True) for ta, tb in [(0.01, 0.02), (0.02, 0.01), (0.013, 0.6)]]
    assert all(x.is_cuda for answer in answers for x in answer)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_from_the_cpu_gives_the_same_path_on_a_gpu():
    cpu = BrownianPath(0.0, 1.0, (64, 4), seed=1, dt=0.1)
    gpu = BrownianPath(0.0, 1.0, (64, 4), seed=1, dt=0.1, device="cuda", noise_device="cpu")
    torch.testing.assert_close(gpu(0.13, 0.9).cpu(), cpu(0.13, 0.9))


@pytest.mark.slow
def test_a_query_on_the_grid_costs_at_most_three_randn():
    path = BrownianPath(0.0, 1.0, (64, 4), seed=1, dt=2**-9)
    spans = list(itertools.pairwise(n * 2**-9 for n in range(513)))
    ours = min(timeit.repeat(lambda: [path(ta, tb) for ta, tb in spans], number=1, repeat=20))
    randn = min(timeit.repeat(lambda: [torch.randn(64, 4) for _ in spans], number=1, repeat=20))
    assert ours < 3 * randn
