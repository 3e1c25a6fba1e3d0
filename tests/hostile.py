"""Fields that do what fields should not: keep values, begin late, write into memory of their own. Each has a `plain` twin that
computes the same without any of it.

All map (batch, 3) to (batch, 3). What is late begins where the state has left its start.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SIZE = 3


class Hostile(nn.Module):
    """A layer, and a symmetric weight derived from another one; `start` is where the solve begins."""

    gain: float = 1.0  # set anew between solves
    sizes: Any = 1.0  # of the entries of the state

    def __init__(self, start: Tensor, plain: bool) -> None:
        super().__init__()
        self.start, self.plain = start.detach(), plain
        self.layer, self.other = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.to(start)

    def late(self, y: Tensor) -> bool:
        return bool((y.detach() - self.start).abs().max() > 0.02)

    def derived(self) -> Tensor:
        return self.other.weight + self.other.weight.T

    def first(self, y: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.layer(y))

    def second(self, y: Tensor, weight: Tensor) -> Tensor:
        return 0.5 * torch.tanh(y @ weight)

    def kept(self) -> Tensor:
        return self.derived()

    def forward(self, y: Tensor) -> Tensor:
        return self.first(y) + self.second(y, self.derived() if self.plain else self.kept())


class Late(Hostile):
    """Keeps what it computes when it is first needed, which is late."""

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(y) if self.late(y) else self.first(y)


class InAttribute(Hostile):
    weight: Tensor | None = None

    def kept(self) -> Tensor:
        if self.weight is None:
            self.weight = self.derived()
        return self.weight


class InNewAttribute(Hostile):
    def kept(self) -> Tensor:
        if not hasattr(self, "weight"):
            self.weight = self.derived()
        return self.weight


class InDictionary(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[Any, Any] = {}

    def kept(self) -> Tensor:
        if "w" not in self.cache:
            self.cache["w"] = (self.derived(), 1)
        return self.cache["w"][0]


class InList(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: list[Any] = [None]

    def kept(self) -> Tensor:
        if self.cache[0] is None:
            self.cache[0] = self.derived()
        return self.cache[0]


class InCachedProperty(Hostile):
    @functools.cached_property
    def weight(self) -> Tensor:
        return self.derived()

    def kept(self) -> Tensor:
        return self.weight


class InLruCache(Hostile):
    @functools.cache  # noqa: B019
    def kept(self) -> Tensor:
        return self.derived()


class Slot:
    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight: Tensor | None = None


class InSlot(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.slot = Slot()

    def kept(self) -> Tensor:
        if self.slot.weight is None:
            self.slot.weight = self.derived()
        return self.slot.weight


class InFunction(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

        def kept() -> Tensor:
            if not hasattr(kept, "weight"):
                kept.weight = self.derived()  # type: ignore[attr-defined]
            return kept.weight  # type: ignore[attr-defined]

        self.keeps = kept

    def kept(self) -> Tensor:
        return self.keeps()


class InClosure(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        weight: Tensor | None = None

        def kept() -> Tensor:
            nonlocal weight
            weight = self.derived() if weight is None else weight
            return weight

        self.keeps = kept

    def kept(self) -> Tensor:
        return self.keeps()


class InClass(Hostile):
    """One for all instances, of which there is one."""

    latest: Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        InClass.latest = None

    def kept(self) -> Tensor:
        if InClass.latest is None:
            InClass.latest = self.derived()
        return InClass.latest


class InParametrization(Hostile):
    """torch.nn.utils.parametrize.cached() around the solve."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        weight_norm(self.other)

    def derived(self) -> Tensor:
        return self.other.weight

    kept = derived


GLOBAL: dict[str, Tensor] = {}


class InGlobal(Hostile):
    """In a dictionary of the module, which only a method names."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        GLOBAL.clear()

    def kept(self) -> Tensor:
        if "w" not in GLOBAL:
            GLOBAL["w"] = self.derived()
        return GLOBAL["w"]


class Elsewhere:
    weight: Tensor | None = None


class InOtherClass(Hostile):
    """In a class that only a method names."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Elsewhere.weight = None

    def kept(self) -> Tensor:
        if Elsewhere.weight is None:
            Elsewhere.weight = self.derived()
        return Elsewhere.weight


@functools.cache
def derived_from(field: Hostile) -> Tensor:
    return field.derived()


class InGlobalLruCache(Hostile):
    def kept(self) -> Tensor:
        return derived_from(self)


class InDefault(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        InDefault.kept.__defaults__[0].clear()  # type: ignore[index]

    def kept(self, cache: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
        if "w" not in cache:
            cache["w"] = self.derived()
        return cache["w"]


class InNewBuffer(Hostile):
    def kept(self) -> Tensor:
        if not hasattr(self, "weight"):
            self.register_buffer("weight", self.derived())
        return self.weight


class InNewDictionary(InDictionary):
    """In one that the first call makes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.cache

    def forward(self, y: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache = {}
        return super().forward(y)


class InDeque(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: deque[Tensor] = deque()

    def kept(self) -> Tensor:
        if not self.cache:
            self.cache.append(self.derived())
        return self.cache[0]


class InNewObject(Hostile):
    """In an object that comes with it."""

    store: Any = None

    def kept(self) -> Tensor:
        if self.store is None:
            self.store = SimpleNamespace(weight=self.derived())
        return self.store.weight


class ByKey(Hostile):
    """The latest value beside its key."""

    key: float | None = None
    weight: Tensor | None = None

    def forward(self, y: Tensor) -> Tensor:
        key = float(y.detach().sum())
        if self.plain or key != self.key:
            self.key, self.weight = key, self.derived()
        assert self.weight is not None
        return self.first(y) + self.second(y, self.weight)


class ByKeys(Hostile):
    """A value for every state, to a digit."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[float, Tensor] = {}

    def forward(self, y: Tensor) -> Tensor:
        key = round(float(y.detach().sum()), 1)
        if self.plain or key not in self.cache:
            self.cache[key] = self.derived()
        return self.first(y) + self.second(y, self.cache[key])


class LatestResult(Hostile):
    """The latest state, and the value there."""

    latest: tuple[Tensor, Tensor] | None = None

    def forward(self, y: Tensor) -> Tensor:
        if self.plain or self.latest is None or not torch.equal(self.latest[0], y):
            self.latest = y.detach().clone(), super().forward(y)
        return self.latest[1]


class InTensor(Hostile):
    """As an attribute of a tensor."""

    def kept(self) -> Tensor:
        if not hasattr(self.other.weight, "derived"):
            self.other.weight.derived = self.derived()  # type: ignore[attr-defined]
        return self.other.weight.derived  # type: ignore[attr-defined, return-value]


class InContextVariable(Hostile):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.variable: ContextVar[Tensor | None] = ContextVar("weight", default=None)

    def kept(self) -> Tensor:
        if self.variable.get() is None:
            self.variable.set(self.derived())
        weight = self.variable.get()
        assert weight is not None
        return weight


class InGenerator(Hostile):
    """In a local variable of one that runs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

        def running() -> Iterator[Tensor]:
            weight = self.derived()
            while True:
                yield weight

        self.running = running()

    def kept(self) -> Tensor:
        return next(self.running)


class FarAway(Hostile):
    """In an object of an object of an object of an object."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.near = SimpleNamespace(far=SimpleNamespace(farther=SimpleNamespace(store=SimpleNamespace(weight=None))))

    def kept(self) -> Tensor:
        store = self.near.far.farther.store
        if store.weight is None:
            store.weight = self.derived()
        return store.weight


class ByKeysHidden(InTensor):
    """A value for every state, to a digit, in a dictionary that hangs on a tensor."""

    def forward(self, y: Tensor) -> Tensor:
        kept = vars(self.other.weight).setdefault("kept", {})
        key = round(float(y.detach().sum()), 1)
        if self.plain or key not in kept:
            kept[key] = self.derived()
        return self.first(y) + self.second(y, kept[key])


KEEPERS_ELSEWHERE = [
    InGlobal,
    InOtherClass,
    InGlobalLruCache,
    InDefault,
    InNewBuffer,
    InNewDictionary,
    InDeque,
    InNewObject,
]
KEEPERS_BY_KEY = [ByKey, ByKeys, LatestResult]

KEEPERS = [
    InAttribute,
    InNewAttribute,
    InDictionary,
    InList,
    InCachedProperty,
    InLruCache,
    InSlot,
    InFunction,
    InClosure,
    InClass,
    InParametrization,
]
KEEPERS_LATE = [type(f"{kind.__name__}Late", (Late, kind), {}) for kind in KEEPERS]
KEEPERS_HIDDEN = [InTensor, InContextVariable, InGenerator, FarAway]
KEEPERS_HIDDEN += [type(f"{kind.__name__}Late", (Late, kind), {}) for kind in KEEPERS_HIDDEN]
KEEPERS_ELSEWHERE += [type(f"{kind.__name__}Late", (Late, kind), {}) for kind in KEEPERS_ELSEWHERE]


class LateLayer(Hostile):
    """A layer whose parameters come in late."""

    def forward(self, y: Tensor) -> Tensor:
        return self.first(y) + self.second(y, self.derived()) if self.late(y) else self.first(y)


class LateHidden(LateLayer):
    """A tensor that comes in late, from where nobody finds it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hidden = itertools.repeat(self.other.weight)
        self.mine = [self.other.weight]
        self.unfold = (lambda: self.other.weight) if self.plain else (lambda: next(self.hidden))

    def derived(self) -> Tensor:
        return self.unfold()


class LateOfNormalization(Hostile):
    """Batch normalisation in training that comes in late."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(SIZE, dtype=self.start.dtype)

    def forward(self, y: Tensor) -> Tensor:
        return self.first(y) + (0.1 * self.norm(y) if self.late(y) else 0.0)


class LateDropout(Hostile):
    def forward(self, y: Tensor) -> Tensor:
        return self.first(nn.functional.dropout(y, 0.5) if self.late(y) else y)


class LateHook(Hostile):
    """A hook that is there from late on: what it sees is not for us to say, but the gradient is that of autograd."""

    def forward(self, y: Tensor) -> Tensor:
        value = self.first(y)
        if self.late(y) and value.requires_grad:
            value.register_hook(lambda grad: 1.5 * grad)
        return value


class OwnLeaf(Hostile):
    """Makes a leaf in every call."""

    def forward(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.first(y) + torch.zeros_like(y[0]).requires_grad_()


class OwnLeafAndHidden(OwnLeaf):
    """And takes another of the same shape, late, from where nobody finds it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        hidden = itertools.repeat(self.other.bias)
        self.unfold = (lambda: self.other.bias) if self.plain else (lambda: next(hidden))

    def forward(self, y: Tensor) -> Tensor:
        return super().forward(y) + (0.3 * self.unfold() if self.late(y) else 0.0)


class ZeroStart(Hostile):
    """A last layer that is zero, spectrally normalised layers in training."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        torch.manual_seed(1)
        self.other = spectral_norm(self.other)
        self.last = nn.Linear(SIZE, SIZE, dtype=self.start.dtype)
        nn.init.zeros_(self.last.weight)

    def forward(self, y: Tensor) -> Tensor:
        return self.last(torch.tanh(self.other(self.first(y)))) + 0.3 * self.first(y)


class Scales(Hostile):
    """Entries of very different sizes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sizes = torch.tensor([1e-10, 1.0, 1e10], dtype=self.start.dtype)

    def forward(self, y: Tensor) -> Tensor:
        return self.sizes * self.first(y / self.sizes)


LATE = [LateLayer, LateHidden, LateOfNormalization, LateDropout, LateHook]
OTHERS = [OwnLeaf, OwnLeafAndHidden, ZeroStart]


class OneBuffer(Hostile):
    """Returns the same memory in each call."""

    how: Callable[[Any, Tensor], Tensor]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.memory = [torch.zeros_like(self.start) for _ in range(2)]
        self.calls = itertools.count()

    def written(self, value: Tensor, into: Tensor) -> Tensor:
        with torch.no_grad():
            return into.copy_(value)

    def into_memory(self, y: Tensor, value: Tensor) -> Tensor:
        return self.written(value, self.memory[0])

    def forward(self, y: Tensor) -> Tensor:
        value = self.first(y)
        return value if self.plain else self.into_memory(y, value)


class TwoBuffers(OneBuffer):
    def into_memory(self, y: Tensor, value: Tensor) -> Tensor:
        return self.written(value, self.memory[next(self.calls) % 2])


class PartOfABuffer(OneBuffer):
    def into_memory(self, y: Tensor, value: Tensor) -> Tensor:
        self.memory[0] = self.memory[0].new_zeros(2, *value.shape) if self.memory[0].ndim == 2 else self.memory[0]
        return self.written(value, self.memory[0][1])


class LateBuffer(OneBuffer):
    def into_memory(self, y: Tensor, value: Tensor) -> Tensor:
        return self.written(value, self.memory[0]) if self.late(y) else value


class NumpyBuffer(OneBuffer):
    def into_memory(self, y: Tensor, value: Tensor) -> Tensor:
        array = self.memory[0].numpy()
        array[:] = value.detach().numpy()
        return torch.from_numpy(array)


BUFFERS = [OneBuffer, TwoBuffers, PartOfABuffer, LateBuffer, NumpyBuffer]


class Constant(Hostile):
    """Returns a parameter, or what was computed of it outside."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.values = nn.Parameter(self.start.clone())
        self.outside = self.values.sin()

    def forward(self, y: Tensor) -> Tensor:
        return 1.0 * self.values if self.plain else self.values


class ConstantFromOutside(Constant):
    def forward(self, y: Tensor) -> Tensor:
        return 1.0 * self.outside if self.plain else self.outside


OTHERS += [Constant, ConstantFromOutside]
EVERY = [
    *(Hostile, Scales, *KEEPERS, *KEEPERS_LATE, *KEEPERS_ELSEWHERE, *KEEPERS_HIDDEN, *KEEPERS_BY_KEY),
    *(*LATE, *OTHERS, *BUFFERS),
]
REASONS = r"kept|did not use|random numbers|buffers|same memory|computed outside"  # of refusals


def start_of(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-0.9, 1.0, SIZE * batch, dtype=dtype).view(batch, SIZE)


def made(kind: type[Hostile], y0: Tensor, plain: bool) -> Hostile:
    torch.manual_seed(0)
    return kind(y0, plain)


@contextmanager
def caching(field: Hostile) -> Iterator[None]:
    if isinstance(field, InParametrization) and not field.plain:
        with parametrize.cached():
            yield
    else:
        yield
