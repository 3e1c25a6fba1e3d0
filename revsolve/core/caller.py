"""Warnings that name the line of the user's call, not one of ours."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path

import torch

OURS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line outside of this package and torch."""
    if torch.compiler.is_compiling():
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
