"""`python -m dbpool COMMAND`: for shells, containers and cron. The commands live in `dbpool/cli/`."""

from __future__ import annotations

from dbpool.cli import main, script

__all__ = ["main", "script"]

if __name__ == "__main__":
    script()
