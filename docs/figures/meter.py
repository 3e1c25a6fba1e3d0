"""Memory of a gradient, counted rather than weighed: the same on every machine."""

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor


class Meter:
    """How many numbers autograd holds in its saved tensors, and the most it ever held; those in `own` do not count."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.own = {x.untyped_storage().data_ptr() for x in own}
        self.users: Counter[int] = Counter()
        self.held = self.peak = 0

    def pack(self, x: Tensor) -> tuple[Tensor, object]:
        storage = x.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes() // x.element_size()
        ticket = type("Ticket", (), {})()
        if place not in self.own:
            self.users[place] += 1
            self.held += size if self.users[place] == 1 else 0
            self.peak = max(self.peak, self.held)
            weakref.finalize(ticket, self.release, place, size)
        return x.detach(), ticket  # x itself would keep its own history alive

    def release(self, place: int, size: int) -> None:
        self.users[place] -= 1
        self.held -= size if self.users[place] == 0 else 0
