"""The state of any shape as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Packing:
    """A pytree of tensors as one tensor and back: a lone tensor stays as it is, several become one real vector."""

    def __init__(self, state: Any, name: str = "y0") -> None:
        leaves, self.spec = tree_flatten(state)
        self.name, self.lone = name, isinstance(state, Tensor)
        self.shapes, self.dtypes, self.sizes = [], [], []  # type: list[torch.Size], list[torch.dtype], list[int]
        if not leaves:
            raise ValueError(f"{name} holds no tensor, it is {state!r:.80}: pass one, or a pytree of them.")
        for leaf in leaves:
            _check_leaf(leaf, name)
            real = leaf.real.dtype if leaf.is_complex() else leaf.dtype
            if not self.shapes:
                self.device, self.real_dtype = leaf.device, real
            if leaf.device != self.device:
                raise ValueError(
                    f"the tensors of {name} lie on different devices, '{self.device}', '{leaf.device}': move them to one."
                )
            self.real_dtype = torch.promote_types(self.real_dtype, real)
            self.shapes.append(leaf.shape)
            self.dtypes.append(leaf.dtype)
            self.sizes.append(leaf.numel() * (2 if leaf.is_complex() else 1))

    def pack(self, state: Any, where: str | None = None) -> Tensor:
        """The state as one tensor; what a field returned is checked, and `where` is the field's name."""
        if self.lone:
            return state
        leaves = self.leaves_of(state, self.name) if where is None else self.check_like(state, where)
        return torch.cat([_flat(leaf, self.real_dtype) for leaf in leaves])

    def leaves_of(self, state: Any, where: str) -> list[Any]:
        """The leaves in the order of the state's own; lists count as tuples, and dicts have no order."""
        leaves, spec = tree_flatten(state)
        if spec == self.spec:
            return leaves
        wanted, got = ("one tensor", f"a {type(state).__name__}") if self.lone else (self.spec, spec)
        try:
            if not self.lone:
                return self._as_tuples().flatten_up_to(_as_tuples(state))
        except ValueError:
            pass
        raise ValueError(f"{where} must return the structure of {self.name}, {wanted}, but it returned {got}.")

    def _as_tuples(self) -> Any:
        """The structure of the state with tuples in the place of its lists."""
        return tree_flatten(_as_tuples(tree_unflatten(range(len(self.shapes)), self.spec)))[1]

    def unpack(self, x: Tensor) -> Any:
        """The pytree whose leaves keep the leading dimensions of x, if it has any."""
        if self.lone:
            return x
        parts = x.split(self.sizes, dim=-1)
        leaves = []
        for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True):
            if dtype.is_complex:
                # view_as_complex would need an even offset and even strides, which a slice of the vector may not have
                part = torch.complex(*part.unflatten(-1, (-1, 2)).unbind(-1))
            leaves.append(part.reshape((*x.shape[:-1], *shape)).to(dtype))
        return tree_unflatten(leaves, self.spec)

    def spread(self, numbers: Any, name: str) -> Any:
        """Numbers or tensors for the leaves of the state, as one tensor that goes with a packed state; a lone one as it is."""
        if numbers is None or isinstance(numbers, (Tensor, float, int)):
            return numbers
        if self.lone and isinstance(numbers, (list, tuple)):
            numbers = torch.tensor(numbers, dtype=self.real_dtype, device=self.device)
        try:
            leaves = self._as_tuples().flatten_up_to(_as_tuples(numbers))
        except ValueError:
            raise ValueError(
                f"{name} must have the structure of {self.name}, {self.spec}, or be one number, but it is {numbers!r:.80}."
            ) from None
        parts = []
        for leaf, shape, size in zip(leaves, self.shapes, self.sizes, strict=True):
            part = torch.as_tensor(leaf, dtype=self.real_dtype, device=self.device)
            try:
                part = part.expand(shape).reshape(-1)
            except RuntimeError:
                raise ValueError(
                    f"{name} of shape {tuple(part.shape)} does not fit a part of {self.name} of shape {tuple(shape)}."
                ) from None
            parts.append(part.repeat_interleave(size // part.numel()))
        return torch.cat(parts)

    def check_like(self, out: Any, where: str) -> list[Tensor]:
        """The leaves of what the field returned. Raises unless it has the structure and shapes of the state."""
        leaves = self.leaves_of(out, where)
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype, leaf.device) == (shape, dtype, self.device):
                continue  # without a word
            swapped = isinstance(leaf, Tensor) and leaf.ndim == 0 and self.name == "y0"
            hint = ": it is called as func(t, y), with the time first" if swapped else ""
            self.check_leaf(leaf, where, shape, dtype, f"the shape of {self.name}, {tuple(shape)}", hint)
        return leaves

    def check_leaf(
        self, leaf: Any, where: str, shape: Sequence[int], dtype: torch.dtype, wanted: str, hint: str = ""
    ) -> None:
        """Raise unless it is a tensor of this shape, `wanted` in words, and of this dtype, on the device of the state."""
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} must return tensors, but it returned {type(leaf).__name__} {leaf!r:.80}.")
        if leaf.shape != shape:
            raise ValueError(f"{where} must return {wanted}, but it returned {tuple(leaf.shape)}{hint}.")
        if leaf.device != self.device:
            raise ValueError(f"{where} returned a tensor on {leaf.device}, but {self.name} is on {self.device}.")
        if leaf.dtype != dtype and not torch.is_autocast_enabled(self.device.type):
            raise TypeError(
                f"{where} must return the dtype of {self.name}, {dtype}, but it returned {leaf.dtype}: cast one of them "
                "(under torch.autocast the value is cast to the state's dtype)."
            )


def _as_tuples(state: Any) -> Any:
    """A pytree with tuples in the place of its lists."""
    if type(state) in (list, tuple):
        return tuple(map(_as_tuples, state))
    return {key: _as_tuples(value) for key, value in state.items()} if type(state) is dict else state


def form(x: Any) -> Any:
    """The shape and dtype of a tensor, those of what a tuple or list holds; else the type."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return tuple(map(form, x)) if isinstance(x, (tuple, list)) else type(x)


def _check_leaf(leaf: Any, name: str) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{name} must be a tensor or a pytree of tensors, but it holds {type(leaf).__name__} {leaf!r:.80}: make it a tensor."
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise TypeError(
            f"{name} must be floating point or complex, but it has dtype {leaf.dtype}: cast it, say with .float()."
        )
    if leaf.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(leaf.shape)}, which holds no numbers.")


def _flat(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    # view_as_real would need even offsets of the gradient, which a slice of the vector's may not have
    return (torch.stack((leaf.real, leaf.imag), -1) if leaf.is_complex() else leaf).reshape(-1).to(dtype)
