"""Control paths: against torchcde and scipy, gradients, padding, the two ways to ask, errors."""

import copy
import math
import pickle
import time

import numpy as np
import pytest
import torch
import torchcde
from scipy.interpolate import CubicSpline

from revsolve.compat.torchcde import TupleControl, as_control
from revsolve.paths.control import HermitePath, LinearPath, NaturalCubicPath

NAN = math.nan
PATHS = [LinearPath, HermitePath, NaturalCubicPath]
COEFFICIENTS = {
    LinearPath: torchcde.linear_interpolation_coeffs,
    HermitePath: torchcde.hermite_cubic_coefficients_with_backward_differences,
    NaturalCubicPath: torchcde.natural_cubic_coeffs,
}
KINDS_OF_TIME = [
    float,
    lambda t: torch.tensor(t, dtype=torch.float64),
    lambda t: torch.tensor(t, dtype=torch.float64, requires_grad=True),
]
# Both packages take some tens of operations on numbers of size 10 and steps down to 0.1, which 1e-12 would allow for.
AGREEMENT = {"rtol": 1e-10, "atol": 1e-10}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def series(*shape, missing=0.3, dtype=torch.float64):
    x = torch.randn(*shape, dtype=dtype).cumsum(-2)
    gaps = torch.rand(*shape) < missing
    gaps[..., shape[-2] // 2, :] = False
    return x.masked_fill(gaps, NAN)


def times(length, dtype=torch.float64):
    return (torch.rand(length, dtype=dtype) + 0.1).cumsum(0)


def peer(path, x, t=None):
    build = torchcde.LinearInterpolation if path is LinearPath else torchcde.CubicSpline
    return build(COEFFICIENTS[path](x, t), t)


def between(t, number=301):
    return torch.cat([t, t[0] + (t[-1] - t[0]) * torch.rand(number, dtype=t.dtype)])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("missing", [0, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(4, 40, 3), (2, 3, 9, 2), (25, 1), (5, 2, 2)])
@pytest.mark.parametrize("ask", ["evaluate", "derivative"])
def test_agrees_with_torchcde(path, missing, shape, ask):
    x, t = series(*shape, missing=missing), times(shape[-2])
    query = between(t)
    ours, theirs = path(x, t), peer(path, x, t)
    torch.testing.assert_close(getattr(ours, ask)(query), getattr(theirs, ask)(query), **AGREEMENT)
    torch.testing.assert_close(getattr(ours, ask)(query[7]), getattr(theirs, ask)(query[7]), **AGREEMENT)


@pytest.mark.parametrize("path", PATHS)
def test_default_times_and_attributes_are_those_of_torchcde(path):
    x = series(3, 12, 2)
    ours, theirs = path(x), peer(path, x)
    torch.testing.assert_close(ours.interval, theirs.interval)
    torch.testing.assert_close(ours.grid_points, theirs.grid_points)
    torch.testing.assert_close(ours.evaluate(torch.tensor(3.7)), theirs.evaluate(torch.tensor(3.7)), **AGREEMENT)


@pytest.mark.parametrize("missing", [0, 0.3])
def test_rectilinear_agrees_with_torchcde(missing):
    x = series(4, 20, 3, missing=missing)
    x[..., 1] = times(20)
    x[:, 0] = 0.0
    ours = LinearPath(x, rectilinear=1)
    theirs = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x, rectilinear=1))
    query = between(theirs.grid_points)
    torch.testing.assert_close(ours.evaluate(query), theirs.evaluate(query), **AGREEMENT)


def test_rectilinear_says_when_it_is_not_causal():
    x = torch.tensor([[0.0, NAN], [1.0, 5.0], [2.0, 6.0]])
    with pytest.warns(UserWarning, match="not causal") as caught:
        path = LinearPath(x, rectilinear=0)
    assert caught[0].filename == __file__
    assert path.evaluate(0.0).tolist() == [0.0, 5.0]


@pytest.mark.parametrize("length", [2, 3, 4, 65, 1000])
def test_natural_spline_agrees_with_scipy_for_every_length(length):
    # Six rounds of the reduction must be enough, also on steps that differ by a factor of 1e4.
    t = torch.logspace(-4, 0, length, dtype=torch.float64).cumsum(0)
    x = torch.randn(length, 2, dtype=torch.float64)
    ours, scipys = NaturalCubicPath(x, t), CubicSpline(t.numpy(), x.numpy(), bc_type="natural")
    query = between(t)
    np.testing.assert_allclose(ours.evaluate(query).numpy(), scipys(query.numpy()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("missing", [0, 0.3])
def test_padding_changes_nothing_and_the_path_stands_still(path, missing):
    x, t = series(3, 20, 2, missing=missing), times(20)
    x[0, [0, 6]], x[1, [0, 12]] = 1.0, 2.0
    padded = path(x, t, lengths=[7, 13, 20])
    alone = path(x[1:2, :13], t[:13])
    query = between(t[:13])
    torch.testing.assert_close(padded.evaluate(query)[1], alone.evaluate(query)[0], **EXACT)
    later = torch.linspace(t[12] + 1e-9, t[-1], 50, dtype=t.dtype).clamp(max=t[-1])
    torch.testing.assert_close(padded.evaluate(later)[1], alone.evaluate(t[12]).expand(50, 2), **EXACT)
    assert not padded.derivative(later)[1].any()
    torch.testing.assert_close(padded.evaluate(query)[2], path(x[2], t).evaluate(query), **EXACT)


@pytest.mark.parametrize(
    ("path", "lengths", "jumps"),
    [
        (LinearPath, None, [1.0, 2.0]),
        (HermitePath, None, []),
        (NaturalCubicPath, None, []),
        (HermitePath, [2, 4], [1.0]),
        (NaturalCubicPath, [3, 2], [1.0, 2.0]),
    ],
)
def test_jump_times(path, lengths, jumps):
    assert path(torch.randn(2, 4, 1), lengths=lengths).jump_times.tolist() == jumps


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("missing", [0, 0.4])
@pytest.mark.parametrize("lengths", [None, [4, 7]])
def test_gradients_to_data_and_times_are_exact(path, missing, lengths):
    x, t = series(2, 7, 2, missing=missing), times(7)
    x[:, 1] = 0.5
    seen = ~x.isnan()

    def answers(values, t, query):
        built = path(torch.full_like(x, NAN).masked_scatter(seen, values), t, lengths=lengths)
        return (
            built.evaluate(query),
            built.derivative(query),
            built.increment(early, late),
            built.increments(built.grid_points),
            built.derivatives([early, (early + late) / 2, late]),
        )

    early, late = t[0].item() + 0.01, t[-1].item() - 0.01
    query = t[:1] + (t[-1] - t[0]) * torch.tensor([0.13, 0.71], dtype=x.dtype)
    inputs = [v.detach().requires_grad_() for v in (x[seen], t, query)]
    torch.autograd.gradcheck(answers, inputs)


@pytest.mark.parametrize("path", PATHS)
def test_missing_values_receive_zero_gradient(path):
    x = series(2, 9, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(path(x).evaluate(3.3).sum(), x)
    assert gradient[x.isnan()].eq(0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS_OF_TIME)
def test_one_time_and_many_times_agree(path, kind, device):
    x, t = series(3, 10, 2).to(device), times(10).to(device)
    built, query = path(x, t), between(t.cpu(), 20).tolist()
    slopes, values = built.derivatives(query), built.evaluate(torch.tensor(query, device=device, dtype=t.dtype))
    torch.testing.assert_close(torch.stack([built.derivative(kind(q)) for q in query]), slopes, **EXACT)
    torch.testing.assert_close(torch.stack([built.evaluate(float(q)) for q in query], -2), values, **EXACT)


@pytest.mark.parametrize("path", PATHS)
def test_increments_of_any_grid_agree_with_values(path):
    built = path(series(3, 10, 2), times(10))
    grid = between(built.grid_points, 20).sort().values
    values = built.evaluate(grid).movedim(-2, 0)
    torch.testing.assert_close(built.increments(grid), values.diff(dim=0), **EXACT)
    torch.testing.assert_close(built.increment(grid[3], grid[17]), values[17] - values[3], **EXACT)


@pytest.mark.parametrize("path", PATHS)
def test_increments_between_knots_are_exact_and_antisymmetric(path):
    x = series(3, 10, 2, missing=0, dtype=torch.float32)
    built = path(x)
    assert built.increments(built.grid_points[2:7]).equal(x[:, 2:7].diff(dim=1).movedim(1, 0))
    assert built.increment(4.0, 5.0).equal(x[:, 5] - x[:, 4])
    assert built.increment(torch.tensor(5.0), torch.tensor(4.0)).equal(x[:, 4] - x[:, 5])


@pytest.mark.parametrize("path", [LinearPath, lambda x: as_control(peer(LinearPath, x))])
@pytest.mark.parametrize(
    ("t", "span", "slope"),
    [
        (1.0, None, 1.0),
        (1.0, (0.0, 1.0), 1.0),
        (1.0, (1.0, 2.0), 10.0),
        (1.0, (2.0, 1.0), 10.0),
        (math.nextafter(1.0, 2.0), (0.0, 1.0), 1.0),
        (math.nextafter(1.0, 0.0), (1.0, 2.0), 10.0),
        (0.0, None, 1.0),
        (2.0, (2.0, 1.0), 10.0),
    ],
)
def test_a_span_chooses_the_piece_at_a_knot(path, t, span, slope):
    built = path(torch.tensor([[0.0], [1.0], [11.0]], dtype=torch.float64))
    spans = None if span is None else ([span[0]], [span[1]])
    assert built.derivative(t, span=span).item() == pytest.approx(slope, rel=1e-12)
    assert built.derivatives([t], spans=spans).item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_times_in_single_precision_and_data_far_from_zero(path):
    t = 1.7e9 + torch.arange(6, dtype=torch.float64)  # seconds since 1970, which float32 cannot tell apart
    x = torch.randn(6, 2)
    built = path(x, t)
    assert built.evaluate(1.7e9 + 2.0).dtype == torch.float32
    torch.testing.assert_close(built.derivative(1.7e9 + 2.5), path(x).derivative(2.5))


def test_every_answer_reads_the_named_tensors():
    x = series(2, 6, 2).requires_grad_()
    built = NaturalCubicPath(x)
    assert [tensor.requires_grad for tensor in built.tensors] == [False, True, True]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("ask", ["evaluate", "derivative"])
def test_foreign_paths_answer_as_before(path, ask):
    x, t = series(3, 8, 2), times(8)
    theirs = peer(path, x, t)
    adopted, query = as_control(theirs), between(t, 10)
    torch.testing.assert_close(getattr(adopted, ask)(query), getattr(theirs, ask)(query), rtol=0, atol=0)
    ours = path(x, t)
    torch.testing.assert_close(adopted.increment(query[9], query[12]), ours.increment(query[9], query[12]), **AGREEMENT)
    torch.testing.assert_close(adopted.increments(t), ours.increments(t), **AGREEMENT)
    torch.testing.assert_close(adopted.derivatives(query), ours.derivatives(query), **AGREEMENT)
    assert adopted.jump_times.equal(ours.jump_times)
    assert len(adopted.tensors) == len(list(theirs.buffers()))


class Parabola:
    """A path that answers one time only, with no knots."""

    interval = (0.0, 2.0)

    def evaluate(self, t):
        assert t.ndim == 0
        return torch.stack([t, t * t])

    def derivative(self, t):
        assert t.ndim == 0
        return torch.stack([torch.ones_like(t), 2 * t])


def test_any_object_with_the_three_attributes_is_a_control():
    adopted = as_control(Parabola())
    torch.testing.assert_close(adopted.derivatives([0.0, 1.5]), torch.tensor([[1.0, 0.0], [1.0, 3.0]]))
    torch.testing.assert_close(adopted.increments([0.0, 1.0, 2.0]), torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    torch.testing.assert_close(adopted.grid_points, torch.tensor([0.0, 2.0]))
    t = torch.tensor(0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(adopted.evaluate(t)[1], t)
    assert slope.item() == 1.0


@pytest.mark.parametrize("build", [lambda a, b: (a, b), torchcde.TupleControl])
def test_tuples_of_controls(build):
    x = series(3, 8, 2)
    control = as_control(build(peer(LinearPath, x), peer(HermitePath, x)))
    assert isinstance(control, TupleControl)
    assert len(control.tensors) == 8
    torch.testing.assert_close(control.evaluate(2.5)[1], HermitePath(x).evaluate(2.5), **AGREEMENT)
    torch.testing.assert_close(control.derivatives([2.5])[0], LinearPath(x).derivatives([2.5]), **AGREEMENT)
    torch.testing.assert_close(control.increments([2.5, 3.0])[0], LinearPath(x).increments([2.5, 3.0]), **AGREEMENT)
    assert control.jump_times.equal(control.grid_points[1:-1])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda path: pickle.loads(pickle.dumps(path))])
@pytest.mark.parametrize(
    "path", [*PATHS, lambda x: as_control(peer(LinearPath, x)), lambda x: as_control((LinearPath(x),))]
)
def test_a_copy_is_the_same_path(path, copied):
    built = path(series(3, 8, 2))
    twin = copied(built)
    first, second = (torch.cat([*control.increments([0.5, 3.0, 4.0])]) for control in (built, twin))
    assert torch.equal(first, second)
    assert twin.knots == built.knots


def test_a_control_stays_itself():
    path = LinearPath(torch.randn(4, 2))
    assert as_control(path) is path


ALL_NAN = torch.zeros(2, 3, 2)
ALL_NAN[1, :, 0] = NAN
INFINITE = torch.zeros(2, 3, 2)
INFINITE[1, 2, 0] = math.inf
X = torch.zeros(2, 3, 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0],), TypeError, "floating-point tensor, but it is list"),
        ((torch.zeros(3, 2, dtype=torch.long),), TypeError, "but it is torch.int64: convert"),
        ((torch.zeros(3),), ValueError, r"\(\.\.\., length >= 2, channels\), but its shape is \(3,\)"),
        ((torch.zeros(4, 1, 2),), ValueError, r"its shape is \(4, 1, 2\)"),
        (
            (X, torch.zeros(4)),
            ValueError,
            r"t must have shape \(3,\), one time per row of x \(2, 3, 2\), but it has \(4,\)",
        ),
        ((X, torch.tensor([0.0, 2.0, 2.0])), ValueError, r"t\[2\] = 2.0 follows t\[1\] = 2.0: sort"),
        ((X, torch.tensor([0.0, NAN, 2.0])), ValueError, r"t\[1\] = nan follows t\[0\] = 0.0"),
        ((ALL_NAN,), ValueError, r"channel 0 of sample \[1\] has no observation at all"),
        ((INFINITE,), ValueError, r"infinite in channel 0 at row 2 of sample \[1\]"),
    ],
)
def test_unsuitable_data_is_refused(path, arguments, error, message):
    with pytest.raises(error, match=message):
        path(*arguments)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3], r"lengths must be integers of shape \(2,\), one per sample, but they are torch.int64 of shape \(1,\)"),
        ([1.0, 2.0], "but they are torch.float32"),
        ([0, 3], "from 1 to 3, the rows of x, but they reach from 0 to 3"),
        ([1, 4], "reach from 1 to 4"),
    ],
)
def test_unsuitable_lengths_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        LinearPath(X, lengths=lengths)


@pytest.mark.parametrize(
    ("x", "t", "channel", "message"),
    [
        (X, None, 2, "0 to 1, but it is 2"),
        (X.masked_fill(torch.tensor([[[False]], [[True]]]), NAN), None, 0, "has no observation at all"),
        (torch.tensor([[0.0, 1.0], [NAN, 2.0], [2.0, 3.0]]), None, 0, r"time channel 0 is NaN at row 1 of sample \[\]"),
        (X, torch.arange(3.0), 0, r"t must have shape \(5,\)"),
    ],
)
def test_unsuitable_rectilinear_data_is_refused(x, t, channel, message):
    with pytest.raises(ValueError, match=message):
        LinearPath(x, t, rectilinear=channel)


@pytest.mark.parametrize("path", [LinearPath, lambda x: as_control(peer(LinearPath, x))])
@pytest.mark.parametrize("t", [-0.1, 2.1, math.nan])
def test_times_outside_are_refused_and_ulps_are_forgiven(path, t):
    built = path(torch.zeros(3, 2))
    message = rf"t = {t:.0f}.* lies outside the interval \[0.0, 2.0\]"
    with pytest.raises(ValueError, match=message):
        built.evaluate(t)
    with pytest.raises(ValueError, match=message):
        built.derivatives([0.5, t])
    assert not built.evaluate(math.nextafter(2.0, 3.0)).any()
    assert not built.derivative(torch.tensor(2.0).nextafter(torch.tensor(3.0))).any()
    assert not built.derivatives([math.nextafter(0.0, -1.0), math.nextafter(2.0, 3.0)]).any()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (3.0, TypeError, "float lacks evaluate, derivative, interval"),
        ((), ValueError, r"one interval, but theirs are \[\]"),
        ((LinearPath(X), LinearPath(torch.zeros(5, 1))), ValueError, r"\[\[0.0, 2.0\], \[0.0, 4.0\]\]"),
    ],
)
def test_what_is_no_control_is_refused(path, error, message):
    with pytest.raises(error, match=message):
        as_control(path)


def seconds(build, repeats):
    def once():
        start = time.perf_counter()
        build()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaps_cost_fifty_times_less_than_in_torchcde(path, dtype):
    x = series(32, 100, 5, dtype=dtype)
    assert seconds(lambda: peer(path, x), 2) >= 50 * seconds(lambda: path(x), 20)
