"""How far a step goes, and how many of them may be undone: beta as the engine takes it, the pair's dtype, and the anchors.

A step undone divides by 1 - beta, twice. Its two eigenvalues for an eigenvalue of the Jacobian of f multiply to (1 - beta)**2, so
where the iteration converges no error grows faster than by (1 - beta)**-2 for a step undone, and attention blocks come close.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revsolve.core.arithmetic import Scalar, widest
from revsolve.prepare.state import Packing

# The share of the digits that undoing may cost between two anchors, where f computes as precisely as the pair is kept.
SHARE = 0.26
# A narrower f sees the same numbers again, but for the few so close to a boundary between two of its numbers that the pair's
# rounding moves them across; that change, of the size of f's rounding, then grows as well. In the root mean square it must stay
# this many times smaller than f's rounding, for gradients can be a thousand times as sensitive as states.
MARGIN = 32.0
SPARE_BITS = 13  # of the pair, for values of f that are smaller than others


def anchor_spacing(beta: Scalar, pair: torch.dtype, computed: torch.dtype, value: torch.dtype) -> int:
    """How many steps may be undone before rounding, multiplied by (1 - beta)**-2 in each, has cost too much: with a pair of this
    dtype, an f that computes in a second one, and values of f of a third.

    Raises:
        ValueError: dividing by 1 - beta once costs too much.
    """
    eps, own = torch.finfo(pair).eps, torch.finfo(computed).eps
    least = float((1.0 - beta.detach()).abs().min()) if isinstance(beta, Tensor) else abs(1.0 - beta)
    closest = (eps / own) ** (1 / 3) if own > eps else eps**SHARE
    if least < closest:
        raise ValueError(
            f"beta must not be {'1' if least == 0.0 else f'so near to 1, from which it is {least:.1e} away'}: undoing a step "
            f"divides by 1 - beta, which must be at least {closest:.1e} in {pair}. Move beta away from 1, say to 0.8, or use "
            "gradient='checkpoint'."
        )
    (fraction, exponent), exact = math.frexp(least), 0
    if fraction == 0.5 and not isinstance(beta, Tensor):  # 1 - beta = 2**-m costs 2 m bits a step, without any rounding
        exact = int((math.log2(torch.finfo(value).eps / eps) - SPARE_BITS) / (2 * (1 - exponent)))
    return max(exact, steps_undone(least**2, pair, computed))


def steps_undone(factor: float, pair: torch.dtype, computed: torch.dtype) -> int:
    """How many steps may be undone that multiply rounding by 1 / factor each; at least 1."""
    eps, own = torch.finfo(pair).eps, torch.finfo(computed).eps
    growth = math.sqrt(own / eps) / MARGIN if own > eps else eps**-SHARE
    return max(1, int(math.log(max(growth, 1.0)) / -math.log(factor)))


def pair_dtype_of(packing: Packing, wanted: torch.dtype | None) -> torch.dtype:
    """What the pair is kept in: wide enough to undo steps, complex if a lone state is."""
    given = packing.dtypes[0] if packing.lone else packing.real_dtype
    wide = wanted or widest(packing.device)
    if wide not in (torch.float32, torch.float64) or torch.finfo(wide).eps > torch.finfo(packing.real_dtype).eps:
        raise ValueError(
            f"pair_dtype must be torch.float32 or torch.float64 and no narrower than {packing.name} ({packing.real_dtype}), but "
            f"it is {wide}."
        )
    return torch.promote_types(wide, given) if given.is_complex else wide


def computed_dtype(packing: Packing) -> torch.dtype:
    """The dtype in which f computes."""
    kind = packing.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else packing.real_dtype


def packed_beta(beta: Any, packing: Packing, dtype: torch.dtype) -> Scalar:
    """beta as a number, or as a tensor that broadcasts against the packed state, of the real dtype of this one."""
    real = dtype.to_real() if dtype.is_complex else dtype
    leaves = tree_leaves(beta)
    smallest, largest = math.inf, -math.inf
    for b in leaves:
        if not (isinstance(b, (int, float)) or (isinstance(b, Tensor) and b.is_floating_point())):
            raise TypeError(f"beta must consist of numbers or real floating point tensors, but it holds {b!r}.")
        low, high = (float(e) for e in b.detach().aminmax()) if isinstance(b, Tensor) else (float(b), float(b))
        smallest, largest = min(smallest, low), max(largest, high)
    if not 0.0 < smallest <= largest < 2.0:
        raise ValueError(f"beta must lie in (0, 2), but it reaches from {smallest} to {largest}: 0.5 to 0.9 is usual.")
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor):
        return float(leaves[0])
    if packing.lone or (len(leaves) == 1 and leaves[0].ndim == 0):
        shape = packing.shapes[0] if packing.lone else torch.Size()
        if leaves[0].ndim > len(shape) or any(
            n not in (1, m) for n, m in zip(leaves[0].shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"beta of shape {tuple(leaves[0].shape)} does not broadcast against a state of shape {tuple(shape)}: one number "
                "a channel of images has shape (channels, 1, 1)."
            )
        return leaves[0].to(packing.device, real)
    return packing.spread(beta, "beta").to(real)
