"""Recording a solve as a CUDA graph: launches are written down, nothing is computed yet, so no number can be read."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def capturing() -> bool:
    """Whether work on the current stream is being captured. Then nothing is checked that takes numbers: the warm-up did that."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Draws(TorchDispatchMode):
    """Sees whether random numbers are drawn, where the generator's state cannot be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
