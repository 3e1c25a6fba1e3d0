"""The problems on which gradients are timed; it imports no package, for PyTorch and JAX both read it."""

from typing import NamedTuple


class Size(NamedTuple):
    """A network with two hidden layers of `width` as the field of `batch` states, over a unit of time in RK4 steps."""

    batch: int
    dimension: int
    width: int
    num_steps: int


SIZES = {"tiny": Size(1, 2, 16, 200), "small": Size(128, 2, 64, 100), "large": Size(256, 64, 512, 30)}
