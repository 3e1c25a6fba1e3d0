"""The torch.func transforms that are active: which they are, whose a tensor is, and the way out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import CVmapInterpreterPtr, RandomnessType, TransformType
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()


def dual_numbers() -> bool:
    """Whether tensors may carry tangents, as within torch.autograd.forward_ad.dual_level()."""
    return forward_ad._current_level >= 0


def followed(x: Tensor) -> bool:
    """Whether derivatives with respect to x may be asked for: a gradient, or in forward mode."""
    if x.requires_grad or not dual_numbers():
        return x.requires_grad
    if not (active := transforms()):
        return forward_ad.unpack_dual(x).tangent is not None
    with temporarily_pop_interpreter_stack():  # a transform further in does not see the tangents of those further out
        inner = _functorch.get_unwrapped(x) if wrapped(x) and _functorch.maybe_get_level(x) == len(active) else x
        if followed(inner):
            return True
    return active[-1] == TransformType.Jvp and forward_ad.unpack_dual(x).tangent is not None


def followed_innermost(x: Tensor) -> bool:
    """Whether the innermost transform, which takes a gradient, follows x."""
    return wrapped(x) and _functorch.maybe_get_level(x) == len(transforms()) and x.requires_grad


def transforms() -> list[Any]:
    """The kinds of the active transforms, the outermost first."""
    return [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or ()]


def have_rules() -> bool:
    """Whether a torch.autograd.Function with rules for gradients and batches goes through all of them."""
    return set(transforms()) <= {TransformType.Grad, TransformType.Vmap}


def batching() -> bool:
    """Whether a torch.vmap is active."""
    return transformed() and TransformType.Vmap in transforms()


def batched(x: Any) -> bool:
    """Whether x is one tensor for every sample of an active torch.vmap, whose numbers cannot be read."""
    if torch.compiler.is_compiling():
        return False
    while isinstance(x, Tensor) and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def sample_numbers(device: torch.device) -> tuple[int, Tensor | None]:
    """How many samples of the active torch.vmap draw random numbers of their own, and which of them this is; (1, None) if all
    share theirs, as they do where no torch.vmap is active.

    Raises:
        ValueError: the randomness of a torch.vmap is "error".
    """
    total, number = 1, None
    for level, interpreter in enumerate(_functorch.get_interpreter_stack() or (), 1):
        if interpreter.key() != TransformType.Vmap:
            continue
        batch = CVmapInterpreterPtr(interpreter)
        if batch.randomness() == RandomnessType.Error:
            raise ValueError(
                "noise would be drawn inside torch.vmap, which was not told how: pass bm= for one path that all samples share, "
                "or tell it randomness='different' (a path for each) or randomness='same'."
            )
        if batch.randomness() == RandomnessType.Different:
            with outside():
                each = torch.arange(batch.batchSize(), device=device)
            inner = _functorch._add_batch_dim(each, 0, level)
            number = inner if number is None else number * len(each) + inner
            total *= len(each)
    return total, number


def of_every_sample(x: Tensor) -> Tensor:
    """x without transforms, where its numbers can be read: with a dimension in front for every torch.vmap it belongs to."""
    dims: list[int] = []
    while wrapped(x):
        if _functorch.is_batchedtensor(x):
            dims.append(_functorch.maybe_get_bdim(x))
            x = _functorch.get_unwrapped(x)
        else:
            x = _functorch.get_unwrapped(x)
    if dims:
        with outside():
            for place, dim in enumerate(reversed(dims)):
                x = x.movedim(dim + place, place)
    return x.detach()


def wrapped(x: Tensor) -> bool:
    """Whether a transform follows x."""
    return not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x)


def core(x: Tensor, level: int) -> Tensor:
    """What x is at this level: without the wraps that transforms further in have put around it."""
    while wrapped(x) and _functorch.maybe_get_level(x) > level:
        x = _functorch.get_unwrapped(x)
    return x


def stray(x: Tensor) -> bool:
    """Whether x belongs to a transform that is not active now."""
    if not wrapped(x):
        return False
    level = _functorch.maybe_get_level(x)
    if level < 0:
        return False  # the transform is over, and torch unwraps x by itself
    active = _functorch.get_interpreter_stack() or ()
    return level > len(active) or (active[level - 1].key() == TransformType.Vmap) != _functorch.is_batchedtensor(x)


def of_sample(x: Tensor, level: int) -> Tensor:
    """What one sample of the torch.vmap at this level sees of x, whose leading dimension numbers the samples."""
    return _functorch._add_batch_dim(x, 0, level)


def of_all(x: Any, level: int) -> tuple[Any, int | None]:
    """x for all samples of the torch.vmap at this level, and the dimension that numbers them; None if all have the same."""
    return _functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None)


def exported() -> bool:
    """Whether torch.export follows what is computed, with tensors that hold no numbers."""
    return (
        torch.compiler.is_exporting()
        and not torch.compiler.is_dynamo_compiling()
        and torch._C._len_torch_dispatch_stack() > 0
    )


@contextmanager
def outside() -> Iterator[None]:
    """A context in which no transform and no torch.export is active: what is made there is the same for all of them."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes() if exported() else nullcontext():
        yield
