"""Random fields compiled by inductor itself: the states and gradients are those without programs, whatever it fuses.

Most tests of compiled solves run recordings operation by operation; faults of the compiler show here alone. Sizes lie on both
sides of that from which products of matrices are handed to a library.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.backends.test_compiled import needs_compiler, quiet
from tests.front_doors import DOORS

NUM_EXAMPLES = 24  # of some 20 seconds each, nearly all of which is the compiler's
# In float32 what is undone carries roundings that a relaxation by half multiplies by 4 in each of its 5 steps.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}

pytestmark = [pytest.mark.slow, needs_compiler, quiet]

PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x @ w + b": lambda x, w, b: x @ w + b,
    "linear": lambda x, w, b: F.linear(x, w.T, b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w, alpha=0.5, beta=2.0),
    "einsum": lambda x, w, b: torch.einsum("bd,dh->bh", x, w) + b,
    "bmm": lambda x, w, b: torch.bmm(x.unsqueeze(1), w.expand(len(x), *w.shape)).squeeze(1) + b,
    "weighted": lambda x, w, b: torch.add(b, x @ w, alpha=0.3),
    "subtracted": lambda x, w, b: torch.sub(b, x @ w, alpha=0.3),
    "outer": lambda x, w, b: (x.unsqueeze(-1) * w).sum(-2) + b,
    "rows": lambda x, w, b: torch.stack([w.T.mv(x[0])] * len(x)) + x @ w + b,
}
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "batch norm": lambda x: (x - x.mean(0)) / (x.var(0, unbiased=False) + 0.1).sqrt(),
    "norm": lambda x: x / (1 + x.norm(dim=-1, keepdim=True)),
    "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
    "cumulative sum": lambda x: x.cumsum(-1) / x.shape[-1],
    "roll": lambda x: x.roll(1, -1),
    "flip": lambda x: x.flip(-1),
    "sort": lambda x: x.sort(-1).values,
    "joined": lambda x: torch.cat([x[..., 1:], x[..., :1]], -1),
    "larger": lambda x: torch.maximum(x, x.mean(-1, keepdim=True)),
    "where": lambda x: torch.where(x > 0, x, -0.5 * x),
    "made of numbers": lambda x: x * torch.tensor([1.5], dtype=x.dtype) + torch.tensor(0.1, dtype=x.dtype),
    "made by torch": lambda x: x * torch.linspace(0.5, 1.0, x.shape[-1], dtype=x.dtype) + 0.1 * torch.ones_like(x[0]),
    "in place": lambda x: x.clone().mul_(0.5).add_(x.sin(), alpha=0.2),
}
METHODS = {
    "odeint": ["rev_euler", "rev_bosh3", "rev_rk4", "reversible_heun", "alf", "alf4", "leapfrog", "rk4"],
    "sdeint": ["reversible_heun", "rev_midpoint", "rev_heun2"],
    "cdeint": ["reversible_heun", "rev_midpoint", "rk4"],
    "fixed_point": [None],
}
methods = st.sampled_from(list(DOORS)).flatmap(lambda door: st.tuples(st.just(door), st.sampled_from(METHODS[door])))


class Field(nn.Module):
    """Two products with maps around them, and some decay."""

    def __init__(self, dim: int, width: int, product: str, maps: list[str]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, dim)
        self.product, self.inner, self.outer = PRODUCTS[product], *(MAPS[name] for name in maps)

    def forward(self, y: Tensor) -> Tensor:
        hidden = self.inner(self.product(y, self.first.weight.T, self.first.bias))
        return 0.5 * self.outer(self.last(hidden)) - 0.3 * y


@settings(
    max_examples=NUM_EXAMPLES,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # each step of shrinking would compile, too
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    methods,
    st.sampled_from(["auto", None, 3]),
    st.sampled_from([None, "checkpoint"]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([1, 2, 5, 40]),
    st.sampled_from([1, 3, 17, 64]),
    st.sampled_from([4, 33, 48]),
    st.sampled_from(list(PRODUCTS)),
    st.lists(st.sampled_from(list(MAPS)), min_size=2, max_size=2),
)
def test_compiled_by_inductor(
    solve: tuple[str, str | None],
    restarts: Any,
    gradient: str | None,
    dtype: torch.dtype,
    dim: int,
    batch: int,
    width: int,
    product: str,
    maps: list[str],
) -> None:
    torch.manual_seed(0)
    (door, method), field = solve, Field(dim, width, product, maps).to(dtype)
    y0 = torch.randn(batch, dim, dtype=dtype, requires_grad=True)
    way: dict[str, Any] = {"gradient": gradient}
    if method is not None:
        way |= {"method": method} | ({} if method == "rk4" else {"restarts": restarts})
    inputs, found = [y0, *field.parameters()], []
    for compiled in (False, True):
        torch.manual_seed(1)
        ys = DOORS[door](field, y0, compile=compiled, **way)
        found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), inputs, materialize_grads=True)])
    assert max(map(apart, *found)) < TOLERANCE[dtype]


def apart(x: Tensor, wanted: Tensor) -> float:
    """Relative, or absolute where both are small: gradients that are zero but for rounding."""
    return float((x - wanted).norm() / (wanted.norm() + 1e-2))
