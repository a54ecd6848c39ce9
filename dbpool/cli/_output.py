"""How commands print: one line for each message, no control characters, and errors as JSON."""

from __future__ import annotations

import json
import sys

from dbpool._secrets import printable


def fail(reason: object, *, as_json: bool = False) -> int:
    """Print why a command failed; return its exit status."""
    if as_json:
        print(json.dumps({"ok": False, "error": str(reason)}, indent=2))
    print(f"dbpool: {line(reason)}", file=sys.stderr)
    return 1


def line(text: object) -> str:
    """Return a text on one line; libpq spreads its messages over several."""
    return printable(str(text))
