"""Counter-based random numbers: normal tensors as a pure function of a seed and a counter, so that none of them is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """Scramble 64 bits one-to-one: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class CounterRNG:
    """Standard normal rows of shape `size` for any counter (index, node): one set for W and, where `areas` is set, one for H."""

    seed: int
    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    source: torch.device  # where they are generated
    areas: bool

    def normal(self, num_rows: int, index: int, node: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows of one counter, each (num_rows, *size)."""
        # A generator of its own, because threads that shared one could seed it between another's seed and draw.
        generator = torch.Generator(self.source)
        mixed = _mix((self.seed + _GOLDEN * index) & _MASK)
        generator.manual_seed(_mix((mixed + _GOLDEN * node) & _MASK))
        return self._rows(num_rows, generator), self._rows(num_rows, generator) if self.areas else None

    def _rows(self, num_rows: int, generator: torch.Generator) -> Tensor:
        rows = torch.randn((num_rows, *self.size), generator=generator, dtype=self.dtype, device=self.source)
        return rows.to(self.device, non_blocking=True)
