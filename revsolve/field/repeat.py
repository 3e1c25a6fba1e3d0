"""What makes an evaluation of a field the same when it is made again: its random numbers, its buffers, the autocast state, and
memory of its own for its value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from revsolve.core.arithmetic import Scalar, Time
from revsolve.core.tape import Term, Wrapped
from revsolve.field.functorch import entries_of, is_borrowed, version, watching
from revsolve.field.snapshot import map_tensors, tensors_in

DEVICES = ("cpu", "cuda")


def capturing() -> bool:
    """Whether a CUDA graph is recorded on the current stream: launches are written down, and no number can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def autocast_state() -> Callable[[], AbstractContextManager[Any]]:
    """The autocast state of now, as a context for later."""
    states, cache = [], torch.is_autocast_cache_enabled()
    for device in DEVICES if torch.cuda.is_initialized() else DEVICES[:1]:
        states.append((device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for device, enabled, dtype in states:
                if enabled or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield

    return again


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """That of the generators whose numbers a field on this device draws."""
    return (
        torch.get_rng_state(),
        *((torch.cuda.get_rng_state(device),) if device.type == "cuda" and not capturing() else ()),
    )


def same_random_state(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    words = torch.int64  # a quarter of the time that bytes take
    return all(torch.equal(a.view(words), b.view(words)) for a, b in zip(one, other, strict=True))


def set_random_state(states: tuple[Tensor, ...], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def drawing(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call returns, and whether it draws from a default generator of torch; draws of other threads do not count."""
    seeded, found = torch.Tag.nondeterministic_seeded, [False]

    def see(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        found[0] |= seeded in operation.tags and kwargs.get("generator") is None

    with watching(see):
        return call(), found[0]


class Guarded(Wrapped):
    """A term around another one, whose evaluations are calls by `evaluate`: of the value, or of the product if that is late."""

    def __init__(self, term: Term) -> None:
        super().__init__(getattr(term, "at_once", term))
        if self.late:
            del self.product  # so that it is the method

    def value(self, t: Time, x: Tensor) -> Any:
        return (t, x) if self.late else self.evaluate(t, self.term.value, t, x)

    def product(self, value: Any, control: Any) -> tuple[Tensor, Scalar]:
        return self.evaluate(value[0], self.term.product, value, control)

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        """The value of the call, an evaluation at t."""
        raise NotImplementedError


class Repeatable(Guarded):
    """A term whose evaluations depend on time, state and tensors alone, though its field draws random numbers or changes buffers.

    With a `seed`, what is drawn is a function of it and of the time, or of it alone if the term has `one_draw`; the state of the
    generators is left as it was. With `buffers`, every evaluation finds these as they were when the solve began.
    """

    def __init__(self, term: Term, seed: int | None, device: torch.device, buffers: Buffers | None) -> None:
        super().__init__(term)
        self.seed, self.buffers = seed, buffers or nullcontext()
        self.devices = [device] if device.type == "cuda" else []
        self.one_draw = getattr(term, "one_draw", False)

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        if self.seed is None:
            with self.buffers:
                return call(*args)
        seed = hash((self.seed, 0.0 if self.one_draw else float(t))) & 0x7FFF_FFFF_FFFF_FFFF
        with self.buffers, torch.random.fork_rng(self.devices):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices whose state is not kept
            for device in self.devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return call(*args)


class OwnValues(Guarded):
    """A term whose field returns the same preallocated memory in every call: values are copied out of it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.is_rate = False  # no evaluation is recorded where no gradient is wanted: it would stay in that memory

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        return map_tensors(Tensor.clone, call(*args))


def own(x: Tensor) -> Tensor:
    """x, or a copy if it was written in place, perhaps where the next call writes again."""
    return x.clone() if version(x) > 0 else x


def in_one_memory(value: Any, call: Callable[[], Any]) -> bool:
    """Whether `call` gives the memory of this value again, which was written in place or is numpy's."""
    written = [x for x in tensors_in(value) if version(x) > 0 or is_borrowed(x)]
    there = set(map(address_of, tensors_in(call()))) if written else set()
    return any(address_of(x) in there for x in written)


def address_of(x: Tensor) -> int:
    """That of its memory, or of the object where it has none of its own."""
    try:
        return x.untyped_storage().data_ptr() if type(x) in (Tensor, Parameter) else id(x)
    except (NotImplementedError, RuntimeError):
        return id(x)


class Buffers:
    """Buffers of modules that train, such as running statistics, as they were when this was made.

    As a context, it lends the modules copies of these, so that nothing done inside reaches the buffers themselves.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.kept: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self.lenders: list[list[tuple[dict[str, Any], str, Tensor | None]]] = []
        for module in modules:
            if module.training:
                buffers = entries_of(module)[1]
                for name, buffer in buffers.items():
                    if buffer is not None and not buffer.requires_grad:  # else a result that is kept there
                        self.kept.append((buffers, name, buffer, buffer.clone()))

    def changed(self) -> Buffers:
        """Those that are not the same any more."""
        others = Buffers()
        others.kept = [
            (buffers, name, buffer, copy)
            for buffers, name, buffer, copy in self.kept
            if buffers.get(name) is not buffer or not torch.equal(copy, buffer)
        ]
        return others

    def __bool__(self) -> bool:
        return bool(self.kept)

    def but(self, others: Buffers) -> Buffers:
        """Those that are not among the others."""
        left, taken = Buffers(), {id(buffer) for _, _, buffer, _ in others.kept}
        left.kept = [entry for entry in self.kept if id(entry[2]) not in taken]
        return left

    def __contains__(self, x: Tensor) -> bool:
        return any(x is buffer for _, _, buffer, _ in self.kept)

    def names(self) -> str:
        return ", ".join(dict.fromkeys(name for _, name, _, _ in self.kept))

    def restore(self) -> None:
        for buffers, name, buffer, copy in self.kept:
            with torch.no_grad():
                buffer.copy_(copy)
            buffers[name] = buffer

    def __enter__(self) -> None:
        self.lenders.append([(buffers, name, buffers.get(name)) for buffers, name, _, _ in self.kept])
        for buffers, name, _, copy in self.kept:
            buffers[name] = copy.clone()

    def __exit__(self, *error: object) -> None:
        for buffers, name, buffer in self.lenders.pop():
            buffers[name] = buffer
