"""What a callable holds, wherever Python lets it: tensors, modules, and the places in which they stand.

A place is an attribute, a cell of a closure or a global name. A field that is called again later must find there what it found
when it was solved, though other values may have been put there in between.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType, CodeType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revsolve.field.functorch import cached_parametrizations, entries_of

DEPTH = 6
OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, complex, str, bytes, type(None))
LEAVES = (*PLAIN, type, ModuleType)
OF_OTHERS = sys.stdlib_module_names | {"torch", "numpy", "revsolve"}  # packages whose classes keep nothing of a field's
MISSING = object()
MANY = 4096  # entries of what is data, not a cache: it is not copied in every solve


class Place(NamedTuple):
    """Where a value was found: entry `name` of a dictionary, a cell of a closure, or an attribute in a slot or of a class."""

    holder: Any
    name: str
    value: Any

    def put(self, value: Any) -> None:
        cell = isinstance(self.holder, CellType)
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        elif value is MISSING:
            delattr(self.holder, "cell_contents" if cell else self.name)
        else:
            setattr(self.holder, "cell_contents" if cell else self.name, value)


class Contents:
    """The entries of a list or dictionary, as they were when this was made.

    A field that keeps values puts tensors there that it computed when no gradients were recorded: they are taken out while it is
    called again for its gradient, so that it computes them anew, and put back later.
    """

    def __init__(self, holder: Any, size: int) -> None:
        self.holder, self.then = holder, _entries(holder)
        self.grows = len(self.then) != size  # in the first call, as a log does

    def new(self, now: dict[Any, Any]) -> dict[Any, Any]:
        """What holds tensors and was put there since."""
        then = self.then
        if len(now) == len(then) and all(map(operator.is_, now.values(), then.values())):
            return {}
        return {key: x for key, x in now.items() if x is not then.get(key, MISSING) and tensors_in(x)}

    def late(self) -> list[Tensor]:
        """Tensors put there since, but not in the first call."""
        return (
            [] if self.grows else [x for value in self.new(_entries(self.holder)).values() for x in tensors_in(value)]
        )

    def take_out(self, only: Collection[int] | None = None) -> Callable[[], None] | None:
        """Take out tensors that were put there since, or only these. Returns what puts them back."""
        now, holder, then = _entries(self.holder), self.holder, self.then
        new = self.new(now)
        if only is not None:
            new = {key: value for key, value in new.items() if any(id(x) in only for x in tensors_in(value))}
        if not new:
            return None
        left = {key: then[key] if key in new else x for key, x in now.items() if key not in new or key in then}
        if isinstance(holder, list):
            holder[:] = left.values()
        else:
            for key in new:
                if key in left:
                    holder[key] = left[key]
                else:
                    del holder[key]

        def put_back() -> None:
            if isinstance(holder, list):
                holder[:] = [*now.values(), *holder[len(left) :]]
            else:
                holder.update(new)

        return put_back


class Remembered:
    """The number of results that a function has put into a functools.lru_cache, which can only be cleared."""

    def __init__(self, function: Any, size: int) -> None:
        self.function, self.then = function, function.cache_info().misses

    def late(self) -> list[Tensor]:
        return []  # nobody can look

    def take_out(self, only: Collection[int] | None = None) -> Callable[[], None] | None:
        if self.function.cache_info().misses == self.then:
            return None
        self.function.cache_clear()
        self.then = 0  # all that comes now is new
        return self.function.cache_clear


class Memory:
    """What a field found and kept, to be found again whenever it is called for its gradient. `keepers` come with their sizes
    before the first call."""

    def __init__(self, places: Sequence[Place] = (), keepers: Iterable[tuple[Any, int]] = ()) -> None:
        self.places = places
        self.contents = [(Remembered if hasattr(x, "cache_clear") else Contents)(x, size) for x, size in keepers]

    @contextmanager
    def restored(self) -> Iterator[None]:
        moved = changed(self.places)
        back = [put_back for contents in self.contents if (put_back := contents.take_out()) is not None]
        try:
            for place, _ in moved:
                place.put(place.value)
            yield
        finally:
            for put_back in back:
                put_back()
            for place, now in moved:
                if now is not MISSING:
                    place.put(now)

    def late(self) -> list[Tensor]:
        """Tensors kept since, but not in the first call."""
        filled = [x for place, x in changed(self.places) if place.value is None and isinstance(x, Tensor)]
        return [*filled, *(x for contents in self.contents for x in contents.late())]

    def forget(self, only: Collection[int] | None = None) -> None:
        """Take out for good what was kept since, or only these tensors: who needs it later is to compute it anew."""
        for contents in self.contents:
            contents.take_out(only)
        for place, now in changed(self.places):
            if place.value is None and isinstance(now, Tensor) and (only is None or id(now) in only):
                place.put(None)


def _entries(holder: Any) -> dict[Any, Any]:
    return dict(enumerate(holder) if isinstance(holder, list) else holder)


def tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or those of a pytree."""
    return [value] if isinstance(value, Tensor) else [x for x in tree_leaves(value) if isinstance(x, Tensor)]


class Holdings:
    """All that `owners` hold: `tensors`, `modules`, the `places` of everything, and `keepers`, which may get more to hold: lists,
    dictionaries, and functions that remember results.

    `listed` are tensors that stand in a list or dictionary which a function or an object keeps, such as a log of earlier values.
    """

    def __init__(self, owners: Any) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.listed: set[int] = set()
        self.modules: dict[int, nn.Module] = {}
        self.places: list[Place] = []
        self.keepers: list[tuple[Any, int]] = []
        self._keeps(cached_parametrizations())
        self.seen = seen = set[int]()
        # What is still to be looked into, how deep, and whether it is kept in a place.
        self.ahead: list[tuple[Any, int, bool]] = [(owners, DEPTH, False)]
        while self.ahead:
            thing, depth, kept = self.ahead.pop()
            if isinstance(thing, LEAVES):
                continue
            if isinstance(thing, Tensor):
                self.tensors[id(thing)] = thing
            elif id(thing) not in seen and (depth > 0 or isinstance(thing, nn.Module)):
                seen.add(id(thing))
                if isinstance(thing, nn.Module):
                    self._open_module(thing, max(depth, 2))
                elif isinstance(thing, (list, tuple, set, frozenset)):
                    if isinstance(thing, list):
                        self._keeps(thing)
                    self._open_items(thing, depth, kept)
                elif isinstance(thing, dict):
                    self._keeps(thing)
                    self._open_items(list(thing.values()), depth, kept)
                else:
                    self._open_object(thing, depth)

    def _keeps(self, thing: Any) -> None:
        size = 0 if hasattr(thing, "cache_clear") else len(thing)
        if size <= MANY:
            self.keepers.append((thing, size))

    def _open_items(self, items: Iterable[Any], depth: int, kept: bool) -> None:
        for item in items:
            if kept and isinstance(item, Tensor) and id(item) not in self.tensors:
                self.listed.add(id(item))
            self.ahead.append((item, depth - 1, kept))

    def _open_module(self, module: nn.Module, depth: int) -> None:
        self.modules[id(module)] = module
        parameters, buffers, children = entries_of(module)
        for entries in (parameters, buffers):
            for name, x in entries.items():
                if x is not None:
                    self.tensors[id(x)] = x
                self.places.append(Place(entries, name, x))
        for child in children.values():
            self.ahead.append((child, depth, False))
        self._open_entries(vars(module), vars(module).keys() - OF_MODULES, depth)
        if not type(module).__module__.startswith("torch."):
            self._keeps(vars(module))
            self._open_class(module, depth)

    def _open_object(self, thing: Any, depth: int) -> None:
        if not callable(thing):  # of a large program's objects, those near the field only
            depth = min(depth, 3) if depth > DEPTH - 4 else 0
        code = getattr(thing, "__code__", None)
        if code is not None:
            for name, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True):
                self._open_place(cell, name, value_in(cell, name), depth)
            self._open_entries(thing.__globals__, global_names(code), depth)
            self.ahead += ((thing.__defaults__, depth, False), (thing.__kwdefaults__, depth, False))
        partial = isinstance(thing, functools.partial)  # elsewhere these may be properties, which run a user's code
        for name in ("func", "args", "keywords") if partial else ("__self__", "__func__", "__wrapped__"):
            self.ahead.append((getattr(thing, name, None), depth - (name != "__func__"), False))
        own = getattr(thing, "__dict__", None)
        if isinstance(own, dict) and depth:
            self._open_entries(own, own, depth)
            self._keeps(own)
        if depth and code is None:
            self._open_class(thing, depth)

    def _open_class(self, thing: Any, depth: int) -> None:
        """What a user's class keeps: slots, attributes of all its instances, and results that functions remember."""
        if hasattr(thing, "cache_clear"):
            self._keeps(thing)
        for kind in type(thing).__mro__:
            if kind.__module__.partition(".")[0] in OF_OTHERS:
                continue
            new = id(kind) not in self.seen
            self.seen.add(id(kind))
            for name, value in list(vars(kind).items()):
                if isinstance(value, MemberDescriptorType):
                    self._open_place(thing, name, value_in(thing, name), depth)
                elif new and hasattr(value, "cache_clear"):
                    self._keeps(value)
                elif new and isinstance(value, (Tensor, list, dict, type(None))) and not name.startswith("__"):
                    self._open_place(kind, name, value, depth)

    def _open_entries(self, entries: dict[str, Any], names: Iterable[str], depth: int) -> None:
        for name in names:
            if name in entries:
                self._open_place(entries, name, entries[name], depth)

    def _open_place(self, holder: Any, name: str, value: Any, depth: int) -> None:
        if not isinstance(value, ModuleType):
            self.places.append(Place(holder, name, value))
            self.ahead.append((value, depth - 1, True))


def value_in(holder: Any, name: str) -> Any:
    """What stands in a place now; MISSING if nothing does."""
    if not isinstance(holder, CellType):
        return holder.get(name, MISSING) if isinstance(holder, dict) else getattr(holder, name, MISSING)
    try:
        return holder.cell_contents
    except ValueError:  # not filled yet
        return MISSING


@functools.lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The global names that code reads; names of attributes are none."""
    read = (x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return tuple(dict.fromkeys(read))


def changed(places: Iterable[Place]) -> list[tuple[Place, Any]]:
    """The places where another value stands now, with that."""
    found = []
    for place in places:
        holder, name, value = place
        now = holder.get(name, MISSING) if holder.__class__ is dict else value_in(holder, name)
        if now is not value and not (isinstance(value, PLAIN) and type(now) is type(value) and now == value):
            found.append((place, now))
    return found
