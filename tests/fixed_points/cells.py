"""Contracting maps that the tests iterate, and how their gradients are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revsolve import fixed_point


class Dense(nn.Module):
    """z -> tanh(A z + x), with A of spectral norm `norm`."""

    def __init__(self, width: int = 6, norm: float = 0.8) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)
        with torch.no_grad():
            self.map.weight.mul_(norm / torch.linalg.matrix_norm(self.map.weight, 2))
        self.num_calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.num_calls += 1
        return torch.tanh(self.map(z) + x)


class Convolution(nn.Module):
    """The implicit ResNet cell: norm(relu(z + norm(x + conv(norm(relu(conv(z)))))))."""

    def __init__(self, channels: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(groups, channels) for _ in range(3)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second, last = self.norms
        h = second(x + self.outer(first(torch.relu(self.inner(z)))))
        return last(torch.relu(z + h))


def vector(tensors: Any) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def difference(found: Any, expected: Any) -> float:
    """Relative, over all tensors together."""
    a, b = vector(found), vector(expected)
    return ((a - b).norm() / b.norm()).item()


def gradients(f: Callable[..., Any], z0: Any, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Those of a number made of the fixed point with respect to `inputs`, some of which options may hold."""
    z = fixed_point(f, z0, **options)
    leaves = torch.utils._pytree.tree_leaves(z)
    loss = sum((leaf.abs().square() + leaf.real).sum() for leaf in leaves)
    return list(torch.autograd.grad(loss, inputs))
