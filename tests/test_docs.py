"""Public names are documented, and the documentation names only what exists."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import revsolve
from tests.pages import PAGES, ROOT, page_name

PUBLIC = sorted(revsolve.__all__)
# Functions and classes; what else is public, a tableau say, is a value whose type is documented.
CODE = [name for name in PUBLIC if isinstance(getattr(revsolve, name), (FunctionType, type))]

# A name of the package in prose or code, and a file of the project.
NAMES = re.compile(r"\brevsolve(?:\.[A-Za-z_]\w*)+")
FILES = re.compile(r"\b(?:revsolve|tests|notebooks|docs)/[\w./-]*\w\.(?:py|md|ipynb|csv)\b")


def public(name: str) -> Any:
    return getattr(revsolve, name)


def methods(thing: Any) -> list[Any]:
    """What a class defines for its users; a function has none."""
    return [value for name, value in vars(thing).items() if name[0] != "_" and callable(value)]


def documentation(name: str) -> str:
    """Docstring of a public name, with those of its methods, where the errors and shapes of a class may stand."""
    return "\n".join(inspect.getdoc(part) or "" for part in [public(name), *methods(public(name))])


def handles_tensors(name: str) -> bool:
    """Whether a signature or an attribute says so; `Any` is how a pytree of tensors is annotated."""
    annotated = [public(name), *methods(public(name))]
    return bool(re.search(r"Tensor|Any", str([inspect.get_annotations(part) for part in annotated])))


def takes_arguments(thing: Any) -> bool:
    return isinstance(thing, FunctionType) and bool(inspect.signature(thing).parameters)


def may_raise(name: str) -> bool:
    """What says so in its own text, and every function that is handed tensors: it checks them."""
    front_door = handles_tensors(name) and isinstance(public(name), FunctionType)
    return front_door or "raise " in inspect.getsource(public(name))


def has_a_source(name: str) -> bool:
    """What computes follows somebody; a record or a warning does not."""
    thing = public(name)
    computes = isinstance(thing, type) and not issubclass(thing, Warning) and not dataclasses.is_dataclass(thing)
    return takes_arguments(thing) or computes


def exists(dotted: str) -> bool:
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("name", CODE)
def test_public_name_has_a_docstring(name: str) -> None:
    docstring = public(name).__doc__ or ""
    assert docstring.strip()
    assert not docstring.startswith(f"{name}("), "a dataclass without a docstring gets its signature as one"


@pytest.mark.parametrize("name", [name for name in CODE if handles_tensors(name)])
def test_docstring_states_shapes(name: str) -> None:
    assert re.search(r"shape|scalar|\(\.\.\.|\(\w+(, [\w*]+)+\)|\(\w+,\)|length", documentation(name))


@pytest.mark.parametrize("name", [name for name in CODE if may_raise(name)])
def test_docstring_states_errors(name: str) -> None:
    assert re.search(r"^\s*Raises:", documentation(name), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in CODE if has_a_source(name)])
def test_docstring_states_its_source(name: str) -> None:
    assert re.search(r"\b(18|19|20)\d\d\b|architecture", documentation(name)), "cite the paper: authors (year)"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_names_on_the_page_exist(page: Path) -> None:
    named = set(NAMES.findall(page.read_text(encoding="utf-8")))
    assert not {name for name in named if not exists(name)}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_on_the_page_exist(page: Path) -> None:
    named = set(FILES.findall(page.read_text(encoding="utf-8")))
    assert not {path for path in named if not (ROOT / path).exists()}


def test_every_public_name_is_on_the_api_page() -> None:
    listed = re.findall(r"^\.\. auto\w+:: (\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == PUBLIC


TABLES = re.compile(r"^### (\w+)\n(?:(?!^#|^\|).*\n)*((?:\|.*\n)+)", re.MULTILINE)
API_TABLES = dict(TABLES.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", API_TABLES)
def test_tables_of_arguments_are_the_signatures(name: str) -> None:
    """The same names in the same order, those below * given by keyword, with the same defaults."""
    rows = [re.findall(r"(?<=\|) *(.*?) *(?=\|)", row)[:2] for row in API_TABLES[name].splitlines()[2:]]
    known = {"torch": torch, "odeint": revsolve.odeint}
    found = {
        name.strip("`"): eval(default.strip("`"), known) if default else inspect.Parameter.empty
        for name, default in rows
    }
    parameters = inspect.signature(public(name)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    wanted = {("**" if p.kind is p.VAR_KEYWORD else "") + p.name: p.default for p in parameters}
    names = [*found]
    assert not keywords or names[names.index("*") + 1] == keywords[0]
    found.pop("*", None)
    assert [*found.items()] == [*wanted.items()]


def methods_of_the_table() -> list[tuple[str, int, float]]:
    """Each method of the table in How to choose, with its evaluations a step and the longest stable step."""
    table = (ROOT / "docs" / "how_to_choose.md").read_text(encoding="utf-8").partition("## The method")[2]
    found = []
    for names, _, evaluations, _, stable in re.findall(r"^\|(.*?)\|(.*?)\|(.*?)\|(.*?)\|(.*?)\|", table, re.MULTILINE)[
        2:
    ]:
        names, evaluations, stable = re.findall(r"`(\w+)`", names), evaluations.split(","), stable.split(",")
        for i, name in enumerate(names):
            found.append((name, int(evaluations[min(i, len(evaluations) - 1)]), float(stable[min(i, len(stable) - 1)])))
    return found


@pytest.mark.parametrize(("name", "evaluations", "stable"), methods_of_the_table())
def test_the_table_of_methods(name: str, evaluations: int, stable: float) -> None:
    def decays(step: float) -> bool:
        """Whether 60 steps of y' = -y end below where they began."""
        y0, t, options = torch.ones(1, dtype=torch.float64), [0.0, 60 * step], {"step_size": step}
        return abs(revsolve.odeint(lambda t, y: -y, y0, t, method=name, options=options)[-1].item()) <= 1

    assert decays(0.9 * stable)
    assert not decays(1.2 * stable)
    options = {"step_size": 0.01}
    with torch.no_grad():
        solution = revsolve.odeint(
            lambda t, y: -y, torch.ones(1), [0.0, 1.0], method=name, options=options, restarts=None, full_output=True
        )
    assert round(solution.stats.num_evaluations / solution.stats.num_steps) == evaluations


def test_citation_names_this_version() -> None:
    assert f"version: {revsolve.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
