import math

import pytest
import torch
import torchsde
from scipy import stats

from revsolve.brownian.path import BrownianPath
from revsolve.compat.torchsde import as_brownian

SIZE = (1024, 4)


def interval(levy_area="space-time", dtype=torch.float64):
    return torchsde.BrownianInterval(0.0, 1.0, SIZE, dtype=dtype, entropy=3, dt=0.1, levy_area_approximation=levy_area)


FOREIGN = {
    "interval": interval,
    "path": lambda: torchsde.BrownianPath(0.0, torch.zeros(SIZE, dtype=torch.float64)),
    "tree": lambda: torchsde.BrownianTree(0.0, torch.zeros(SIZE, dtype=torch.float64), entropy=3),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_increments_in_both_directions(make):
    bm = make()
    path = as_brownian(bm)
    W = path(0.2, 0.5)
    assert torch.equal(W, bm(0.2, 0.5))
    assert torch.equal(path(0.5, 0.2), -W)
    assert torch.equal(path(0.3, 0.3), torch.zeros_like(W))
    assert (path.shape, path.dtype, path.device, path.t0, path.t1) == (W.shape, W.dtype, W.device, 0.0, 1.0)


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_ends_are_clamped_without_a_warning(make):
    path = as_brownian(make())
    assert torch.equal(path(-1e-16, math.nextafter(1.0, 2.0)), path(0.0, 1.0))


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_time_outside_a_foreign_path_is_refused(make):
    with pytest.raises(ValueError, match=r"asked at t = 1.5, outside the path's interval \[0.0, 1.0\]"):
        as_brownian(make())(0.5, 1.5)


@pytest.mark.parametrize("levy_area", ["space-time", "davie", "foster"])
def test_foreign_areas_have_our_convention(levy_area):
    """The integral of the path decides: a sum over n pieces misses only an area of variance h / (12 n^2)."""
    num_pieces, h = 32, 0.5
    path = as_brownian(interval(levy_area), area=True)
    W, H = path(0.2, 0.2 + h, return_H=True)
    W_back, H_back = path(0.2 + h, 0.2, return_H=True)
    points = torch.stack([path(0.2, 0.2 + h * n / num_pieces) for n in range(num_pieces + 1)])
    missed = H - (torch.trapezoid(points, dim=0) / num_pieces - W / 2)
    assert stats.kstest(missed.flatten() / math.sqrt(h / 12) * num_pieces, "norm").pvalue > 1e-3
    assert stats.kstest(H.flatten() / math.sqrt(h / 12), "norm").pvalue > 1e-3
    assert torch.equal(W_back, -W)
    assert torch.equal(H_back, H)


def test_an_empty_foreign_span_is_zero():
    W, H = as_brownian(interval())(0.3, 0.3, return_H=True)
    assert torch.equal(torch.stack([W, H]), torch.zeros(2, *SIZE, dtype=torch.float64))


def test_own_and_adapted_paths_pass_through():
    own, adapted = BrownianPath(0.0, 1.0, (3,), levy_area="space-time"), as_brownian(interval())
    assert as_brownian(own, area=True) is own
    assert as_brownian(adapted, area=True) is adapted


@pytest.mark.parametrize("bm", [interval("none"), BrownianPath(0.0, 1.0, (3,))], ids=["foreign", "own"])
def test_a_wanted_area_is_refused_by_a_path_without(bm):
    with pytest.raises(ValueError, match=r'levy_area="space-time".*levy_area_approximation="space-time"'):
        as_brownian(bm, area=True)
    with pytest.raises(ValueError, match='levy_area="space-time"'):
        as_brownian(bm)(0.1, 0.2, return_H=True)


@pytest.mark.parametrize("bm", [3.0, torch.zeros(3), lambda ta, tb: torch.zeros(3)])
def test_what_is_no_brownian_motion_is_refused(bm):
    with pytest.raises(TypeError, match=r"bm is a \w+ without .*levy_area_approximation: pass a revsolve.BrownianPath"):
        as_brownian(bm)


class Duck:
    """Called like a path of torchsde, with answers that a test chooses."""

    shape, dtype, device, levy_area_approximation = (2, 3), torch.float64, "cpu", "space-time"

    def __init__(self, W, U=None, area="space-time"):
        self.W, self.U, self.levy_area_approximation = W, U, area

    def __call__(self, ta, tb, return_U=False):
        return (self.W, self.U) if return_U else self.W


GOOD = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("bm", "found"),
    [
        (Duck(torch.ones(2, 4, dtype=torch.float64)), r"torch.float64, shape \(2, 4\)"),
        (Duck(torch.ones(2, 3)), r"torch.float32, shape \(2, 3\)"),
        (Duck((GOOD, GOOD)), "tuple"),
        (Duck(GOOD, GOOD[:1]), r"torch.float64, shape \(1, 3\)"),
    ],
)
def test_increments_that_are_not_what_the_path_says_are_refused(bm, found):
    says = r"torch.float64, shape \(2, 3\): a Duck must answer"
    with pytest.raises(ValueError, match=f"bm returned {found}, but says that it has {says}"):
        as_brownian(bm)(0.0, 0.5, return_H=bm.U is not None)


def test_an_unknown_area_is_refused():
    with pytest.raises(ValueError, match=r"must be one of none, space-time, davie, foster, but is 'exact'"):
        as_brownian(Duck(GOOD, area="exact"))


def test_correlated_channels_are_explained():
    with pytest.raises(TypeError, match=r"For correlated channels, .* multiply the diffusion by L"):
        as_brownian(lambda ta, tb: GOOD)
