"""`python -m webapp.serve`: gunicorn as a container runs it; options of gunicorn's may follow.

PORT and WEB_CONCURRENCY are read here first. gunicorn ends in a traceback where one is empty,
which is what compose and Helm make of a variable that is not set, and starts no worker for 0.
"""

import os
import re
import sys

NUMBERS = {"PORT": ("8000", 65535), "WEB_CONCURRENCY": ("2", 1000)}  # default, at most


def main() -> None:
    """Become gunicorn."""
    for name, (default, most) in NUMBERS.items():
        given = os.environ.get(name, "").strip() or default
        if not re.fullmatch("[0-9]{1,5}", given) or not 1 <= int(given) <= most:
            sys.exit(f"webapp: {name} must be a number from 1 to {most}, not {given[:20]!r}")
        os.environ[name] = given
    gunicorn = [sys.executable, "-m", "gunicorn", "--config", "webapp/gunicorn.conf.py"]
    os.execv(sys.executable, [*gunicorn, *sys.argv[1:], "webapp:create_app()"])  # noqa: S606


if __name__ == "__main__":
    main()
