"""`python -m dbpool explain`: what an error or a diagnosis means, without a network."""

from __future__ import annotations

import argparse

from dbpool.cli._output import fail
from dbpool.codes import as_text, find, pages, title

HELP = "explain an error or a diagnosis, such as DB04, and say what to do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a code, or words of a title."""
    parser.add_argument(
        "code", nargs="?", help="DB04, or a word such as PoolExhausted; none lists all codes"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one page, or the titles of several if the words fit several."""
    found = list(pages()) if arguments.code is None else find(arguments.code)
    if not found:
        return fail("no page has that code or those words; to list all, leave them out")
    if len(found) == 1:
        print(as_text(pages()[found[0]]))
    else:
        print("\n".join(title(pages()[code]) for code in found))
    return 0
