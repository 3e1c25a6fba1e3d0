"""The package is layers, and imports point down only (docs/architecture.md).

An arrow up would let the engine know who uses it; two modules importing each other could only be read together.
"""

import ast
import sys
from graphlib import TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PACKAGE = Path(__file__).parents[1] / "revsolve"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONTENTS = {path.name for path in PACKAGE.iterdir()}
LAYERS = (
    {"core"},
    {"field", "restarts", "steppers"},
    {"backends", "schemes"},
    {"brownian", "paths"},
    {"compat"},
    {"prepare"},
    {"solution"},
    {"extras"},
    {"ode", "cde", "sde", "fixed_points", "divergence"},
    {"torchdeq"},
    {"__init__"},
)
TORCH_ONLY = {"core", "backends"}
# Imported by a module of the same name only, which nothing else imports.
OPTIONAL = {"torchdeq": {"torchdeq"}}
REQUIRED = {r.name: r.specifier for r in map(Requirement, requires("revsolve") or ()) if r.marker is None}


def module_name(path: Path) -> str:
    """`revsolve.core.gradient`; a package is named by its folder."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, at any depth; `from a import b` gives a.b."""
    package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """What stands in LAYERS for a dotted name: `core` for `revsolve.core.gradient`; a public name is `__init__`'s."""
    first = name.split(".")[1:2]
    return first[0] if first and {first[0], f"{first[0]}.py"} & CONTENTS else "__init__"


def level(name: str) -> int:
    found = [i for i, layer in enumerate(LAYERS) if part(name) in layer]
    assert found, (
        f"{name}: give {part(name)!r} its place in LAYERS of {Path(__file__).name} and in docs/architecture.md"
    )
    return found[0]


def own_imports(path: Path) -> set[str]:
    return {name for name in imported_names(path) if name.split(".")[0] == "revsolve"}


def foreign_imports(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)} - {"revsolve"} - sys.stdlib_module_names


def imported_modules(path: Path) -> set[str]:
    """Like own_imports, but cut back to the module a name was taken from."""
    known = {module_name(module) for module in MODULES}
    return {name if name in known else name.rpartition(".")[0] for name in own_imports(path)} - {module_name(path)}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    upward = {other for other in own_imports(path) if part(other) != part(name) and not level(other) < level(name)}
    assert not upward, f"{name} imports {upward}: only layers below its own may be imported"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_declared_dependencies(path: Path) -> None:
    allowed = {"torch"} if part(module_name(path)) in TORCH_ONLY else REQUIRED.keys() | OPTIONAL.get(path.stem, set())
    assert foreign_imports(path) <= allowed


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter({module_name(path): imported_modules(path) for path in MODULES}).prepare()


def test_only_what_is_imported_is_required() -> None:
    assert REQUIRED.keys() == {"torch", "numpy", "tqdm"}


@pytest.mark.parametrize(
    "build", ["2.6.0", "2.13.0a0+gitabc", "2.6.0a0+df5bbc0.nv24.12", "2.15.0.dev20261101+cu130", "3.0"]
)
def test_builds_of_torch_that_are_admitted(build: str) -> None:
    assert build in REQUIRED["torch"]


def test_older_torch_is_refused() -> None:
    assert "2.5.1" not in REQUIRED["torch"]
