"""The log-ODE field: brackets against matrices, gradients, and what more depth buys on rough paths."""

import itertools

import pytest
import torch
from torch import nn

from revsolve.paths.log_ode import LogODEField
from revsolve.paths.logsignature import LogSignaturePath, lyndon_words, standard_factors

NOW = torch.tensor(0.0, dtype=torch.float64)


def matrices(channels, hidden):
    return torch.randn(channels, hidden, hidden, dtype=torch.float64) / 2


def linear_field(matrices):
    return lambda t, z: torch.einsum("cij,...j->...ic", matrices, z)


def commutator(word, matrices):
    """For f_i(z) = A_i z, [f_i, f_j](z) = (A_j A_i - A_i A_j) z."""
    if len(word) == 1:
        return matrices[word[0]]
    u, v = (commutator(factor, matrices) for factor in standard_factors(word))
    return v @ u - u @ v


def mlp(hidden, channels):
    net = nn.Sequential(nn.Linear(hidden, 8), nn.Tanh(), nn.Linear(8, hidden * channels), nn.Tanh()).double()
    return net, lambda t, z: net(z).unflatten(-1, (hidden, channels))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_brackets_of_linear_fields_are_commutators(depth, channels, batch):
    a = matrices(channels, 3)
    z = torch.randn(*batch, 3, dtype=torch.float64)
    expected = [torch.einsum("ij,...j->...i", commutator(w, a), z) for w in lyndon_words(channels, depth)]
    # Three products of 3 x 3 matrices in double precision.
    torch.testing.assert_close(
        LogODEField(linear_field(a), depth)(NOW, z), torch.stack(expected, -1), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_field_can_be_differentiated(depth):
    net, func = mlp(3, 2)
    field = LogODEField(func, depth)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*net.named_parameters(), strict=True)

    def value(z, *parameters):
        override = dict(zip(names, parameters, strict=True))
        replaced = lambda t, z: torch.func.functional_call(net, override, z).unflatten(-1, (3, 2))  # noqa: E731
        return LogODEField(replaced, depth)(NOW, z)

    torch.autograd.gradcheck(value, (z, *(p.detach().requires_grad_() for p in parameters)))
    gradients = torch.autograd.grad(field(NOW, z).sum(), [z, *parameters])  # parameters that are closed over
    expected = torch.autograd.grad(value(z, *parameters).sum(), [z, *parameters])
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def test_random_fields_are_refused():
    field = LogODEField(lambda t, z: nn.functional.dropout(z, 0.5).unsqueeze(-1).expand(6, 2), 2)
    with pytest.raises(RuntimeError, match="random"):
        field(NOW, torch.ones(6, dtype=torch.float64))


def rk4(func, z, steps):
    for _ in range(steps):
        k1 = func(z)
        k2 = func(z + k1 / (2 * steps))
        k3 = func(z + k2 / (2 * steps))
        k4 = func(z + k3 / steps)
        z = z + (k1 + 2 * k2 + 2 * k3 + k4) / (6 * steps)
    return z


def solve(func, increments, z, steps):
    for increment in increments:  # (batch, words)
        z = rk4(lambda z, dx=increment: (func(NOW, z) @ dx.unsqueeze(-1)).squeeze(-1), z, steps)
    return z


def test_more_depth_is_more_accurate_on_rough_paths():
    _, func = mlp(3, 2)
    fine = 256
    x = (torch.randn(64, fine + 1, 2, dtype=torch.float64) / fine**0.5).cumsum(-2)  # Brownian motion on [0, 1]
    z0 = torch.ones(64, 3, dtype=torch.float64)
    with torch.no_grad():
        reference = solve(func, x.diff(dim=-2).movedim(-2, 0), z0, steps=1)
        errors = []
        for depth, windows in itertools.product((1, 2, 3), (8, 32)):
            path = LogSignaturePath(x, depth, fine / windows)
            end = solve(LogODEField(func, depth), path.increments(path.grid_points), z0, steps=2)
            errors.append((end - reference).norm(dim=-1).mean().item())
    coarse, finer = errors[::2], errors[1::2]
    # Strong orders 1/2, 1 and 3/2 at window h = 1/8, up to constants that the fields' derivatives decide.
    assert coarse[1] < 0.5 * coarse[0]
    assert coarse[2] < 0.5 * coarse[1]
    # Four times as many windows reduce the error by 4^order, here with a margin of 1.6 for 64 paths.
    reduction = [a / b for a, b in zip(coarse, finer, strict=True)]
    assert all(r > 4**order / 1.6 for r, order in zip(reduction, (0.5, 1.0, 1.5), strict=True))


def test_unsuitable_depth_is_refused():
    with pytest.raises(ValueError, match="depth must be 1, 2 or 3, but it is 4"):
        LogODEField(linear_field(matrices(2, 2)), 4)
