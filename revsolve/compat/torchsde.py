"""Brownian motions of other packages behind the interface of `BrownianPath`."""

from __future__ import annotations

import math
import threading
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from revsolve.brownian.path import BrownianPath, clamped, require_area
from revsolve.field.functorch import outside, transformed

_ATTRIBUTES = ("__call__", "shape", "dtype", "device", "levy_area_approximation")
_AREAS = ("none", "space-time", "davie", "foster")
_LOCKS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the id of the path, one for all its wrappers
_MAKING = threading.Lock()


class ForeignBrownian:
    """A torchsde path that is asked like a `BrownianPath`: both directions, rounded end times, H instead of U, any thread.

    torchsde's U is the integral of W_r - W_ta over the interval, hence H = U/h - W/2.
    """

    def __init__(self, bm: Any) -> None:
        self.bm = bm
        with _MAKING:  # two threads would each make one
            self._lock = _LOCKS.setdefault(id(bm), threading.RLock())  # because a query changes the path's tree
        self.shape, self.dtype, self.device = torch.Size(bm.shape), bm.dtype, torch.device(bm.device)
        if bm.levy_area_approximation not in _AREAS:
            raise ValueError(
                f"bm.levy_area_approximation must be one of {', '.join(_AREAS)}, but is {bm.levy_area_approximation!r}."
            )
        self.levy_area = "none" if bm.levy_area_approximation == "none" else "space-time"
        interval = getattr(bm, "_interval", bm)  # BrownianPath and BrownianTree wrap a BrownianInterval
        self.t0, self.t1 = getattr(interval, "_start", -math.inf), getattr(interval, "_end", math.inf)

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        return ForeignBrownian, (self.bm,)

    def __call__(self, ta: float, tb: float, return_H: bool = False) -> Any:
        """Return W(tb) - W(ta), or (W, H), of shape `shape`; ValueError outside [t0, t1] or without H."""
        if transformed():  # what the path keeps must belong to no torch.func transform
            with outside():
                return self(ta, tb, return_H)
        if return_H:
            require_area(self)
        a, b = (clamped(t, self.t0, self.t1, self.dtype) for t in (ta, tb))
        low, high = min(a, b), max(a, b)
        with self._lock:
            W, U = self.bm(low, high, return_U=True) if return_H else (self.bm(low, high), None)
        self._check(W)
        directed = W if a <= b else -W
        if U is None:
            return directed
        self._check(U)
        return directed, U / (high - low) - W / 2 if low < high else U

    def _check(self, answer: Any) -> None:
        if not isinstance(answer, Tensor) or (answer.shape, answer.dtype) != (self.shape, self.dtype):
            found = (
                f"{answer.dtype}, shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            )
            raise ValueError(
                f"bm returned {found}, but says that it has {self.dtype}, shape {tuple(self.shape)}: a {type(self.bm).__name__} "
                "must answer bm(ta, tb) with W, and bm(ta, tb, return_U=True) with (W, U), of its own shape and dtype."
            )


def as_brownian(bm: Any, *, area: bool = False) -> BrownianPath | ForeignBrownian:
    """A Brownian motion that answers `bm(ta, tb)` and `bm(ta, tb, return_H=True)` in both directions.

    A `BrownianPath` as it is; paths of torchsde (Kidger, Foster, Li and Lyons 2021), and what is called alike and has their
    attributes, adopted. Raises TypeError for anything else, ValueError where an `area` is wanted of a path without.
    """
    if isinstance(bm, (BrownianPath, ForeignBrownian)):
        path = bm
    else:
        missing = [name for name in _ATTRIBUTES if not hasattr(bm, name)]
        if missing:
            raise TypeError(
                f"bm is a {type(bm).__name__} without {', '.join(missing)}: pass a revsolve.BrownianPath or a Brownian motion of "
                "torchsde. For correlated channels, pass one with independent channels and multiply the diffusion by L, where "
                "L L^T is the covariance of the noise."
            )
        path = ForeignBrownian(bm)
    if area:
        require_area(path)
    return path
