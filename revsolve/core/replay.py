"""What a replayed step needs to be the same step again: the same noise, buffers and autocast state, and inputs cut off from
their past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from revsolve.core.arithmetic import Time
from revsolve.core.capture import Draws, capturing
from revsolve.core.tape import Guarded, Term


class Ambient:
    """The autocast state of the forward pass, as a context for the backward pass."""

    def __init__(self, states: list[tuple[str, bool, torch.dtype]], cache: bool) -> None:
        self.states, self.cache = states, cache
        self.entered: list[Any] = []

    @classmethod
    def now(cls) -> Ambient:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        states = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        return cls(states, torch.is_autocast_cache_enabled())

    def __enter__(self) -> None:
        for device, enabled, dtype in self.states:
            if enabled != torch.is_autocast_enabled(device) or enabled:
                context = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=self.cache)
                context.__enter__()
                self.entered.append(context)

    def __exit__(self, *error: Any) -> None:
        while self.entered:
            self.entered.pop().__exit__(*error)


class Noisy(Guarded):
    """A term whose field draws random numbers: the draw becomes a function of the time, the same however often it is asked.

    The seed is drawn once per solve; the surrounding random state is left as it was found.
    """

    def __init__(self, term: Term, seed: int, devices: list[torch.device]) -> None:
        super().__init__(term)
        self.seed, self.devices = seed, devices

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        with torch.random.fork_rng(self.devices):
            seed = hash((self.seed, float(t))) & 0x7FFF_FFFF_FFFF_FFFF
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices whose state is not kept
            for device in self.devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return call(*args)


def random_state_changed_by(call: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
    """The value of `call()`, and whether it drew random numbers; the random state is put back."""
    if capturing():
        with Draws() as draws:
            return call(), draws.any
    on_device = device.type == "cuda"
    before, there = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_device else None
    drew = True
    try:
        value = call()
        drew = not torch.equal(before, torch.get_rng_state())
        drew |= there is not None and not torch.equal(there, torch.cuda.get_rng_state(device))
    finally:
        if drew:
            torch.set_rng_state(before)
            if there is not None:
                torch.cuda.set_rng_state(there, device)
    return value, drew


class Buffers:
    """Buffers of modules that train, such as running statistics, as they were when this was made.

    As a context, it lends the modules copies of these, so that nothing done inside reaches the buffers themselves.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.kept = [
            (module, name, buffer, buffer.clone())
            for module in {id(module): module for module in modules}.values()
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.lenders: list[list[tuple[nn.Module, str, Tensor | None]]] = []

    def keep_changed(self) -> None:
        """Forget those that are still the same."""
        self.kept = [
            (module, name, buffer, copy)
            for module, name, buffer, copy in self.kept
            if module._buffers[name] is not buffer or not torch.equal(buffer, copy)
        ]

    def holds(self, x: Tensor) -> bool:
        return any(x is buffer for _, _, buffer, _ in self.kept)

    def restore(self) -> None:
        for module, name, buffer, copy in self.kept:
            with torch.no_grad():
                buffer.copy_(copy)
            module._buffers[name] = buffer

    def __enter__(self) -> None:
        self.lenders.append([(module, name, module._buffers[name]) for module, name, _, _ in self.kept])
        for module, name, _, copy in self.kept:
            module._buffers[name] = copy.clone()

    def __exit__(self, *error: object) -> None:
        for module, name, buffer in self.lenders.pop():
            module._buffers[name] = buffer


class Unchanged:
    """Raises RuntimeError when called after one of the tensors was changed in place, as autograd does for those that it saves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.versions = [(x, x._version) for x in tensors]

    def __call__(self) -> None:
        for x, version in self.versions:
            if x._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(x.shape)} that the field uses was modified by an inplace operation between the "
                    "solve and its backward pass, which needs it as it was: change it later, or give the field a copy."
                )


class Frozen(Guarded):
    """A term whose field keeps a state in buffers that its values depend on: every evaluation of a solve finds the same state."""

    def __init__(self, term: Term, buffers: Buffers) -> None:
        super().__init__(term)
        self.buffers = buffers

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        with self.buffers:
            return call(*args)


class Gate:
    """Cuts tensors off from their history while the context is open, and joins them to it again afterwards.

    A gradient that is itself differentiable must not run into the history of its inputs while it is taken (the surrounding
    backward pass does that), but derivatives of it must.
    """

    def __enter__(self) -> Gate:
        self.shut = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut = False

    def __call__(self, x: Tensor) -> Tensor:
        return _Gated.apply(self, x)


class StandIns(TorchFunctionMode):
    """Puts stand-ins in the place of tensors wherever a field uses them.

    Needed where one of the tensors that a field takes from outside was computed from another: a gradient must stop at the
    computed one, not run on to the other within the field's own derivative. And where a tensor has hooks: these are to see
    its gradient once, not in every piece.
    """

    def __init__(self, tensors: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tensors = [x if taken_as_it_is(x) else make(x) for x in tensors]
        self.by_id = {id(x): new for x, new in zip(tensors, self.tensors, strict=True) if new is not x}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._swap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _swap(self, x: Any) -> Any:
        return self.by_id.get(id(x), x)


def taken_as_it_is(x: Tensor) -> bool:
    """Whether a tensor needs no stand-in where others do."""
    return x.is_leaf and not has_hooks(x)


def has_hooks(x: Tensor) -> bool:
    """Whether something happens whenever a gradient of x is taken."""
    return bool(x._backward_hooks) or x.retains_grad


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Gate, x: Tensor) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.shut else grad
