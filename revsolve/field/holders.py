"""What a callable holds, wherever Python lets it: tensors, modules, and the places in which they stand.

A place is an attribute, a cell of a closure or a global name. A field that is called again later must find there what it found
when it was solved, though other values may have been put there in between.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable
from functools import lru_cache
from types import CellType, CodeType, ModuleType
from typing import Any

from torch import Tensor, nn

from revsolve.field.functorch import registered

DEPTH = 6
OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, complex, str, bytes, type(None))
MISSING = object()


class Place:
    """Where a value stands: entry `name` of a dictionary, or a cell of a closure."""

    __slots__ = ("holder", "name")

    def __init__(self, holder: Any, name: str) -> None:
        self.holder, self.name = holder, name

    def get(self) -> Any:
        if isinstance(self.holder, CellType):
            try:
                return self.holder.cell_contents
            except ValueError:  # not filled yet
                return MISSING
        return self.holder.get(self.name, MISSING)

    def set(self, value: Any) -> None:
        if isinstance(self.holder, CellType):
            self.holder.cell_contents = value
        else:
            self.holder[self.name] = value


class Holdings:
    """All that `owners` hold: `tensors`, `modules`, and the `places` of everything.

    `listed` are tensors that stand in a list or dictionary which a function or an object keeps, such as a log of earlier values.
    """

    def __init__(self, owners: Any) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.listed: set[int] = set()
        self.modules: dict[int, nn.Module] = {}
        self.places: list[tuple[Place, Any]] = []
        self._seen: dict[int, Any] = {}
        self._add(owners, DEPTH)

    def _add(self, thing: Any, depth: int, kept: bool = False) -> None:
        if isinstance(thing, (*PLAIN, type, ModuleType)):
            return
        if isinstance(thing, Tensor):
            self.tensors[id(thing)] = thing
            return
        if id(thing) in self._seen or (depth <= 0 and not isinstance(thing, nn.Module)):
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            self._add_module(thing, max(depth, 1))
        elif isinstance(thing, (list, tuple, set, frozenset)):
            self._add_items(thing, depth, kept)
        elif isinstance(thing, dict):
            self._add_items(list(thing.values()), depth, kept)
        else:
            self._add_object(thing, depth)

    def _add_items(self, items: Iterable[Any], depth: int, kept: bool) -> None:
        for item in items:
            if kept and isinstance(item, Tensor) and id(item) not in self.tensors:
                self.listed.add(id(item))
            self._add(item, depth - 1, kept)

    def _add_module(self, module: nn.Module, depth: int) -> None:
        self.modules[id(module)] = module
        for entries in registered(module):
            for name, x in entries.items():
                if x is not None:
                    self.tensors[id(x)] = x
                self.places.append((Place(entries, name), x))
        for child in module.children():
            self._add(child, depth)
        self._add_attributes(vars(module), depth, OF_MODULES)

    def _add_object(self, thing: Any, depth: int) -> None:
        if not callable(thing):  # of a large program's objects, those near the field only
            depth = min(depth, 3) if depth > DEPTH - 3 else 0
        code = getattr(thing, "__code__", None)
        if code is not None:
            for name, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True):
                self._add_place(Place(cell, name), depth)
            for name in global_names(code):
                if name in thing.__globals__:
                    self._add_place(Place(thing.__globals__, name), depth)
            for defaults in (thing.__defaults__, thing.__kwdefaults__):
                self._add(defaults, depth)
        for name in ("__self__", "__func__", "func", "args", "keywords", "__wrapped__"):
            self._add(getattr(thing, name, None), depth - (name != "__func__"))
        own = getattr(thing, "__dict__", None)
        if isinstance(own, dict) and depth:
            self._add_attributes(own, depth)

    def _add_attributes(self, own: dict[str, Any], depth: int, but: frozenset[str] = frozenset()) -> None:
        for name in list(own):
            if name not in but:
                self._add_place(Place(own, name), depth)

    def _add_place(self, place: Place, depth: int) -> None:
        value = place.get()
        if not isinstance(value, ModuleType):
            self.places.append((place, value))
            self._add(value, depth - 1, kept=True)


@lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The global names that code reads; names of attributes are none."""
    read = (x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return tuple(dict.fromkeys(read))


def changed(places: list[tuple[Place, Any]]) -> list[tuple[Place, Any, Any]]:
    """The places whose value is another one now: with what stood there, and what stands there."""
    found = []
    for place, value in places:
        now = place.get()
        if now is not value and not (isinstance(value, PLAIN) and type(now) is type(value) and now == value):
            found.append((place, value, now))
    return found
