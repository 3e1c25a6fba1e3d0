"""The python blocks of README and docs run as they stand, page by page, in order."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
from packaging.version import Version

from tests.pages import PAGES, fences, page_name

# Anything else could hide code from this test: ```py, ```pycon, a fence that names nothing.
NOT_RUN = {"text", "console", "bibtex"}


def is_run(info: str, body: str) -> bool:
    """A block that begins with `# needs PACKAGE` or `# needs PACKAGE VERSION` runs where that is installed."""
    needed = re.match(r"# needs (\w+)(?: ([\d.]+))?\n", body)
    if info != "python" or needed is None or find_spec(needed[1]) is None:
        return info == "python" and needed is None
    return needed[2] is None or Version(version(needed[1])) >= Version(needed[2])


def run_blocks(page: Path) -> None:
    """Run the page's python blocks in one namespace; a traceback shows the page's own line numbers."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for info, line, body in fences(page):
        if is_run(info, body):
            exec(compile("\n" * line + body, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_says_what_it_holds(page: Path) -> None:
    unknown = {info for info, _, _ in fences(page) if not info.startswith("{")} - NOT_RUN - {"python"}
    assert not unknown, f"name each fence python (it is run) or one of {sorted(NOT_RUN)} (it is not)"


def test_what_the_recipes_need_is_no_requirement() -> None:
    needed = {name for page in PAGES for name in re.findall(r"^# needs (\w+)$", page.read_text("utf-8"), re.MULTILINE)}
    assert needed == {"flow_matching", "zuko", "lightning"}
