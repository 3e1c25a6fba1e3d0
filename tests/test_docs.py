"""Public names are documented, and the documentation names only what exists."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import revsolve
from tests.pages import PAGES, ROOT, page_name

PUBLIC = sorted(getattr(revsolve, "__all__", ()))
CALLABLES = [name for name in PUBLIC if callable(getattr(revsolve, name))]

# A name of the package in prose or code, and a file of the project.
NAMES = re.compile(r"\brevsolve(?:\.[A-Za-z_]\w*)+")
FILES = re.compile(r"\b(?:revsolve|tests|notebooks|docs)/[\w./-]*\w\.(?:py|md|ipynb|csv)\b")


def documentation(name: str) -> str:
    """Docstring of a public name; for a class with that of its methods, where their errors and shapes stand."""
    thing = getattr(revsolve, name)
    own_methods = [m for m in vars(thing).values() if callable(m)] if inspect.isclass(thing) else []
    return "\n".join(inspect.getdoc(part) or "" for part in [thing, *own_methods])


def may_raise(name: str) -> bool:
    """Functions do, by way of the checks they call; a class where its own text raises."""
    thing = getattr(revsolve, name)
    return not inspect.isclass(thing) or "raise " in inspect.getsource(thing)


def exists(dotted: str) -> bool:
    """Whether the longest importable start of a dotted name has the rest of it as attributes."""
    module, *rest = dotted.split(".")
    found = importlib.import_module(module)
    for name in rest:
        submodule = f"{module}.{name}"
        if not hasattr(found, name) and importlib.util.find_spec(submodule):
            importlib.import_module(submodule)
        if not hasattr(found, name):
            return False
        found, module = getattr(found, name), submodule
    return True


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    thing = getattr(revsolve, name)
    assert (inspect.getdoc(thing) or "").strip()
    assert inspect.getdoc(thing) != inspect.getdoc(object)


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring_states_shapes(name: str) -> None:
    assert re.search(r"shape|scalar|\(\.\.\.|\(\w+(, [\w*]+)+\)|\(\w+,\)|length", documentation(name))


@pytest.mark.parametrize("name", [name for name in CALLABLES if may_raise(name)])
def test_docstring_states_errors(name: str) -> None:
    assert re.search(r"^\s*Raises:", documentation(name), re.MULTILINE)


@pytest.mark.parametrize("name", CALLABLES)
def test_docstring_states_its_source(name: str) -> None:
    assert re.search(r"\b(18|19|20)\d\d\b|DESIGN|architecture", documentation(name)), "cite the paper: authors (year)"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_names_on_the_page_exist(page: Path) -> None:
    named = set(NAMES.findall(page.read_text(encoding="utf-8")))
    assert not {name for name in named if not exists(name)}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_on_the_page_exist(page: Path) -> None:
    named = set(FILES.findall(page.read_text(encoding="utf-8")))
    assert not {path for path in named if not (ROOT / path).exists()}
