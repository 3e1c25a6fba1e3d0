import pytest
import torch

from revsolve.brownian.increments import Increments, Partition, concatenate, remainder

LENGTHS = [[1.0, 1.0], [0.3, 1.7], [0.125] * 8, [1e-6, 2.0, 0.5]]


def unit_rows(num_rows, num_unknowns, first):
    """Rows that are coordinates: row i is unknown number first + i, as a linear form in the unknowns."""
    return torch.eye(num_unknowns, dtype=torch.float64)[first : first + num_rows]


def split_of_unknowns(lengths):
    """Parts of a random whole as linear forms in independent unit normals: 2 for the whole, 2 for each part."""
    h, n = sum(lengths), len(lengths)
    whole_W, whole_H = h**0.5 * unit_rows(1, 2 * n + 2, 0), (h / 12) ** 0.5 * unit_rows(1, 2 * n + 2, 1)
    like = torch.empty(0, 2 * n + 2, dtype=torch.float64)
    whole = Increments([h], whole_W, whole_H)
    noise = unit_rows(n, 2 * n + 2, 2), unit_rows(n, 2 * n + 2, 2 + n)
    return Partition.of(lengths, like).split(whole, *noise), whole


@pytest.mark.parametrize("lengths", LENGTHS)
def test_split_of_a_random_whole_has_the_law_of_independent_increments(lengths):
    parts, _ = split_of_unknowns(lengths)
    forms = torch.cat([parts.W, parts.H])
    variances = torch.tensor(lengths + [h / 12 for h in lengths], dtype=torch.float64)
    torch.testing.assert_close(forms @ forms.T, torch.diag(variances), rtol=1e-13, atol=1e-15)  # float64 rounding


@pytest.mark.parametrize("lengths", LENGTHS)
def test_parts_join_to_the_whole_they_were_split_from(lengths):
    parts, whole = split_of_unknowns(lengths)
    joined = parts.total()
    assert joined.lengths == pytest.approx(whole.lengths, rel=1e-15)
    torch.testing.assert_close(joined.W, whole.W, rtol=0, atol=1e-14)
    torch.testing.assert_close(joined.H, whole.H, rtol=0, atol=1e-14)


def test_without_areas_the_split_is_the_brownian_bridge():
    lengths, h = [0.25, 0.5, 0.25], 1.0
    like = torch.empty(0, 3, dtype=torch.float64)
    bridge = Partition.of(lengths, like).split(Increments([h], torch.zeros(1, 3), None), unit_rows(3, 3, 0), None)
    points = bridge.W.cumsum(0)[:-1]
    torch.testing.assert_close(points @ points.T, torch.tensor([[3 / 16, 1 / 16], [1 / 16, 3 / 16]]).double())
    assert bridge.H is None


@pytest.mark.parametrize("split_at", [1, 7, 63])
def test_joined_area_is_the_integral_of_a_piecewise_linear_path(split_at):
    """A linear piece has no area; the integral of a piecewise linear path is the trapezoidal sum."""
    h, dW = torch.rand(64, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    increments = Increments(h.tolist(), dW, torch.zeros_like(dW))
    W = torch.cat([torch.zeros(1, 3, dtype=torch.float64), dW.cumsum(0)])
    expected = (h[:, None] * (W[1:] + W[:-1]) / 2).sum(0) / h.sum() - W[-1] / 2
    regrouped = concatenate([increments.slice(0, split_at).total(), increments.slice(split_at, 64).total()]).total()
    torch.testing.assert_close(increments.total().H[0], expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(regrouped.H[0], expected, rtol=1e-13, atol=1e-13)


def test_turning_increments_round_flips_increments_and_keeps_areas():
    lengths, W, H = [0.2, 0.7, 0.1], torch.randn(3, 5).double(), torch.randn(3, 5).double()
    forth, back = Increments(lengths, W, H).total(), Increments(lengths[::-1], -W.flip(0), H.flip(0)).total()
    torch.testing.assert_close(back.W, -forth.W, rtol=0, atol=1e-15)
    torch.testing.assert_close(back.H, forth.H, rtol=0, atol=1e-15)


@pytest.mark.parametrize("x", [0.0, 0.1, 0.9])
def test_remainder_undoes_joining(x):
    first = Increments([x], torch.randn(1, 5).double(), torch.randn(1, 5).double())
    second = Increments([1 - x], torch.randn(1, 5).double(), torch.randn(1, 5).double())
    rest = remainder(concatenate([first, second]).total(), first)
    torch.testing.assert_close(rest.W, second.W, rtol=0, atol=1e-14)
    torch.testing.assert_close(rest.H, second.H, rtol=0, atol=1e-13)  # divided by 1 - x = 0.1
