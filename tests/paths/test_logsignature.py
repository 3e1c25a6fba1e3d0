"""Log-signatures against the tensor algebra, one piece after the other; windows; the path they make."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torchcde

from revsolve.paths.control import LinearPath
from revsolve.paths.logsignature import (
    LogSignaturePath,
    logsig_windows,
    logsignature,
    lyndon_words,
    standard_factors,
    window_logsignatures,
)

# Sums of some ten products of numbers of size 1 to 10 in double precision.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# The tensor algebra up to level 3: a list of arrays, level k with k axes.
def times(a, b):
    return [sum(np.multiply.outer(a[i], b[k - i]) for i in range(k + 1)) for k in range(4)]


def minus(a, b):
    return [p - q for p, q in zip(a, b, strict=True)]


def zero(channels):
    return [np.zeros((channels,) * k) for k in range(4)]


def exponential(step):
    powers = [
        np.array(1.0),
        step,
        np.multiply.outer(step, step),
        np.multiply.outer(np.multiply.outer(step, step), step),
    ]
    return [power / math.factorial(k) for k, power in enumerate(powers)]


def logarithm(signature):
    rest = [signature[0] - 1, *signature[1:]]
    square = times(rest, rest)
    cube = times(square, rest)
    return [a - b / 2 + c / 3 for a, b, c in zip(rest, square, cube, strict=True)]


def log_of_path(x):
    """Chen's identity, one piece after the other."""
    return logarithm(functools.reduce(times, map(exponential, np.diff(x.numpy(), axis=0))))


def bracket(word, channels):
    if len(word) == 1:
        letter = zero(channels)
        letter[1][word] = 1.0
        return letter
    u, v = (bracket(factor, channels) for factor in standard_factors(word))
    return minus(times(u, v), times(v, u))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("length", "channels"), [(2, 3), (9, 1), (9, 2), (6, 4)])
def test_words_are_coefficients_in_the_tensor_algebra(depth, length, channels):
    x = points(length, channels)
    log = log_of_path(x)
    expected = [log[len(word)][word] for word in lyndon_words(channels, depth)]
    torch.testing.assert_close(logsignature(x, depth), torch.tensor(expected, dtype=x.dtype), **EXACT)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("length", "channels"), [(2, 3), (9, 1), (9, 2), (6, 4)])
def test_brackets_add_up_to_the_logarithm(depth, length, channels):
    x = points(length, channels)
    coordinates = logsignature(x, depth, basis="brackets").tolist()
    brackets = [bracket(word, channels) for word in lyndon_words(channels, depth)]
    total = [sum(c * b[k] for c, b in zip(coordinates, brackets, strict=True)) for k in range(4)]
    for level in range(1, depth + 1):
        np.testing.assert_allclose(total[level], log_of_path(x)[level], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("channels", "depth", "number"), [(1, 3, 1), (2, 3, 5), (3, 2, 6), (3, 3, 14), (5, 3, 55)])
def test_the_number_of_words_is_that_of_witt(channels, depth, number):
    words = lyndon_words(channels, depth)
    assert len(words) == number
    assert list(words) == sorted(words, key=lambda word: (len(word), word))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_samples_are_independent(depth):
    x = points(2, 3, 7, 3)
    together = logsignature(x, depth)
    apart = torch.stack([logsignature(one, depth) for one in x.flatten(0, 1)]).unflatten(0, (2, 3))
    torch.testing.assert_close(together, apart, **EXACT)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("basis", ["words", "brackets"])
def test_gradients_are_exact(depth, basis):
    x = points(5, 3).requires_grad_()
    torch.autograd.gradcheck(lambda x: logsignature(x, depth, basis=basis), x)


def test_gaps_are_bridged_at_their_times():
    x, t = points(3, 6, 2), torch.tensor([0.0, 1.0, 1.5, 3.0, 3.1, 4.0], dtype=torch.float64)
    x[:, 2, 0], x[:, 5, 1] = math.nan, math.nan
    filled = LinearPath(x, t).evaluate(t)
    torch.testing.assert_close(logsignature(x, 3, t=t), logsignature(filled, 3), **EXACT)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    ("windows", "ends"),
    [
        (2.0, [0.0, 2.0, 4.0, 5.0]),
        (1.25, [0.0, 1.25, 2.5, 3.75, 5.0]),
        (7.0, [0.0, 5.0]),
        (0.4, [0.4 * i for i in range(13)] + [5.0]),
        ([0.5, 0.7, 3.0, 4.9], [0.5, 0.7, 3.0, 4.9]),
    ],
)
def test_windows_are_cut_out_of_the_path(depth, windows, ends):
    x, t = points(2, 7, 3), torch.tensor([0.0, 0.3, 0.5, 2.0, 2.6, 4.9, 5.0], dtype=torch.float64)
    path = LinearPath(x, t)
    logs, times = window_logsignatures(x, depth, windows, t)
    np.testing.assert_allclose(times, ends, rtol=1e-15, atol=0)
    for i, (start, stop) in enumerate(itertools.pairwise(times)):
        inner = t[(t > start) & (t < stop)]
        piece = path.evaluate(torch.cat([start[None], inner, stop[None]]))
        torch.testing.assert_close(logs[:, i], logsignature(piece, depth), **EXACT)


def test_rounding_opens_no_extra_window():
    t = torch.linspace(
        0, 0.3, 4, dtype=torch.float64
    )  # 0.3 / 0.1 is 2.9999999999999996, and 0.7 / 0.1 is 6.999999999999999
    assert window_logsignatures(points(4, 2), 2, 0.1, t)[0].shape == (3, 3)
    assert window_logsignatures(points(4, 2), 2, 0.1, t + 0.8)[0].shape == (3, 3)  # here the quotient is above 3


class Signatory:
    """The two functions that torchcde takes from signatory, which no longer installs."""

    @staticmethod
    def logsignature_channels(channels, depth):
        return len(lyndon_words(channels, depth))

    @staticmethod
    def Logsignature(depth):
        return lambda x: logsignature(x, depth)


@pytest.mark.parametrize("window_length", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("missing", [0, 0.2])
def test_windowed_path_is_that_of_torchcde(window_length, missing, monkeypatch):
    x = points(3, 12, 2)
    x[:, 1:][torch.rand(3, 11, 2) < missing] = math.nan
    monkeypatch.setattr(torchcde.log_ode, "signatory", Signatory)
    ours, theirs = logsig_windows(x, 3, window_length), torchcde.logsig_windows(x, 3, window_length)
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, [5, 12]])
def test_the_path_moves_by_one_log_signature_per_window(depth, lengths):
    x = points(2, 12, 3)
    path = LogSignaturePath(x, depth, 2.5, lengths=lengths)
    logs, times = window_logsignatures(x, depth, 2.5, lengths=lengths, basis="brackets")
    assert path.grid_points.equal(times)
    assert path.increments(times).equal(logs.movedim(-2, 0))
    assert path.increment(2.5, 5.0).equal(logs[:, 1])
    torch.testing.assert_close(path.derivative(6.0), logs[:, 2] / 2.5, **EXACT)
    torch.testing.assert_close(path.evaluate(7.5)[:, :3], LinearPath(x, lengths=lengths).evaluate(7.5), **EXACT)
    assert path.jump_times.equal(times[1:-1])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_windows_are_differentiable_in_data_and_times(depth):
    x, t = points(2, 6, 2), torch.tensor([0.0, 0.3, 0.9, 2.0, 2.6, 3.2], dtype=torch.float64)

    def answers(x, t):
        path = LogSignaturePath(x, depth, 0.7, t)
        return path.evaluate(1.0), path.derivative(2.0), path.increments(path.grid_points)

    torch.autograd.gradcheck(answers, [x.requires_grad_(), t.requires_grad_()])


@pytest.mark.parametrize(
    ("depth", "windows", "basis", "message"),
    [
        (0, 1.0, "words", "depth must be 1, 2 or 3, but it is 0"),
        (4, 1.0, "words", "but it is 4"),
        (2, 1.0, "hall", "'words' or 'brackets', but it is 'hall'"),
        (2, 0.0, "words", "must be positive, but it is 0.0"),
        (2, math.nan, "words", "must be positive, but it is nan"),
        (2, [0.0, 2.0, 1.0], "words", r"increasing times \(number \+ 1,\), but they are \[0.0, 2.0, 1.0\]"),
        (2, [1.0], "words", r"but they are \[1.0\]"),
        (2, [1.0, 5.0], "words", r"reach from 1.0 to 5.0, outside the data's times \[0.0, 3.0\]"),
    ],
)
def test_unsuitable_arguments_are_refused(depth, windows, basis, message):
    with pytest.raises(ValueError, match=message):
        window_logsignatures(torch.zeros(4, 2), depth, windows, basis=basis)
