"""Where settings come from: the environment, and a `.env` if nobody else could have written it."""

from __future__ import annotations

import grp
import io
import logging
import os
import pwd
import re
import stat
from collections import ChainMap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from dbpool._secrets import Secret, conceal, safe_repr
from dbpool.errors import ConfigError

logger = logging.getLogger("dbpool")

_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_]\w*)((?::-[^}]*)?)\}", re.ASCII)
_SINGLE_QUOTED: Final = re.compile(r"[^=]*=\s*'")
# The other lines are for other programs; what is wrong with them does not concern us.
_OURS: Final = re.compile(r"\s*(export\s+)?(DATABASE_URL|DBPOOL_|PG)")

# Not the name of a variable: under it stands which file was not read, and why.
SKIPPED: Final = "(skipped)"
Environ = Mapping[str, str] | None  # None stands for the process's own
# A path, or the variables that were read already; None stands for no file.
Source = str | os.PathLike[str] | Mapping[str, str] | None


def read_layers(environ: Environ, dotenv: Source) -> list[Mapping[str, Any]]:
    """Return where to look, first things first: the environment, then the `.env` if any.

    `DBPOOL_DOTENV` counts where *dotenv* is None. Both are concealed.
    """
    outer = conceal(os.environ if environ is None else environ)
    if dotenv is None:
        dotenv = outer.get("DBPOOL_DOTENV") or {}
    return [outer, conceal(dotenv if isinstance(dotenv, Mapping) else read_dotenv(dotenv, outer))]


def read_dotenv(path: str | os.PathLike[str], environ: Environ = None) -> Mapping[str, str]:
    """Read a `.env` that the user named; warn if somebody else could have written it.

    Raises `ConfigError` if it is missing, is not UTF-8, or refers to a variable that is not set.
    """
    if path == "off":
        return {}
    try:
        with Path(path).open("rb") as file:
            if reason := distrust(file, [Path(path).absolute().parent]):
                logger.warning("%s is read although %s", os.fspath(path), reason)
            return parse(file, environ)
    except OSError as ex:
        problem = ex.strerror
    raise ConfigError(
        f"cannot read {safe_repr(os.fspath(path))} (dotenv, DBPOOL_DOTENV): {problem}"
    )


def find(layers: list[Mapping[str, Any]], *names: str) -> Any:
    """Return the first value that is set, looking for the first name everywhere first."""
    values = (layer.get(name) for name in names for layer in layers)
    return next((value for value in values if value not in (None, "")), None)


def secret_of(layers: list[Mapping[str, Any]], name: str) -> tuple[str | None, str | None]:
    """Return a secret's value or the path of its file, from the first layer that has one."""
    for layer in layers:
        if value := layer.get(name):
            return Secret(value), None
        if path := layer.get(f"{name}_FILE"):
            return None, Secret(path)
    return None, None


def secret(path: str, name: str) -> str:
    """Return what a secret file holds; *name* is the variable that gave its *path*."""
    try:
        return Secret(Path(path).read_text("utf-8-sig").strip("\r\n"))
    except (OSError, UnicodeDecodeError) as ex:
        reason = ex.strerror if isinstance(ex, OSError) else "it is not UTF-8"
    raise ConfigError(f"{name}: cannot read {safe_repr(path)}: {reason}")


def distrust(file: BinaryIO, passed: list[Path]) -> str:
    """Say how somebody else could have written or placed an open file; "" if nobody could."""
    directories = (*passed, Path(os.path.realpath(file.name)).parent)
    found = {"it": os.fstat(file.fileno())} | {str(each): each.stat() for each in directories}
    return next(filter(None, map(_writer, found.keys(), found.values())), "")


def _writer(name: str, found: os.stat_result) -> str:
    if found.st_uid not in (0, os.geteuid()):
        return f"{name} belongs to another user (uid {found.st_uid})"
    if found.st_mode & stat.S_IWOTH:  # if sticky too: anybody can be the first to put it there
        return f"everybody can write to {name}"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"another group (gid {found.st_gid}) can write to {name}"
    return ""


def _is_own_group(gid: int) -> bool:
    with suppress(KeyError):  # the user's own, whatever `newgrp` has made of it
        if gid == pwd.getpwuid(os.geteuid()).pw_gid:
            return True
    if gid in (0, os.getegid()):
        return True
    try:
        grp.getgrgid(gid)
    except KeyError:  # a group without a name, given to this process alone: Kubernetes' fsGroup
        return gid in os.getgroups()
    return False


def parse(file: BinaryIO, environ: Environ = None) -> Mapping[str, str]:
    """Return the variables of an open `.env`. Raises `ConfigError` as `read_dotenv` does."""
    found: dict[str, str] = {}
    # Raised out here, where no local variable holds what the file says.
    if problem := _fill(found, file.read(), os.environ if environ is None else environ):
        found.clear()
        raise ConfigError(f"cannot read {file.name}: {problem}")
    found = conceal(found)
    logger.info("settings are read from %s", file.name)
    return found


def _fill(found: dict[str, str], content: bytes, environ: Mapping[str, str]) -> str:
    """Put the variables of a `.env` into *found*; return what is wrong with it, "" if nothing."""
    from dotenv.parser import parse_stream

    text = content.decode(errors="replace").removeprefix("\ufeff")
    if "\0" in text or "\ufffd" in text:  # UTF-16 without a mark is valid UTF-8, full of NUL
        return "it is not UTF-8"
    known = ChainMap({**environ}, found)
    for key, value, original, is_broken in parse_stream(io.StringIO(text)):
        is_ours = _OURS.match(original.string) is not None
        if is_broken and is_ours:
            return f"line {original.line} cannot be parsed"
        if key is None or value is None:
            continue
        references = [] if _SINGLE_QUOTED.match(original.string) else _REFERENCE.findall(value)
        missing = [name for name, default in references if not default and name not in known]
        if missing and is_ours and not environ.get(key):
            return f"{key} uses ${{{missing[0]}}}, which is not set"
        if references and not missing:
            found[key] = _REFERENCE.sub(lambda m: known.get(m[1]) or m[2][2:], value)
        elif not missing:
            found[key] = value
    return ""
