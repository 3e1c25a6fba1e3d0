"""A snapshot of what a callable holds, wherever Python lets it: tensors, modules, and all that is kept beside them.

A field that is called again later must find what it found when it was solved, though other values may have been put there in
between, by its user or by itself.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import BuiltinMethodType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from revsolve.field.functorch import cached_parametrizations, entries_of

DEPTH = 7
OF_MODULES = frozenset(vars(nn.Module()))  # attributes in which no field keeps anything of its own
PLAIN = (bool, int, float, complex, str, bytes, type(None))
LEAVES = frozenset((*PLAIN, ModuleType))
OF_OTHERS = sys.stdlib_module_names | {"torch", "numpy", "revsolve"}  # packages whose classes keep nothing of a field's
MISSING = object()
MANY = 4096  # entries of what is data, not a cache: it is not copied in every solve
GIVEN, HELD, LISTED = range(3)  # by the caller; in an attribute, a cell or a global; in a list or dictionary there

# A list or dictionary, or an object whose attributes count; the names of these, WHOLE for all entries, or CALLS for the number of
# results that a function keeps (functools.lru_cache), which can only be cleared; and what stood there.
Entries = tuple[Any, Any, dict[Any, Any]]
Changes = list[tuple[Entries, dict[Any, Any]]]  # what stands there now instead, MISSING for nothing
WHOLE, CELL, CALLS = None, ("cell_contents",), ("misses",)


class Snapshot:
    """All that `owners` hold: `tensors`, `modules`, and the `entries` in which these and other values stand.

    `listed` are tensors that stand in a list or dictionary which a function or an object keeps, such as a log of earlier values.
    """

    def __init__(self, owners: Any = None) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.listed: set[int] = set()
        self.modules: dict[int, nn.Module] = {}
        self.entries: list[Entries] = []
        self.unsteady = set[tuple[int, Any]]()  # what the field changes in every call, it seems
        self.seen = set[int]()
        # What is still to be looked into, how deep, and how it is held.
        self.ahead: list[tuple[Any, int, int]] = [(owners, DEPTH, GIVEN)]
        if owners is not None:
            self._keep(cached_parametrizations(), WHOLE, 0)
            self._walk()

    def changes(self) -> Changes:
        """What is another value now. What comes new, or changes in every call, counts only where the field keeps tensors that it
        computed: what it keeps besides belongs to these."""
        changed: Changes = []
        for entries in self.entries:
            owner, names, then = entries
            now = owner if names is WHOLE and isinstance(owner, dict) else _read(owner, names)
            if len(now) == len(then) and all(map(operator.is_, now.values(), then.values())):
                continue
            found = {key: x for key, x in now.items() if not _same(x, then.get(key, MISSING))}
            found |= {key: MISSING for key in then if key not in now}
            if not (names is CALLS or computed_in(list(found.values()))):
                found = {k: x for k, x in found.items() if k in then and (id(then), k) not in self.unsteady}
            if found:
                changed.append((entries, found))
        return changed

    @contextmanager
    def restored(self) -> Iterator[None]:
        """All as it was, for as long as the context is open."""
        changes = self.changes()
        try:
            self.forget(changes)
            yield
        finally:
            for entries, found in changes:
                put(entries, found)

    @contextmanager
    def undone(self, before: Changes) -> Iterator[None]:
        """What is changed within the context is put back to what `before` says."""
        try:
            yield
        finally:
            self.forget(self.changes())
            for entries, found in before:
                put(entries, found)

    def forget(self, changes: Changes, kept: Callable[[Tensor], bool] | None = None) -> None:
        """Put back what stood there before these changes; if `kept` is given, only where they hold such tensors, or where nobody
        can look."""
        for entries, found in changes:
            _, names, then = entries
            if kept is None or names is CALLS or any(map(kept, computed_in(list(found.values())))):
                put(entries, {key: then.get(key, MISSING) for key in found})

    def settle(self, changes: Changes) -> None:
        """Take what is there now as it was, after a call of the field that made these changes."""
        for (owner, names, then), found in changes:
            if names is not CALLS:
                self.unsteady |= {(id(then), key) for key in found}
            then.clear()
            then |= _read(owner, names)
            self.ahead += [(x, DEPTH - 2, HELD) for x in found.values() if not isinstance(x, Tensor)]
        self._walk()

    def _walk(self) -> None:
        ahead, seen = self.ahead, self.seen
        while ahead:
            thing, depth, how = ahead.pop()
            if isinstance(thing, Tensor):
                if how != LISTED:
                    self.listed.discard(id(thing))
                elif id(thing) not in self.tensors:
                    self.listed.add(id(thing))
                self.tensors[id(thing)] = thing
            elif thing.__class__ in LEAVES or id(thing) in seen:
                continue
            elif isinstance(thing, nn.Module):
                seen.add(id(thing))
                self._open_module(thing, max(depth, 4))
            elif depth > 0:
                seen.add(id(thing))
                if isinstance(thing, (list, dict, deque)) and len(thing) <= MANY:
                    self._keep(thing, WHOLE, depth, LISTED if how else GIVEN)
                elif isinstance(thing, (list, dict, deque, tuple, set, frozenset)):
                    for x in thing.values() if isinstance(thing, dict) else thing:
                        ahead.append((x, depth - 1, LISTED if how else GIVEN))
                elif not isinstance(thing, (type, ModuleType)):
                    self._open_object(thing, depth)
                elif isinstance(thing, type) and not _of_others(thing.__module__):
                    seen.discard(id(thing))
                    self._open_class(thing, depth)

    def _keep(self, owner: Any, names: Any, depth: int, how: int = HELD, but: Collection[str] = ()) -> None:
        """Note what stands there, which is to be looked into."""
        then = _read(owner, names)
        self.entries.append((owner, names, then))
        for name, x in then.items():
            if name not in but and x.__class__ not in LEAVES:
                self.ahead.append((x, depth - 1, how))

    def _open_module(self, module: nn.Module, depth: int) -> None:
        self.modules[id(module)] = module
        own, of_torch = vars(module), type(module).__module__.startswith("torch.")
        for entries in entries_of(module):
            if entries or not of_torch:
                self._keep(entries, WHOLE, depth + 1)
        self._keep(own, WHOLE, depth, but=OF_MODULES)
        if not of_torch:
            self._open_classes(module, depth)

    def _open_object(self, thing: Any, depth: int) -> None:
        # Of a large program's objects, those near the field, and what those of modules hold themselves.
        if not callable(thing):
            depth = min(depth, 3 if depth > 3 else 2)
            if depth < 2:
                return
        code = getattr(thing, "__code__", None)
        if isinstance(code, CodeType):
            self._open_function(thing, code, depth)
        elif isinstance(thing, functools.partial):
            self.ahead += [(x, depth - 1, GIVEN) for x in (thing.func, thing.args, thing.keywords)]
        elif isinstance(thing, (MethodType, BuiltinMethodType)):
            self.ahead += ((thing.__self__, depth - 1, GIVEN), (getattr(thing, "__func__", None), depth, GIVEN))
        own = getattr(thing, "__dict__", None)
        if isinstance(own, dict):
            self._keep(own, WHOLE, depth)
        if code is None:
            if hasattr(thing, "cache_clear"):
                self._keep(thing, CALLS, 0)
            self._open_classes(thing, depth)

    def _open_function(self, function: Any, code: CodeType, depth: int) -> None:
        for cell in function.__closure__ or ():
            self._keep(cell, CELL, depth)
        self.ahead += ((function.__defaults__, depth, HELD), (function.__kwdefaults__, depth, HELD))
        names, known = global_names(code), function.__globals__
        if names and not _of_others(known.get("__name__")):
            self._keep(known, names, depth)
            for name in names:
                x = known.get(name)
                if x.__class__ is ModuleType and not _of_others(x.__name__):
                    self._keep(vars(x), code.co_names, depth - 1)

    def _open_classes(self, thing: Any, depth: int) -> None:
        """What a user's classes keep: slots, attributes of all instances, and results that functions remember."""
        for kind in type(thing).__mro__:
            if not _of_others(kind.__module__):
                self._open_class(kind, depth, thing)

    def _open_class(self, kind: type, depth: int, thing: Any = None) -> None:
        """Attributes of a class; methods, if it is that of a `thing`."""
        new, slots, others = id(kind) not in self.seen, [], []  # type: bool, list[str], list[str]
        self.seen.add(id(kind))
        for name, x in list(vars(kind).items()):
            if isinstance(x, MemberDescriptorType):
                slots.append(name)
            elif not new or (name.startswith("__") and name != "__call__"):
                continue
            elif isinstance(x, FunctionType):
                if thing is not None:
                    self.ahead.append((x, depth, HELD))
            elif isinstance(x, (Tensor, list, dict, tuple, deque, *PLAIN)):
                others.append(name)
            elif hasattr(x, "cache_clear"):
                self._keep(x, CALLS, 0)
        for owner, names in ((thing, slots), (kind, others)):
            if names and owner is not None:
                self._keep(owner, names, depth)


@functools.lru_cache(maxsize=1024)
def _of_others(module: Any) -> bool:
    return str(module).partition(".")[0] in OF_OTHERS


def _read(owner: Any, names: Any) -> dict[Any, Any]:
    if isinstance(owner, dict):
        return owner.copy() if names is WHOLE else {name: owner[name] for name in names if name in owner}
    if names is WHOLE:
        return dict(enumerate(owner))
    if names is CALLS:
        return {"misses": owner.cache_info().misses}
    try:
        return {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    except ValueError:  # a cell that is not filled yet
        return {}


def put(entries: Entries, values: dict[Any, Any]) -> None:
    """Put these values there, or nothing for MISSING."""
    owner, names, then = entries
    if names is CALLS:
        owner.cache_clear()
        then["misses"] = 0  # all that comes now is new
        return
    if isinstance(owner, (list, deque)):
        items: list[Any] = list(owner)
        for key, value in values.items():
            items[key : key + (key in then or value is MISSING)] = [value]  # what came new is inserted where it was
        owner.clear()
        owner.extend(x for x in items if x is not MISSING)
        return
    for key, value in values.items():
        if isinstance(owner, dict):
            owner[key] = value
        elif value is not MISSING:
            setattr(owner, key, value)
        elif hasattr(owner, key):
            delattr(owner, key)
        if value is MISSING and isinstance(owner, dict):
            del owner[key]


def _same(now: Any, then: Any) -> bool:
    return now is then or (isinstance(then, PLAIN) and type(now) is type(then) and now == then)


def tensors_in(value: Any) -> list[Tensor]:
    """A tensor, or those of a pytree."""
    return [value] if isinstance(value, Tensor) else [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def map_tensors(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    """f of a tensor, or of all those of a pytree, which takes 8 us longer."""
    return f(value) if isinstance(value, Tensor) else tree_map_only(Tensor, f, value)


def computed_in(values: Any) -> list[Tensor]:
    """The tensors that these values hold, but for those of modules, and leaves that require a gradient, such as parameters."""
    inner = Snapshot()
    inner.ahead = [(values, DEPTH - 2, GIVEN)]
    inner._walk()
    of_modules = {id(x) for module in inner.modules.values() for x in module.buffers(recurse=False)}
    return [x for x in inner.tensors.values() if not ((x.is_leaf and x.requires_grad) or id(x) in of_modules)]


@functools.lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The global names that code reads, or functions within it; names of attributes are none."""
    read = [x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for x in code.co_consts if isinstance(x, CodeType) for name in global_names(x)]
    return tuple(dict.fromkeys([*read, *inner]))
