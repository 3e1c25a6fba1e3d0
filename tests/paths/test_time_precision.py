"""Times given as numbers keep double precision: knots, queries, spans, windows, near zero and in seconds since 1970."""

import math

import numpy as np
import pytest
import torch

from revsolve.brownian.path import BrownianPath
from revsolve.compat.torchcde import as_control
from revsolve.paths.control import HermitePath, LinearPath, NaturalCubicPath
from revsolve.paths.logsignature import LogSignaturePath, logsig_windows, window_logsignatures

KNOTS = [0.0, 0.1, 0.3, 0.7, 1.1]
OFFSETS = [0.0, 1e6, 1.7e9]
FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numbers of numpy": lambda t: list(np.array(t)),
    "tensor": lambda t: torch.tensor(t, dtype=torch.float64),
}
PATHS = {
    "linear": LinearPath,
    "hermite": HermitePath,
    "natural cubic": NaturalCubicPath,
    "lengths": lambda x, t: LinearPath(x, t, lengths=[5, 5]),
    "hermite, lengths": lambda x, t: HermitePath(x, t, lengths=[5, 5]),
    "log-signature": lambda x, t: LogSignaturePath(x, 1, t, t),
    "rectilinear": lambda x, t: LinearPath(staircase(x), t, rectilinear=0),
}


def staircase(x):
    """Three observations whose staircase has five knots."""
    return x[:, :3].contiguous()


def data(dtype):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    x[..., 0] = torch.arange(5.0)
    return x.to(dtype)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PATHS)
def test_knots_of_any_form_are_those_numbers(kind, form, offset):
    t = [offset + knot for knot in KNOTS]
    path = PATHS[kind](data(torch.float64), FORMS[form](t))
    assert path.grid_points.dtype == torch.float64
    assert path.knots == t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("offset", OFFSETS[1:])
def test_a_path_far_from_zero_is_the_one_at_zero_moved(kind, dtype, offset):
    """Every way to ask, with times as numbers; knots are told apart by what doubles at the offset resolve."""
    x = data(dtype)
    moved = [offset + knot for knot in KNOTS]
    near, far = PATHS[kind](x, [t - offset for t in moved]), PATHS[kind](x, moved)
    queries = [0.05, 0.2, 0.55, 0.9, 1.0]
    late = [offset + t for t in queries]
    early = [t - offset for t in late]
    rounding = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    spans = ([knot - 0.01 for knot in early], [knot + 0.01 for knot in early])
    moved_spans = tuple([offset + t for t in ends] for ends in spans)
    for ask in (
        lambda path, t, _: torch.stack([path.evaluate(one) for one in t]),
        lambda path, t, _: path.evaluate(torch.tensor(t, dtype=torch.float64)),
        lambda path, t, _: torch.stack([path.derivative(one) for one in t]),
        lambda path, t, spans: torch.stack(
            [path.derivative(one, span=(a, b)) for one, a, b in zip(t, *spans, strict=True)]
        ),
        lambda path, t, spans: path.derivatives(t, spans=spans),
        lambda path, t, spans: path.derivative(
            torch.tensor(t[:1], dtype=torch.float64), span=(spans[0][0], spans[1][0])
        ),
        lambda path, t, _: path.increments(t),
        lambda path, t, _: path.increment(t[0], t[3]),
    ):
        torch.testing.assert_close(ask(far, late, moved_spans), ask(near, early, spans), **rounding)


@pytest.mark.parametrize("path", [LinearPath, HermitePath, NaturalCubicPath])
def test_a_list_of_tensors_keeps_their_gradients(path):
    t = torch.tensor(KNOTS, dtype=torch.float64, requires_grad=True)
    x = data(torch.float64)
    found, expected = (torch.autograd.grad(path(x, knots).evaluate(0.5).sum(), t)[0] for knots in ([*t.unbind()], t))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", [LinearPath, HermitePath, NaturalCubicPath])
def test_seconds_since_1970_that_are_integers_are_told_apart(path):
    x = torch.randn(3, 2)
    knots = [1_700_000_000 + n for n in (0, 1, 3)]
    for t in (knots, np.array(knots), torch.tensor(knots)):
        torch.testing.assert_close(path(x, t).evaluate(1.7e9 + 2), path(x, [0, 1, 3]).evaluate(2.0))


@pytest.mark.parametrize("path", [LinearPath, HermitePath, NaturalCubicPath])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_knots_of_a_long_series_in_half_precision_are_counted(path, dtype):
    x = torch.zeros(5000, 1, dtype=dtype)
    built = path(x)
    assert built.knots == list(range(5000))
    assert built.evaluate(4500.5).dtype == dtype
    assert built.evaluate(4500.5).isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "hermite", "natural cubic"])
def test_a_span_chooses_its_piece_far_from_zero(kind):
    """A span of numbers around a query of many times; its ends must not be moved over a knot."""
    x, offset = data(torch.float64), 1.7e9
    path = PATHS[kind](x, [offset + n for n in range(5)])
    t = torch.tensor([offset + 2.0], dtype=torch.float64)
    early, late = (path.derivative(t, span=(offset + a, offset + a + 1)) for a in (1, 2))
    torch.testing.assert_close(early[..., 0, :], path.derivative(offset + 2.0, span=(offset + 1, offset + 2)))
    torch.testing.assert_close(late[..., 0, :], path.derivative(offset + 2.0, span=(offset + 2, offset + 3)))


def test_windows_given_as_numbers_are_those_numbers():
    """Over knots in float32, too: the window ends are between them."""
    x = data(torch.float32)
    ends = [0.0, 0.1, 2.7, 4.0]
    path = LogSignaturePath(x, 2, ends)
    assert path.knots == ends
    assert window_logsignatures(x, 2, ends)[1].tolist() == ends
    assert logsig_windows(x, 2, 0.4).shape == (2, 11, 6)


def test_windows_end_where_knots_in_single_precision_do():
    """0.7 and the float32 nearest to it are one time."""
    t = torch.tensor([0.0, 0.3, 0.7])
    path = LogSignaturePath(torch.randn(3, 2), 1, [0.0, 0.3, 0.7], t)
    assert path.knots == pytest.approx([0.0, 0.3, 0.7])
    assert path.knots[-1] == t[-1].item()


class Line:
    """A path of another package whose interval is a pair of numbers; X = t - t0."""

    def __init__(self, t0, t1):
        self.interval = (t0, t1)

    def evaluate(self, t):
        return (t - self.interval[0]).reshape(1)

    def derivative(self, t):
        return torch.ones_like(t).reshape(1)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_foreign_path_is_asked_at_times_that_it_can_tell_apart(offset):
    path = as_control(Line(offset, offset + 2.0))
    assert path.evaluate(offset + 0.5).item() == pytest.approx(0.5, abs=1e-6)
    assert path.increments([offset, offset + 0.5, offset + 1.5]).flatten().tolist() == pytest.approx(
        [0.5, 1.0], abs=1e-6
    )


@pytest.mark.parametrize(
    "make", [lambda t0: LinearPath(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 2.0]).double() + t0)]
)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("outside", [2.1, -0.1, 400.0, math.inf])
def test_times_outside_are_refused_far_from_zero(make, offset, outside):
    with pytest.raises(ValueError, match="outside the interval"):
        make(offset).evaluate(offset + outside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("outside", [1.1, -0.1, 400.0])
def test_brownian_times_outside_are_refused_far_from_zero(dtype, offset, outside):
    path = BrownianPath(offset, offset + 1.0, (2,), seed=0, dtype=dtype)
    with pytest.raises(ValueError, match="outside the path's interval"):
        path(offset, offset + outside)


@pytest.mark.parametrize("offset", OFFSETS[1:])
@pytest.mark.parametrize("options", [{"dt": 0.125}, {}])
def test_a_brownian_path_far_from_zero_tells_times_apart(offset, options):
    path = BrownianPath(offset, offset + 1.0, (2,), seed=0, **options)
    W = [path(offset + n / 64, offset + (n + 1) / 64) for n in range(64)]
    torch.testing.assert_close(torch.stack(W).sum(0), path(offset, offset + 1.0))
    assert torch.stack(W).abs().min() > 0


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dt", [0.1, 0.3, 0.5])
def test_a_brownian_grid_has_no_sliver_of_a_last_step(offset, dt):
    path = BrownianPath(offset, offset + 0.3, (2,), seed=0, dt=dt)
    assert f"steps={math.ceil(0.3 / dt - 0.01)}," in repr(path)


def test_many_unsuitable_windows_are_not_all_shown():
    with pytest.raises(ValueError, match=r"\[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, ...\]"):
        window_logsignatures(torch.zeros(40, 2), 1, [*map(float, range(20)), 0.0])


def test_a_whole_number_outside_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"t = 5.0 lies outside"):
        LinearPath(torch.zeros(3, 1)).evaluate(torch.tensor(5))
