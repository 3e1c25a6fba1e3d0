"""The rules for the prose of README and docs: the field's words, short sentences, short pages, and numbers that were measured."""

import re
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, page_name

RESULTS = ROOT / "docs" / "benchmarks" / "results"
LONGEST_PAGE, LONGEST_SENTENCE = 200, 45  # lines; words
MAY_BE_LONG = {"docs/api.md", "docs/works_with.md"}

# Words that only this project would use so, words that say nothing, and what native writers avoid, with what to write.
RULES = {
    r"front doors?": "solver",
    r"\bdrivers?\b": "control",
    r"is foreseen|foresee": "say what happens",
    r"without a word": "by default",
    r"\bthe looks? at\b": "the check of",
    r"\bof (?:its|their) own(?! \w)|of each sample's own": "own, separate",
    r"\bby themselves\b": "automatically",
    r"\bhere too\b": "also",
    r"\bhas but\b|\bhave but\b|\bbut for\b": "except",
    r"\bever\b(?! more| since)": "at any time",
    r"\bas ever\b": "as usual",
    r"\bthe very (?:same|steps)\b": "the same",
    r"\bnow and then\b": "occasionally",
    r"\bobviously\b|\bclearly\b|\bof course\b|\bsimply\b|\bbasically\b|\bvery\b": "leave it out",
    r"\butili[sz]e": "use",
    r"\bin order to\b": "to",
    r"\ba number of\b": "several",
    r"\bdue to the fact that\b": "because",
    r"  +(?=\S)": "one space",
    r"\b(\w+) \1\b": "the word once",
}
# Words of the glossary, which explains them, and pages that explain them again where they use them.
TERMS = {
    r"\banchors?\b": {"docs/glossary.md", "docs/equilibria.md", "docs/api.md"},
    r"\btapes?\b": {"docs/glossary.md"},
    r"\bcertificate\b": {"docs/glossary.md", "docs/exactness.md"},
}

CODE = re.compile(r"^(`{3,}|:{3,}|~{3,}).*?^\1\s*$|^\$\$.*?\$\$|<!--.*?-->|^    .*?$", re.MULTILINE | re.DOTALL)
SPANS = re.compile(r"`[^`\n]*`|\$[^$\n]*\$|\{math\}|\]\([^)]*\)|!\[[^\]]*\]")
MEASURED = re.compile(r"<!-- measured: ([\w.]+) -->\n+((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*(?:e[-+]\d+)?")


def prose(page: Path) -> str:
    """The text of a page, without code, formulas, links' targets and directives."""
    return SPANS.sub("x", CODE.sub("", page.read_text(encoding="utf-8")))


def sentences(page: Path) -> list[str]:
    """Sentences of the paragraphs and lists; rows of tables and headings are none."""
    lines = [line for line in prose(page).splitlines() if not line.lstrip().startswith(("|", "#"))]
    parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", "\n".join(lines))
    return [s for part in parts for s in re.split(r"(?<=[.!?:;])\s+", " ".join(part.split()))]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_prose_follows_the_rules(page: Path) -> None:
    rules = RULES | {term: "a plain word" for term, pages in TERMS.items() if page_name(page) not in pages}
    lines = [re.sub(r"\s*\|\s*", "; ", line.strip()) for line in prose(page).splitlines()]
    found = [
        f"{match[0]!r} in {line.strip()!r}: {better}"
        for pattern, better in rules.items()
        for line in lines
        if (match := re.search(pattern, line, re.IGNORECASE))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_sentences_are_short(page: Path) -> None:
    found = [s for s in sentences(page) if len(s.split()) > LONGEST_SENTENCE]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_pages_are_short(page: Path) -> None:
    assert page_name(page) in MAY_BE_LONG or len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST_PAGE


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_numbers_were_measured(page: Path) -> None:
    """Each number of a table marked as measured stands in the result that it names."""
    for name, table in MEASURED.findall(page.read_text(encoding="utf-8")):
        cells = re.sub(r"`[^`]*`", "", "".join(table.splitlines(keepends=True)[2:]))
        result = set(NUMBER.findall((RESULTS / name).read_text(encoding="utf-8")))
        assert {number.rstrip(",.") for number in NUMBER.findall(cells)} <= {n.rstrip(",.") for n in result}
