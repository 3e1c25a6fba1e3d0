"""The divergence of a field along its solution, for continuous normalizing flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

TRACES = ("exact", "rademacher", "gaussian")


def with_divergence(
    func: Callable[..., Tensor], x: Tensor, trace: str = "exact", num_samples: int = 1
) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Extend `dx/dt = func(t, x)` by the integral of its divergence, `dl/dt = tr(d func / dx)` with l = 0 at the start.

    Where x follows the field, its log-density changes by `log p(x(t0)) = log p(x(t1)) + l(t1)`: Chen, Rubanova, Bettencourt &
    Duvenaud (2018, arXiv 1806.07366). The unbiased estimates of the trace follow Hutchinson (1990), with noise
    that is fixed for the whole solve as in FFJORD (Grathwohl and others 2019, arXiv 1810.01367).

    Args:
        func: the field, any callable `func(t, x, *args)` that treats the samples of a batch independently.
        x: the initial state, shape (batch, ...), real.
        trace: "exact", which takes one vector-Jacobian product for each entry of a sample, all in one vectorised call;
            "rademacher" (noise of signs) or "gaussian": estimates `e^T (d func / dx) e`, one product each.
        num_samples: how many estimates are averaged.

    Returns:
        The extended field, and its initial state `(x, zeros of shape (batch,))`: the first two arguments of `odeint`. Estimates
        draw their noise here, so call this anew before each solve. torch.func, which it uses, refuses
        hooks on saved tensors (`save_on_cpu`).

    Raises:
        TypeError: for an x that is no tensor.
        ValueError: for an x without a batch, or complex; for an unknown trace; for samples of an exact trace.

    Example:
        >>> import torch
        >>> from revsolve import odeint, with_divergence
        >>> field, start = with_divergence(lambda t, x: -2 * x, torch.ones(4, 3))
        >>> x, l = odeint(field, start, torch.tensor([0.0, 1.0]))
        >>> l[-1]
        tensor([-6.0000, -6.0000, -6.0000, -6.0000])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (batch, ...), but it is a {type(x).__name__}.")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be real, of shape (batch, ...), but it is {x.dtype} of shape {tuple(x.shape)}.")
    if trace not in TRACES:
        raise ValueError(f"trace={trace!r} is unknown: choose one of {', '.join(map(repr, TRACES))}.")
    if num_samples < 1 or (trace == "exact" and num_samples > 1):
        raise ValueError(
            f'num_samples={num_samples} with trace="{trace}": estimates take one or more, an exact trace one.'
        )
    probes = _probes(x, trace, num_samples)

    def field(t: Tensor, state: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        value, product, *_ = vjp(lambda x: func(t, x, *args), state[0])
        return value, vmap(lambda e: (product(e)[0] * e).flatten(1).sum(1))(probes).sum(0)

    return field, (x, x.new_zeros(len(x)))


def _probes(x: Tensor, trace: str, num_samples: int) -> Tensor:
    """Vectors e, (probes, *x.shape), over which the sum of `e^T J e` is the trace or its estimate."""
    if trace == "exact":
        one = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])
        return one.expand(-1, *x.shape)
    noise = torch.randn(num_samples, *x.shape, dtype=x.dtype, device=x.device)
    return (noise.sign() if trace == "rademacher" else noise) / num_samples**0.5
