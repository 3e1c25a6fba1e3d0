"""The pages a reader meets, README and docs/*.md, and the code blocks on them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^(?P<ticks>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[tuple[str, int, str]]:
    """What each fence says it holds, the line its body starts on, and the body."""
    text = page.read_text(encoding="utf-8")
    return [
        (match["info"].strip(), text.count("\n", 0, match.start("body")), match["body"])
        for match in FENCE.finditer(text)
    ]
