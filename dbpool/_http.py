"""What the blueprint and the door both say in HTTP; knows no web framework."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Final

FILES: Final = Path(__file__).parent / "flask"  # the pages, and what they load
_PLACE: Final = re.compile(r"\{\{ (?:url_for\('\.(\w+)'(?:, filename='([\w.-]+)')?\)|(\w+)) \}\}")


def read_template(name: str) -> str:
    """Return the text of a page with its places still to be filled."""
    return (FILES / "templates" / "dbpool" / name).read_text("utf-8")


def render(template: str, url_for: Callable[[str, str | None], str], **values: str) -> str:
    """Fill in a template. Its places are only *values*, and the URLs of views and files.

    No template engine does this: what an application adds to all of its pages, such as the user
    who is signed in, may need the database that the page tells about.
    """

    def fill(place: re.Match[str]) -> str:
        view, file, value = place.groups()
        return escape(values[value] if value else url_for(view, file))

    return _PLACE.sub(fill, template)


def retry_after(seconds: float | None) -> str:
    """Return a `Retry-After`: whole seconds, at least one.

    A random part of up to a half, or up to two seconds, is added: clients that were rejected
    together should not come back together.
    """
    soonest = max(1, math.ceil(seconds or 0.0))
    return str(random.randint(soonest, soonest + max(2, soonest // 2)))  # noqa: S311  # no secret
