"""The one mutable part of a Brownian path."""

import threading
from typing import Any

from torch import Tensor


class ThreadCache(threading.local):
    """The latest results of each thread.

    Threads that share a path share no results, so that none meets another's changes halfway and none waits for a lock.
    A copy starts empty.
    """

    latest: tuple[Any, ...] = ()

    def keep(self, made: Tensor, *latest: Any) -> None:
        """Keep these results, unless what was made lives in a mode of its own, such as the fake tensors of a trace."""
        if type(made) is Tensor:
            self.latest = latest

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ThreadCache, ()
