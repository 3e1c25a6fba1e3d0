"""The field of the log-ODE method: a CDE's vector fields and their iterated Lie brackets, side by side.

For dz = sum_i f_i(z) dX^i the flow over a window is close to that of dz/ds = sum_w [f_w](z) logsig_w for unit time,
where w runs over Lyndon words and [f_uv] = [f_u, f_v] = Df_v f_u - Df_u f_v. See Gaines & Lyons (1997), Boutaib et al.
(2014), and Morrill et al., "Neural rough differential equations for long time series" (2021).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from revsolve.paths.logsignature import check_depth, lyndon_words, standard_factors


@dataclass(frozen=True)
class LogODEField:
    """A field (t, z) -> (..., hidden, words) made from `func`, for a `LogSignaturePath` of the same depth.

    The columns are the brackets of the Lyndon words, in the order of `lyndon_words`: f_0, ..., f_{c-1}, [f_0, f_1], ...
    Derivatives of `func` along its own columns are forward-mode (`torch.func.jvp`), all at once, and can themselves be
    differentiated. Depth 2 takes c of them, depth 3 c (c - 1) / 2 more and c through the brackets of depth 2.

    Args:
        func: (t, z) -> (..., hidden, channels) for z of shape (..., hidden). Within a window it is taken at frozen t:
            let it depend on time through a channel of the path. It must not be random, as its values and derivatives
            would belong to different draws.
        depth: 1, 2 or 3.

    Raises:
        ValueError: depth not among these.
        RuntimeError: `func` draws random numbers, or has no forward-mode derivative (says torch).

    Example:
        >>> field = LogODEField(lambda t, z: torch.stack([torch.ones_like(z), z], -1), depth=2)
        >>> field(torch.tensor(0.0), torch.tensor([3.0]))
        tensor([[1., 3., 1.]])
    """

    func: Callable[[Tensor, Tensor], Tensor]
    depth: int = 2

    def __post_init__(self) -> None:
        check_depth(self.depth)

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """The fields and brackets at z, (..., hidden, words)."""

        def field(z: Tensor) -> Tensor:
            return self.func(t, z)

        if self.depth == 1:
            return field(z)
        _load_forward_mode()
        return _with_pairs(field, z) if self.depth == 2 else _with_triples(field, z)


@cache
def _load_forward_mode() -> None:
    """Start torch's forward mode, which warns at first use of a deprecation inside torch that no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # its kind from torch 2.15 on
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def _with_pairs(field: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    f = field(z)
    if f.shape[-1] == 1:
        return f  # a single field commutes with itself
    along = _derivatives_along(field, z, f)
    i, j = torch.triu_indices(f.shape[-1], f.shape[-1], 1, device=z.device)  # the Lyndon words of length 2
    return torch.cat([f, along[..., i, j] - along[..., j, i]], -1)


def _with_triples(field: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    def lower(z: Tensor) -> Tensor:
        return _with_pairs(field, z)

    columns = lower(z)
    letters = field(z).shape[-1]
    if letters == 1:
        return columns
    words = lyndon_words(letters, 3)
    position = {word: n for n, word in enumerate(words)}
    factors = [standard_factors(word) for word in words if len(word) == 3]
    letter = torch.tensor([position[min(uv, key=len)] for uv in factors], dtype=torch.long, device=z.device)
    pair = torch.tensor([position[max(uv, key=len)] for uv in factors], dtype=torch.long, device=z.device)
    sign = torch.tensor([1 if len(u) == 1 else -1 for u, _ in factors], device=z.device, dtype=z.dtype)
    along_letters = _derivatives_along(lower, z, columns[..., :letters])
    along_pairs = _derivatives_along(field, z, columns[..., letters:])
    brackets = along_letters[..., letter, pair] - along_pairs[..., pair - letters, letter]
    return torch.cat([columns, sign * brackets], -1)


def _derivatives_along(field: Callable[[Tensor], Tensor], z: Tensor, directions: Tensor) -> Tensor:
    """The columns of `field` differentiated along each of `directions`: (..., hidden, directions, columns)."""

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(field, (z,), (direction,))[1]

    return torch.func.vmap(along, out_dims=-2)(directions.movedim(-1, 0))
