"""Other tensors in the place of those that a field uses, for as long as a context is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CONTAINERS = (list, tuple, dict)


class Substitution(TorchFunctionMode):
    """Puts `others` in the place of `tensors` wherever an operation takes them.

    Needed where a gradient must stop at a tensor that was computed from another one; where hooks of a tensor must see its whole
    gradient, once; for tensors of another level of torch.func; for recordings. An operation that is no function of torch
    (a torch.autograd.Function, scripted code) is not seen: what it takes stays as it is, and the check of the graph finds that.

    Raises:
        RuntimeError: `stray` says of a tensor that it does not belong here.
    """

    def __init__(
        self, tensors: Sequence[Tensor], others: Sequence[Tensor], stray: Callable[[Tensor], bool] | None = None
    ) -> None:
        super().__init__()
        self.tensors, self.stray = tensors, stray
        self.by_id = {id(x): other for x, other in zip(tensors, others, strict=True) if other is not x}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [tree_map(self._other, x) if isinstance(x, CONTAINERS) else self._other(x) for x in args]
        return func(*args, **tree_map(self._other, kwargs)) if kwargs else func(*args)

    def _other(self, x: Any) -> Any:
        other = self.by_id.get(id(x))
        if other is not None:
            return other
        if self.stray is not None and isinstance(x, Tensor) and self.stray(x):
            raise RuntimeError(
                f"the field depends on a tensor of shape {tuple(x.shape)} that it did not use when it was first called, so its "
                "gradient would be lost: pass it through args=, or say gradient='direct'."
            )
        return x
