"""What each error and diagnosis means: one page of Markdown for each code, part of the package."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Final

__all__ = ["as_text", "find", "pages"]

_HEADING: Final = "## "


@cache
def pages() -> dict[str, str]:
    """Return the page of each code, as Markdown: the errors DBE01 …, then the diagnoses DB00 …."""
    found = [entry for entry in files(__name__).iterdir() if entry.name.endswith(".md")]
    found.sort(key=lambda entry: (not entry.name.startswith("DBE"), entry.name))
    return {entry.name.removesuffix(".md"): entry.read_text(encoding="utf-8") for entry in found}


def title(page: str) -> str:
    """Return a page's heading, which begins with its code."""
    return page.partition("\n")[0].removeprefix(_HEADING)


def find(wanted: str) -> list[str]:
    """Return the codes that *wanted* means: a text with a code, or words of a title, in any case."""
    if (code := re.search(r"\bDBE?[0-9]{2}\b", wanted.upper())) and code[0] in pages():
        return [code[0]]
    words = wanted.lower()
    return [code for code, page in pages().items() if words in title(page).lower()]


def as_text(page: str) -> str:
    """Return a page for a terminal, without Markdown's marks for links and emphasis."""
    text = re.sub(r"\[([^]]+)\]\((?:errors\.md)?#[^)]+\)", r"\1", page.removeprefix(_HEADING))
    text = re.sub(r"\[([^]]+)\]\(([\w-]+\.md)[^)]*\)", r"\1 (docs/\2)", text)
    text = re.sub(r"\*\*([^*]+?)(\.?)\*\*", r"\1:", text)
    text = re.sub(r"(?<!\w)\*([^*\n]+)\*", r"\1", text)
    lines, is_code = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            is_code = not is_code
        elif is_code:
            lines.append(f"    {line}")
        elif not re.fullmatch(r"[|:-]+", line):  # the rule below a table's head
            lines.append(line)
    return "\n".join(lines)
