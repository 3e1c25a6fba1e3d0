"""Counter-based Gaussian noise: a pure function of a seed and a place (index, node), so that none of it is stored."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """Scramble 64 bits one-to-one: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _integer(seed: SupportsIndex) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, but is {seed!r}: pass one, or None to draw it from torch.") from None


class Noise:
    """Standard normal rows of shape `size` at any place: one set for W and, where `areas` is set, one for H."""

    def __init__(
        self,
        seed: int | None,
        size: torch.Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
        source: torch.device,
        areas: bool,
    ) -> None:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        self.seed = _integer(seed)
        self.size, self.dtype, self.device, self.areas = size, dtype, device, areas
        self._generator = torch.Generator(source)

    def draw(self, num_rows: int, index: int, node: int) -> tuple[Tensor, Tensor | None]:
        """Return the noise of one place, each (num_rows, *size)."""
        place = _mix((self.seed + _GOLDEN * index) & _MASK)
        self._generator.manual_seed(_mix((place + _GOLDEN * node) & _MASK))
        return self._rows(num_rows), self._rows(num_rows) if self.areas else None

    def _rows(self, num_rows: int) -> Tensor:
        source = self._generator.device
        rows = torch.randn((num_rows, *self.size), generator=self._generator, dtype=self.dtype, device=source)
        return rows.to(self.device, non_blocking=True)
