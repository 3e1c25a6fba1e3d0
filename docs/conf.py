"""Sphinx configuration. `make docs` builds with -W: a warning is an error."""

import ast
import re
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent

project = "revsolve"
author = "The revsolve contributors"
copyright = f"2026, {author}"  # noqa: A001 (the name Sphinx reads)
release = version = installed_version("revsolve")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "figures"]
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Docstrings write code in single backquotes.
default_role = "code"

html_theme = "furo"
html_title = f"revsolve {release}"
html_theme_options = {
    "source_repository": "https://github.com/revsolve/revsolve/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# A lone $ is a price or a prompt, not the start of a formula.
myst_dmath_allow_space = False
# The committed notebooks carry their plots; `make notebooks` is what executes them.
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"

autodoc_typehints = "signature"
# One argument a line.
maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def copy_notebooks(source: Path, target: Path) -> None:
    """Bring the notebooks below docs/, where Sphinx looks for pages; those that are gone disappear there too."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted(source.glob("*.ipynb")):
        shutil.copy2(notebook, target)


copy_notebooks(DOCS.parent / "notebooks", DOCS / "notebooks")


def take_literally(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """In docstrings | and * mean themselves, as in ||z - f(z)|| and (T, *y0.shape); code and examples are left alone."""
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)
        if i and lines[i - 1].strip() == "Returns:":
            # what comes back is said in words, and the words before a colon are no type
            lines[i] = re.sub(r"^(\s*)", r"\1: ", lines[i])


def show_results(app: Any, page: str, source: list[str]) -> None:
    """Every dated result stands on the page of benchmarks below what its script says of itself."""
    for result in sorted((DOCS / "benchmarks" / "results").glob("*.txt")) if page == "benchmarks" else ():
        script, text = DOCS / "benchmarks" / f"{result.stem}.py", result.read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.name
        heading, _, rest = about.partition(": `")
        rest = rest.partition("\n")[2]
        body = text if "|---" in text else f"```text\n{text}```"
        source[0] += f"\n## {heading}\n{rest}\n\n`docs/benchmarks/{script.name}`\n\n{body}\n"


def setup(app: Any) -> None:
    app.connect("source-read", show_results)
    # before napoleon, whose own markup needs its stars
    app.connect("autodoc-process-docstring", take_literally, priority=100)
