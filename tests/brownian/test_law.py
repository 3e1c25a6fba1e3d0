"""The law of a Brownian path: marginals, independence, refinements, areas."""

import itertools
import math

import pytest
import torch
from scipy import stats

from revsolve.brownian.path import BrownianPath

NUM_SAMPLES = 8192
AREA = "space-time"
GRIDS = {
    "tree": {},
    "grid": {"dt": 0.1},
    "many blocks": {"dt": 2**-8},
    "uneven": {"grid": [0.0, 0.1, 0.15, 0.7, 1.0]},
    "grid finer than tol": {"dt": 0.1, "tol": 0.2},
    "coarse leaves": {"tol": 0.01},
}
SPANS = {
    "everything": (0.0, 1.0),
    "a step": (0.1, 0.2),
    "inside a step": (0.11, 0.142),
    "across knots": (0.03, 0.77),
    "short": (0.5, 0.5 + 1e-5),
    "to a knot": (0.612, 0.7),
}
# The seeds are fixed: a p-value under 1e-3 in a handful of dozens of tests would still mean a wrong law.
MIN_P = 1e-3

# Spans wider than the tolerance, for which the law is promised.
LAWS = [(kind, *span) for kind in GRIDS for span in SPANS.values() if span[1] - span[0] > GRIDS[kind].get("tol", 0)]


def sampled(kind, **options):
    """A path of independent samples, so that one query tests its law."""
    return BrownianPath(0.0, 1.0, (NUM_SAMPLES,), seed=5, levy_area=AREA, **GRIDS[kind], **options)


def assert_normal(x, variance):
    assert stats.kstest(x.double() / math.sqrt(variance), "norm").pvalue > MIN_P


def assert_uncorrelated(rows):
    """Correlations of independent samples are about N(0, 1/n); five deviations leave room for all pairs."""
    off_diagonal = torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows), dtype=torch.float64)
    assert off_diagonal.abs().max() < 5 / math.sqrt(NUM_SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "ta", "tb"), LAWS)
def test_increments_and_areas_have_their_law(kind, ta, tb, dtype):
    W, H = sampled(kind, dtype=dtype)(ta, tb, return_H=True)
    assert W.dtype == H.dtype == dtype
    assert_uncorrelated([W, H])
    assert_normal(W, tb - ta)
    assert_normal(H, (tb - ta) / 12)


@pytest.mark.parametrize("kind", ["tree", "grid", "many blocks", "uneven"])
def test_disjoint_spans_are_independent(kind):
    path = sampled(kind)
    knots = [0.0, 0.1, 0.15, 0.150001, 0.152, 0.4, 0.7, 0.93, 1.0]
    assert_uncorrelated([x for ta, tb in itertools.pairwise(knots) for x in path(ta, tb, return_H=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.21, 0.5, 0.7321])
@pytest.mark.parametrize("kind", ["tree", "grid", "uneven", "coarse leaves"])
def test_a_refinement_has_the_conditional_law(kind, u, dtype):
    """Given W and H of the whole, W up to the fraction p is normal about a parabola (Foster et al. 2020)."""
    s, t = 0.05, 0.95
    p = (u - s) / (t - s)
    path = sampled(kind, dtype=dtype)
    W, H = path(s, t, return_H=True)
    part = path(s, u)
    residual = part - (p * W + 6 * p * (1 - p) * H)
    assert_normal(residual, (t - s) * (p * (1 - p) - 3 * (p * (1 - p)) ** 2))
    assert_uncorrelated([residual, W, H])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_area_is_the_integral_of_the_path(dtype):
    """A sum over n pieces misses only the pieces' own areas, of variance h / (12 n^2)."""
    num_pieces, h = 64, 0.6
    path = sampled("grid", dtype=dtype)
    W, H = path(0.2, 0.2 + h, return_H=True)
    points = torch.stack([path(0.2, 0.2 + h * n / num_pieces) for n in range(num_pieces + 1)])
    mean = torch.trapezoid(points, dim=0) / num_pieces
    assert_normal(H - (mean - W / 2), h / (12 * num_pieces**2))
