"""Connection strings: validated, masked, and merged with what libpq adds to them.

A malformed string is refused here, before psycopg or libpq see it: their messages quote it, with
the password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from dbpool._secrets import conceal, mask_value, read_lines, safe_repr
from dbpool.errors import ConfigError
from dbpool.settings._parsing import NAMES, did_you_mean, nearest

# SQLAlchemy's spelling of the driver, which libpq does not know.
_DRIVER: Final = re.compile(r"^postgres(?:ql)?\+psycopg(?:2|3)?://", re.IGNORECASE)

# libpq's parameters, each with its environment variable, or "".
VARIABLES: Final = {o.keyword.decode(): (o.envvar or b"").decode() for o in Conninfo.get_defaults()}

# How a string begins that libpq refuses, or a URL that must not reach it, and what is wrong with it.
_MISTAKES: Final = [line.split("  ") for line in read_lines(__package__, "mistakes.txt")]


def normalise(conninfo: str, known_as: str) -> str:
    """Return *conninfo* as libpq spells it; raise `ConfigError` as `parse` does."""
    parse(conninfo, known_as)
    return _spell(conninfo)


def _spell(conninfo: str) -> str:
    return conceal(_DRIVER.sub("postgresql://", conninfo.strip()))  # type: ignore[no-any-return]


def parse(conninfo: str, known_as: str = "the connection string") -> dict[str, Any]:
    """Return the parameters of a URL or a key=value string, secrets concealed.

    Raises `ConfigError`, which names *known_as* and shows nothing of the string, if it is
    malformed.
    """
    text = _spell(conninfo)
    params: dict[str, Any] | None = None
    with suppress(psycopg.Error, ValueError):
        # Everything is concealed: in a malformed string any part may belong to the password.
        params = conceal(conninfo_to_dict(text))
    # The error is raised here, so that no chained error repeats the string.
    if problem := "it is blank" if conninfo and not text else _problem(text, params):
        raise ConfigError(f"{known_as} is malformed: {problem}")
    # psycopg's errors quote a host by its `repr()`, which must stay readable.
    return {key: str(v) if key == "host" else v for key, v in (params or {}).items()}


def _problem(text: str, params: Mapping[str, Any] | None) -> str:
    """Return what is wrong with a string, or ""; *params* are None if libpq refused it."""
    is_url = text.startswith(("postgresql://", "postgres://"))
    if "\0" in text:
        return "it contains a blank, a line break or a NUL character"
    kind = "url" if is_url else "other" if params is None else ""
    for of_kind, pattern, problem in _MISTAKES:
        if of_kind == kind and (match := re.match(pattern, text)):
            return problem.format(*match.groups())
    query = text.partition("?")[2] if is_url else ""
    if "@" not in query and (problem := _unknown_parameter(text, query, is_url=is_url)):
        return problem  # a query with an @ is part of a password
    if params is None and not is_url:
        return "it cannot be parsed (quote values that contain blanks)"
    problem = "it cannot be parsed" if params is None else _misplaced(params, is_url=is_url)
    if problem and re.match("[^@/]*//[^@/]*[@/].*@", text):  # an @ where none belongs
        problem += " (percent-encode special characters in user and password)"
    return problem


def _unknown_parameter(text: str, query: str, *, is_url: bool) -> str:
    """Return which parameter is unknown to libpq, or occurs twice; "" if none."""
    pattern, where = (r"(?:^|&)([^=&]+)", query) if is_url else (r"(?:^|\s)(\w+)\s*=", text)
    names = list(map(unquote, re.findall(pattern, re.sub(r"'(\\.|[^'\\])*('|$)", "", where))))
    if (found := re.search(r"(?:^|&)(\w+)=[^&]*=", query)) and found[1] in VARIABLES:
        return f"the value of {found[1]} contains an = (percent-encode it as %3D)"
    for before, name in enumerate(names):
        # After a password the name may be part of it; a strange one may be a misplaced token.
        is_secret = "pass" in "".join(names[:before]) or not re.fullmatch("[A-Za-z_-]{1,24}", name)
        described = "a parameter" if is_secret else f"the parameter {name}"
        if is_url and name in names[:before]:
            return f"it has {described} twice; several hosts are written postgresql://h1,h2:5433/d"
        if name not in VARIABLES and not (is_url and "ssl=true" in query and name == "ssl"):
            near = nearest(name, VARIABLES.keys() | {n for n in NAMES if not n.islower()})
            return f"libpq does not know {described}{did_you_mean(near)}"
    return ""


def _misplaced(params: Mapping[str, Any], *, is_url: bool) -> str:
    """Return a mistake that libpq would notice only when it connects, "" if there is none.

    An unencoded `@`, `/` or `:` in a URL's password puts the rest of it into another parameter.
    """
    for part in ("host", "hostaddr"):
        for value in conceal(params.get(part, "")).split(","):
            # Neither a path nor an abstract socket.
            if found := re.match(r"(?s)(?![/@])(?:.*?([][@;?#/=\s\x22]|\.\.)|[^:]*:[^:]*$)", value):
                return f"its {part} contains {found[1] or 'a port'}"
    ports = str(params.get("port", "")).split(",")
    if not all(re.fullmatch("[0-9]{0,5}", each) and 0 < int(each or 1) < 65536 for each in ports):
        return "its port is not a number from 1 to 65535"
    if is_url and (found := re.search("[@;]", str(params.get("dbname", "")))):
        return f"its database contains {found[0]}"
    return ""


def insist_on_types(conninfo: Any, kwargs: Any) -> None:
    """Raise `ConfigError` if a pool's parameters are of types that it cannot use."""
    for name, value, cls in ("conninfo", conninfo, str), ("kwargs", kwargs, Mapping):
        if not isinstance(value, cls | None):
            raise ConfigError(f"{name} must be a {cls.__name__.lower()}, not {safe_repr(value)}")


def mask_conninfo(conninfo: str) -> str:
    """Return *conninfo* as key=value with its secrets replaced; never fails."""
    with suppress(ConfigError, psycopg.Error):
        params = parse(str(conninfo)).items()
        return make_conninfo("", **{key: mask_value(value, key) for key, value in params})
    return "(malformed)"


def already_set(params: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return *params* and what their service file and libpq's variables add; *params* win."""
    environ = conceal(environ)
    variables = {key: environ[var] for key, var in VARIABLES.items() if environ.get(var)}
    service = params.get("service") or variables.get("service")
    entries = _read_service(str(service), environ) if service else {}
    return {**variables, **conceal(entries), **params}


def _read_service(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a service, from the files in which libpq looks for it."""
    files = [environ.get("PGSERVICEFILE") or "~/.pg_service.conf"]
    if "PGSYSCONFDIR" in environ:
        files.append(f"{environ['PGSYSCONFDIR']}/pg_service.conf")
    for file in files:
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home directory
            if found := _section(Path(file).expanduser(), name):
                return found
    return {}


def _section(file: Path, name: str) -> dict[str, str]:
    """Return the entries of the first section called *name*; of a repeated key the first counts."""
    sections = re.split(r"(?m)^[^\S\n]*\[", file.read_text("utf-8", "surrogateescape"))[1:]
    own = next((section for section in sections if section.startswith(f"{name}]")), "")
    entries = [line.partition("=") for line in own.split("\n")[1:] if line.strip()[:1] != "#"]
    return {key.strip(): value.strip() for key, sign, value in reversed(entries) if sign}
