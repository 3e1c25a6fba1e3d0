"""What a callable holds, wherever Python lets it: tensors, modules, and the places in which they stand.

A place is an attribute, a cell of a closure or a global name. A field that is called again later must find there what it found
when it was solved, though other values may have been put there in between.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable
from functools import lru_cache
from types import CellType, CodeType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from revsolve.field.functorch import entries_of

DEPTH = 6
OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, complex, str, bytes, type(None))
LEAVES = (*PLAIN, type, ModuleType)
MISSING = object()


class Place(NamedTuple):
    """Where a value was found: entry `name` of a dictionary, or a cell of a closure."""

    holder: Any
    name: str
    value: Any

    def put(self, value: Any) -> None:
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
        self.places: list[Place] = []
        seen = set()
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
                    self._open_module(thing, max(depth, 1))
                elif isinstance(thing, (list, tuple, set, frozenset)):
                    self._open_items(thing, depth, kept)
                elif isinstance(thing, dict):
                    self._open_items(list(thing.values()), depth, kept)
                else:
                    self._open_object(thing, depth)

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

    def _open_object(self, thing: Any, depth: int) -> None:
        if not callable(thing):  # of a large program's objects, those near the field only
            depth = min(depth, 3) if depth > DEPTH - 3 else 0
        code = getattr(thing, "__code__", None)
        if code is not None:
            for name, cell in zip(code.co_freevars, thing.__closure__ or (), strict=True):
                self._open_place(cell, name, value_in(cell, name), depth)
            self._open_entries(thing.__globals__, global_names(code), depth)
            self.ahead += ((thing.__defaults__, depth, False), (thing.__kwdefaults__, depth, False))
        for name in ("__self__", "__func__", "func", "args", "keywords", "__wrapped__"):
            self.ahead.append((getattr(thing, name, None), depth - (name != "__func__"), False))
        own = getattr(thing, "__dict__", None)
        if isinstance(own, dict) and depth:
            self._open_entries(own, own, depth)

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
        return holder.get(name, MISSING)
    try:
        return holder.cell_contents
    except ValueError:  # not filled yet
        return MISSING


@lru_cache(maxsize=1024)
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
