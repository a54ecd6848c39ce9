"""How commands print: one line per message, no control characters, the error as JSON on request."""

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
    """Put on one line what libpq spreads over several."""
    return printable(str(text))
