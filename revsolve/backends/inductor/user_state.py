"""The objects that a field keeps tensors in, such as buffers and caches: a recording leaves no tensor without numbers there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

from revsolve.backends.inductor.torch_internals import is_fake

OPAQUE = (Tensor, type, ModuleType, str, bytes, int, float)


@contextmanager
def without_fakes(owner: Any) -> Iterator[None]:
    """Put back what the containers below `owner` held before, where they hold a fake tensor afterwards."""
    before = [(holder, _contents(holder)) for holder in _holders(owner)]
    try:
        yield
    finally:
        for holder, contents in before:
            _restore(holder, contents)


def _holders(owner: Any) -> Iterator[Any]:
    """Everything mutable below an object: dicts and lists, attributes, variables of enclosing functions and global ones."""
    stack, seen = [owner], set()
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, OPAQUE):
            continue
        seen.add(id(x))
        if isinstance(x, (dict, list, CellType)):
            yield x
        if isinstance(x, dict):
            stack += x.values()
        elif isinstance(x, (list, tuple)):
            stack += x
        elif isinstance(x, CellType):
            with suppress(ValueError):  # not filled yet
                stack.append(x.cell_contents)
        elif isinstance(x, MethodType):
            stack += (x.__self__, x.__func__)
        elif isinstance(x, FunctionType):
            named = {name: x.__globals__[name] for name in x.__code__.co_names if name in x.__globals__}
            stack += (*(x.__closure__ or ()), *named.values(), x.__dict__)
        elif hasattr(x, "__dict__"):
            stack.append(x.__dict__)


def _contents(holder: Any) -> Any:
    if not isinstance(holder, CellType):
        return holder.copy()
    with suppress(ValueError):
        return holder.cell_contents


def _restore(holder: Any, contents: Any) -> None:
    if isinstance(holder, CellType):
        with suppress(ValueError):
            if _is_fake(holder.cell_contents):
                holder.cell_contents = contents
    elif isinstance(holder, list):
        if _is_fake(holder):
            holder[:] = contents
    else:
        for key, value in list(holder.items()):
            if _is_fake((key, value)) and key in contents:
                holder[key] = contents[key]
            elif _is_fake((key, value)):
                del holder[key]


def _is_fake(x: Any, depth: int = 3) -> bool:
    if depth and isinstance(x, (dict, list, tuple)):
        return any(_is_fake(y, depth - 1) for y in (x.values() if isinstance(x, dict) else x))
    return is_fake(x)
