"""Finds the application that runs on this host, by its directory for statistics."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from dbpool._secrets import safe_repr
from dbpool.errors import ConfigError
from dbpool.processes import Processes
from dbpool.processes._directory import find_directories
from dbpool.settings.app import AppSettings, find_dotenv

_FILE: Final = re.compile(r"(\w+)(?:-\d+)+\.json|(.+)\.archive")


def statistics_directory(given: str | None) -> str | Path | None:
    """Return the directory that is given or set, else that of the only application that runs."""
    return given or AppSettings.from_env(dotenv=find_dotenv()).stats_dir or running_directory()


def running_directory() -> Path | None:
    """Return the directory of the only application that runs here, None if none does."""
    found = find_directories()
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ConfigError(f"several applications run here; choose one with --dir: {names}")
    return found[0] if found else None


def find_processes(directory: Path, app: str | None) -> Processes:
    """Return the processes of the application that writes there.

    Raises `ConfigError` if there is none, or if several do and *app* does not choose one.
    """
    if not os.path.isdir(directory):  # noqa: PTH112  # unlike Path.is_dir it never raises
        place = safe_repr(os.fspath(directory))
        raise ConfigError(
            f"the directory of the statistics (--dir, DBPOOL_STATS_DIR) is missing: {place}"
        )
    place = str(directory)  # what exists is no misplaced secret
    matches = [_FILE.fullmatch(path.name) for path in directory.glob("*")]
    apps = sorted({match[1] or match[2] for match in matches if match})
    if app is None and len(apps) > 1:
        raise ConfigError(
            f"several applications share {place}; choose one with --app {' or '.join(apps)}"
        )
    if not apps or (app is not None and app not in apps):
        raise ConfigError(f"{place} contains no statistics{f' of {app}' if app else ''}")
    return _processes(directory, app or apps[0])


@lru_cache(maxsize=1)
def _processes(directory: Path, app: str) -> Processes:
    """Return the same object for each request of the door: it remembers what it has logged."""
    return Processes({}, directory, app)
