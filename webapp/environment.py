"""What a start of gunicorn reads from the environment: address, port, workers, kind of log."""

import os
import re
import sys

NUMBERS = {"PORT": ("8000", 65535), "WEB_CONCURRENCY": ("2", 1000)}  # default, at most


def set_number(name: str) -> int:
    """Write a valid number back to the environment and return it; else exit with one line.

    Compose and Helm turn a variable that is not set into an empty string, so that counts as the
    default. gunicorn would end in a traceback there, and would start no worker for 0.
    """
    default, maximum = NUMBERS[name]
    given = os.environ.get(name, "").strip() or default
    if not re.fullmatch("[0-9]{1,5}", given) or not 1 <= int(given) <= maximum:
        sys.exit(f"webapp: {name} must be a number from 1 to {maximum}, not {given[:20]!r}")
    os.environ[name] = given
    return int(given)


def bind_address() -> str:
    """Return the address to listen on, in gunicorn's form: an IPv6 address has brackets."""
    host = os.environ.get("WEBAPP_HOST", "").strip("[] ") or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{os.environ.get('PORT') or NUMBERS['PORT'][0]}"


def log_kind() -> str:
    """Write `text`, the default, or `json` back to WEBAPP_LOG and return it; else exit."""
    given = os.environ.get("WEBAPP_LOG", "").strip().lower() or "text"
    if given not in ("text", "json"):
        sys.exit("webapp: WEBAPP_LOG must be text or json")  # another value may be a secret
    os.environ["WEBAPP_LOG"] = given
    return given
