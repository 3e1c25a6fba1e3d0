"""Sphinx configuration. `make docs` builds with -W: a warning is an error."""

import shutil
from importlib.metadata import version as installed_version
from pathlib import Path

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
exclude_patterns = ["_build"]

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
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False


def copy_notebooks(source: Path, target: Path) -> None:
    """Bring the notebooks below docs/, where Sphinx looks for pages; those that are gone disappear there too."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted(source.glob("*.ipynb")):
        shutil.copy2(notebook, target)


copy_notebooks(DOCS.parent / "notebooks", DOCS / "notebooks")
