"""The private names of PyTorch that the solvers use: levels of torch.func, the autograd graph, dispatch.

No other file names one, but for the compiled backend. Where a release has renamed one, its function falls back to something
plain: the package imports and solves all the same, and what needs more than that fails with an error of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

try:
    from torch._C import _are_functorch_transforms_active, _functorch
    from torch._C._functorch import CVmapInterpreterPtr, RandomnessType, TransformType, get_interpreter_stack
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_pop_interpreter_stack
    from torch._functorch.vmap import vmap_increment_nesting
except ImportError:  # no transform is seen, and torch.func itself says what it cannot do
    LEVELS = False
else:
    LEVELS = True
try:
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
except ImportError:
    TorchDispatchMode, _disable_current_modes = object, nullcontext  # type: ignore[misc,assignment]

_AUTOGRAD: Any = getattr(torch._C, "_autograd", None)
_ENGINE = getattr(torch.autograd.Variable, "_execution_engine", None)
_NUM_MODES = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# torch 2.6 has no is_exporting; there is_compiling is true within torch.export alone, besides Dynamo.
_IS_EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return LEVELS and _are_functorch_transforms_active()


def dual_numbers() -> bool:
    """Whether tensors may carry tangents, as within torch.autograd.forward_ad.dual_level()."""
    return getattr(forward_ad, "_current_level", -1) >= 0


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
    return [interpreter.key() for interpreter in _interpreters()]


def _interpreters() -> Sequence[Any]:
    return (LEVELS and get_interpreter_stack()) or ()


def have_rules() -> bool:
    """Whether a torch.autograd.Function with rules for gradients and batches goes through all of them."""
    return not (active := transforms()) or set(active) <= {TransformType.Grad, TransformType.Vmap}


def batching() -> bool:
    """Whether a torch.vmap is active."""
    return transformed() and TransformType.Vmap in transforms()


def batched(x: Any) -> bool:
    """Whether x is one tensor for every sample of an active torch.vmap, whose numbers cannot be read."""
    while isinstance(x, Tensor) and wrapped(x):
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
    for level, interpreter in enumerate(_interpreters(), 1):
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
    with outside():  # or an active transform would follow what is made of it
        for place, dim in enumerate(reversed(dims)):
            x = x.movedim(dim + place, place)
        return x.detach()


def numbers(x: Tensor, name: str = "a time or knot") -> Any:
    """x.tolist(), which before torch 2.13 fails within a transform, even of a tensor that has nothing to do with it."""
    if not (transformed() or exported()):
        return x.tolist()
    if batched(x):
        raise ValueError(
            f"{name} must be the same for all samples inside torch.vmap: solve all samples as one state outside of it, in "
            "odeint with t of shape (T, batch)."
        )
    with outside():
        return of_every_sample(x).tolist()


def wrapped(x: Tensor) -> bool:
    """Whether a transform follows x."""
    return LEVELS and not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x)


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
    active = _interpreters()
    return level > len(active) or (active[level - 1].key() == TransformType.Vmap) != _functorch.is_batchedtensor(x)


def of_sample(x: Tensor, level: int) -> Tensor:
    """What one sample of the torch.vmap at this level sees of x, whose leading dimension numbers the samples."""
    return _functorch._add_batch_dim(x, 0, level)


def of_all(x: Any, level: int) -> tuple[Any, int | None]:
    """x for all samples of the torch.vmap at this level, and the dimension that numbers them; None if all have the same."""
    return _functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None)


def sample_level(size: int, randomness: str) -> AbstractContextManager[int]:
    """A context in which one sample of `size` is followed, as within torch.vmap; it gives the level."""
    return vmap_increment_nesting(size, randomness)


@contextmanager
def outside() -> Iterator[None]:
    """A context in which no transform and no torch.export is active: what is made there is the same for all of them."""
    with (
        temporarily_clear_interpreter_stack() if LEVELS else nullcontext(),
        _disable_current_modes() if exported() else nullcontext(),
    ):
        yield


def batched_gradient(grad: Tensor) -> bool:
    """Whether a cotangent stands for a batch of them, as with is_grads_batched=True."""
    asked = getattr(_functorch, "is_legacy_batchedtensor", None) if LEVELS else None
    return asked is not None and asked(grad)


def exported() -> bool:
    """Whether torch.export follows what is computed, with tensors that hold no numbers."""
    return _IS_EXPORTING() and not torch.compiler.is_dynamo_compiling() and _NUM_MODES() > 0


def watching(see: Callable[[Any, Sequence[Any], dict[str, Any]], object]) -> AbstractContextManager[Any]:
    """A context that tells `see(operation, args, kwargs)` of every operation before it runs; torch.compile does not enter it."""
    if not hasattr(TorchDispatchMode, "__enter__"):
        return nullcontext()
    return (_UntracedWatch if "torch._dynamo" in sys.modules else _Watch)(see)


class _Watch(TorchDispatchMode):
    def __init__(self, see: Callable[[Any, Sequence[Any], dict[str, Any]], object]) -> None:
        super().__init__()
        self.see = see

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _UntracedWatch(_Watch):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def num_nodes() -> int:
    """The number of the next node of the autograd graph that this thread makes; -1 where it cannot be told."""
    return getattr(_AUTOGRAD, "_get_sequence_nr", lambda: -1)()


def made_before(node: Any, number: int) -> bool:
    """Whether a node of the autograd graph was made before `num_nodes()` was that number."""
    return hasattr(node, "_sequence_nr") and node._sequence_nr() < number


# As `version`, where x is no inference tensor.
version_of: Callable[[Tensor], int] = attrgetter("_version") if hasattr(Tensor, "_version") else lambda x: -1


def version(x: Tensor) -> int:
    """A number that changes when x is changed in place; -1 for an inference tensor, which has none."""
    return -1 if x.is_inference() else getattr(x, "_version", -1)


def is_borrowed(x: Tensor) -> bool:
    """Whether the memory of x belongs to another library, such as numpy, whose writing no version tells."""
    try:
        return not x.untyped_storage().resizable()
    except (NotImplementedError, RuntimeError):  # it has no memory
        return False


def entries_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dictionaries of a module's own parameters, buffers and children, in which an assignment puts a new one; of a scripted
    module copies, for it has none."""
    if isinstance(module, torch.jit.ScriptModule):
        own = module.named_parameters(recurse=False), module.named_buffers(recurse=False), module.named_children()
        return dict(own[0]), dict(own[1]), dict(own[2])
    entries = vars(module)
    return entries["_parameters"], entries["_buffers"], entries["_modules"]


def cached_parametrizations() -> dict[Any, Any]:
    """Where weights are kept within torch.nn.utils.parametrize.cached()."""
    return getattr(parametrize, "_cache", {})


def has_hooks(x: Tensor) -> bool:
    """Whether something happens whenever a gradient of x is taken."""
    return x.retains_grad or bool(getattr(x, "_backward_hooks", True))


def vector_jacobian_product(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    keep: bool = False,
    record: bool = False,
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad without its checks in Python: for a small field 60 of the 250 us of an undone evaluation. `keep`: the
    graph is used again; `record`: the products have one, too."""
    if _ENGINE is None or torch.compiler.is_compiling():
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=keep or record, create_graph=record, allow_unused=True
        )
    return _ENGINE.run_backward(
        tuple(outputs), tuple(cotangents), keep or record, record, tuple(inputs), True, accumulate_grad=False
    )
