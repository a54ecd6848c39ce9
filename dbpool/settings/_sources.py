"""Where settings come from: the environment, secret files, and a `.env` that nobody else wrote.

Sources are searched in order; each is a mapping of variables, and all that they hold is concealed.
"""

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
from dbpool.settings._parsing import parse_path

logger = logging.getLogger("dbpool")

_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_]\w*)((?::-[^}]*)?)\}", re.ASCII)
_SINGLE_QUOTED: Final = re.compile(r"[^=]*=\s*'")
# Other lines are for other programs, so errors in them do not matter here.
_OURS: Final = re.compile(r"\s*[^\w#;/]{0,2}(?i:(export|set|env)\W+)?(DATABASE_URL|DBPOOL_|PG)")

# Not a variable: the key under which a source says which file was skipped, and why.
SKIPPED: Final = "(skipped)"
Environ = Mapping[str, str] | None  # None stands for the environment of the process
# The path of a `.env`, or its variables; None stands for no file.
Dotenv = str | os.PathLike[str] | Mapping[str, str] | None
Sources = list[Mapping[str, Any]]


def read_sources(environ: Environ, dotenv: Dotenv) -> Sources:
    """Return the environment and the variables of the `.env`, in this order.

    If *dotenv* is None, `DBPOOL_DOTENV` names the file.
    """
    outer = conceal(os.environ if environ is None else environ)
    dotenv = (outer.get("DBPOOL_DOTENV") or {}) if dotenv is None else dotenv
    return [outer, conceal(dotenv if isinstance(dotenv, Mapping) else read_dotenv(dotenv, outer))]


def find(sources: Sources, *names: str) -> Any:
    """Return the first value that is set, or None; the sources are searched name by name."""
    return next((v for n in names for s in sources if (v := s.get(n)) not in (None, "")), None)


def find_secret(sources: Sources, name: str) -> tuple[str | None, str | None]:
    """Return a secret, or the path of its file, from the first source that has either."""
    pairs = ((source.get(name), source.get(f"{name}_FILE")) for source in sources)
    value, path = next((pair for pair in pairs if any(pair)), (None, None))
    return (Secret(value), None) if value else (None, Secret(path) if path else None)


def read_secret(path: str, variable: str, *, may_be_empty: bool = False) -> str:
    """Return the content of a secret file; *variable* gave its *path*. Raises `ConfigError`."""
    problem = "the file is empty"
    try:
        found = Secret(Path(path).read_text("utf-8-sig").strip("\r\n"))
        if found.strip() or may_be_empty:
            return found
    except (OSError, ValueError) as ex:  # ValueError: also a path that holds a NUL character
        problem = f"cannot read {safe_repr(path)}: {getattr(ex, 'strerror', 'it is not UTF-8')}"
    raise ConfigError(f"{variable}: {problem}")


def read_dotenv(path: str | os.PathLike[str], environ: Environ = None) -> Mapping[str, str]:
    """Read a `.env` that the user named; warn if somebody else could have written it.

    Raises `ConfigError` if it is missing, is not UTF-8, or refers to a variable that is not set.
    """
    name = parse_path(path, "dotenv (DBPOOL_DOTENV)") or "off"
    if name.strip().lower() == "off":
        return {}
    try:
        with Path(name).open("rb") as file:
            if reason := why_untrusted(file, [Path(name).absolute().parent]):
                logger.warning("%s is read although %s", name, reason)
            return parse_dotenv(file, environ)
    except (OSError, UnicodeEncodeError) as ex:  # a path that no file system has
        problem = getattr(ex, "strerror", "it is no path")
    raise ConfigError(f"dotenv (DBPOOL_DOTENV): cannot read {safe_repr(name)}: {problem}")


def why_untrusted(file: BinaryIO, directories: list[Path]) -> str:
    """Return how another user could have written an open file or put it there; "" if none could.

    *directories* are those that the search for it went through.
    """
    directories = [*directories, Path(os.path.realpath(file.name)).parent]
    found = {"it": os.fstat(file.fileno())} | {str(each): each.stat() for each in directories}
    return next(filter(None, map(_other_writer, found.keys(), found.values())), "")


def _other_writer(name: str, found: os.stat_result) -> str:
    if found.st_uid not in (0, os.geteuid()):
        return f"{name} belongs to another user (uid {found.st_uid})"
    if found.st_mode & stat.S_IWOTH:  # sticky or not: anybody could have created the file
        return f"everybody can write to {name}"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"another group (gid {found.st_gid}) can write to {name}"
    return ""


def _is_own_group(gid: int) -> bool:
    own = {0, os.getegid()}
    with suppress(KeyError):  # the user's own group, also after `newgrp`
        own.add(pwd.getpwuid(os.geteuid()).pw_gid)
    with suppress(KeyError):
        grp.getgrgid(gid)
        return gid in own
    # Without a name it was given to this process alone, as Kubernetes' fsGroup.
    return gid in own.union(os.getgroups())


def parse_dotenv(file: BinaryIO, environ: Environ = None) -> Mapping[str, str]:
    """Return the variables of an open `.env`. Raises `ConfigError` as `read_dotenv` does."""
    found: dict[str, str] = {}
    # The error is raised here, where no local variable shows what the file holds.
    if problem := _fill(found, file.read(), os.environ if environ is None else environ):
        raise ConfigError(f"cannot read {file.name}: {problem}")
    logger.info("settings are read from %s", file.name)
    return found


def _fill(found: dict[str, str], content: bytes, environ: Mapping[str, str]) -> str:
    """Put the variables of a `.env` into *found*; return what is wrong with it, or ""."""
    from dotenv.parser import parse_stream

    text = content.decode(errors="replace").removeprefix("\ufeff")
    if "\0" in text or "\ufffd" in text:  # UTF-16 without a mark is valid UTF-8, full of NUL
        return "it is not UTF-8"
    known = ChainMap({**environ}, found)
    for name, value, original, is_broken in parse_stream(io.StringIO(text)):
        ours = _OURS.match(original.string)
        is_unset = value is None and not environ.get(name or "")
        # A name alone stands for the environment's value, as in a file for `docker run --env-file`.
        if ours and (is_broken or is_unset or not str(name).startswith(ours[2])):
            return f"line {original.line} cannot be parsed"
        if name is None or value is None:
            continue
        references = [] if _SINGLE_QUOTED.match(original.string) else _REFERENCE.findall(value)
        missing = [key for key, default in references if not default and key not in known]
        if missing and ours and not environ.get(name):
            return f"{name} uses ${{{missing[0]}}}, which is not set"
        if not missing:
            expanded = _REFERENCE.sub(lambda m: known.get(m[1]) or m[2][2:], value)
            found[name] = conceal(expanded if references else value)
    return ""
