"""Connection strings: validated, masked, and merged with what a pool wants.

A malformed one is refused in here before psycopg or libpq see it: their messages quote it,
password included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import dropwhile, islice, takewhile
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

from dbpool._secrets import conceal, conceal_params, mask_value
from dbpool.errors import ConfigError
from dbpool.settings._parsing import NAMES, did_you_mean, nearest

# SQLAlchemy's spelling of the driver, which libpq does not know.
_DRIVER: Final = re.compile(r"^postgres(?:ql)?\+psycopg(?:2|3)?://", re.IGNORECASE)

# What psycopg's `connect` takes beside libpq's parameters.
PSYCOPG: Final = {"autocommit", "row_factory", "prepare_threshold", "cursor_factory", "context"}

# libpq's parameters, each with its environment variable if it has one.
VARIABLES: Final = {
    option.keyword.decode(): (option.envvar or b"").decode() for option in Conninfo.get_defaults()
}

_ENCODE: Final = "percent-encode special characters in user and password"
# How a string begins that is none, and what is wrong with it.
_MISTAKES: Final = (
    (r"['\"`<\u201c\u2018]", "it is still in quotes"),
    (r"(export |set )?[A-Z_]+=", "it begins with the name of a variable"),
    (r"psql\s", "it is a psql command; give the URL alone"),
    (r"(?i)((?:post|mysql|maria|sqlite|mongo|redis|psql|pgsql|jdbc:)[a-z0-9]*(?:\+\w+)?):?/", ""),
    (r"[^=]*://", "its scheme is not postgresql://"),
    (r"[^\s=]+=[^\s;]*;", "its parts are separated by semicolons, not by blanks"),
    (r"[^=]*(@|$)", "it is neither a URL, such as postgresql://user@host/database, nor key=value"),
)


def normalise(conninfo: str, known_as: str) -> str:
    """Return *conninfo* as libpq has it; raise `ConfigError` as `parse` does."""
    conninfo = conceal(conninfo)
    parse(conninfo, known_as)
    return _spell(conninfo)


def _spell(conninfo: str) -> str:
    spelt: str = conceal(_DRIVER.sub("postgresql://", conninfo.strip()))
    return spelt


def parse(conninfo: str, known_as: str = "the connection string") -> dict[str, Any]:
    """Return the parameters of a URL or a key=value string, secrets concealed.

    Raise `ConfigError`, which names *known_as* and shows nothing of the string, if it is
    malformed.
    """
    text = _spell(conceal(conninfo))
    try:
        # All of it, as in a malformed one any part may be of the password.
        params: dict[str, Any] = conceal(conninfo_to_dict(text))
    except (psycopg.Error, ValueError):
        params = {"": ""}
    # Raised out here, so that no chained error repeats the string.
    if problem := _problem(text, params):
        raise ConfigError(f"{known_as} is malformed: {problem}")
    return conceal_params(params)


def _problem(text: str, params: Mapping[str, Any]) -> str:
    """Say what is wrong with a string, "" if nothing; *params* are {"": ""} if libpq refused it."""
    is_url, is_refused = text.startswith(("postgresql://", "postgres://")), "" in params
    if "\0" in text or (is_url and re.search(r"\s", text)):
        return "it holds a blank, a line break or a NUL character"
    if is_url and text.endswith(("'", '"', "`", ">", "\u201d", "\u2019")):
        return "it is still in quotes"
    if is_url and ":***@" in text:
        return "its password is ***, which SQLAlchemy's URLs show in place of the real one"
    for pattern, problem in _MISTAKES if is_refused and not is_url else ():
        if match := re.match(pattern, text):
            return problem or f"its scheme is {match[1]}: write postgresql://"
    query = text.partition("?")[2] if is_url else ""
    if "@" not in query and (problem := _unknown(text, query, is_url=is_url)):
        return problem  # with one, the query is part of a password
    if problem := is_refused * "it cannot be parsed" or _misplaced(params, is_url=is_url):
        hint = f" ({_ENCODE if is_url else 'quote values that hold blanks'})"
        return problem + hint * (not problem.endswith("a port"))
    return ""


def _unknown(text: str, query: str, *, is_url: bool) -> str:
    """Say which parameter libpq does not know, or has twice; "" if none."""
    pattern, where = (r"(?:^|&)([^=&]+)", query) if is_url else (r"(?:^|\s)(\w+)\s*=", text)
    names = list(map(unquote, re.findall(pattern, re.sub(r"'(\\.|[^'\\])*('|$)", "", where))))
    if (found := re.search(r"(?:^|&)(\w+)=[^&]*=", query)) and found[1] in VARIABLES:
        return f"the value of {found[1]} holds an = (percent-encode it as %3D)"
    for before, name in enumerate(names):
        # It may be a part of a password then, or a token in the wrong place.
        is_secret = "pass" in "".join(names[:before]) or not re.fullmatch("[A-Za-z_-]{1,24}", name)
        shown = "a parameter" if is_secret else f"the parameter {name}"
        if is_url and name in names[:before]:
            return f"it has {shown} twice; several hosts are written postgresql://h1,h2:5433/d"
        if name not in VARIABLES and not (is_url and "ssl=true" in query and name == "ssl"):
            near = nearest(name, VARIABLES.keys() | NAMES.keys())
            is_ours = near is not None and near.isidentifier() and near not in VARIABLES
            near = f"DBPOOL_{near}".upper() if is_ours else near
            return f"libpq does not know {shown}{did_you_mean(near)}"
    return ""


def _misplaced(params: Mapping[str, Any], *, is_url: bool) -> str:
    """Say what libpq would only find out by connecting, "" if nothing.

    An unencoded `@`, `/` or `:` in a URL's password puts the rest of it into another field.
    """
    for part in ("host", "hostaddr"):
        for value in conceal(params.get(part, "")).split(","):
            is_path = value.startswith(("/", "@"))
            if not is_path and (found := re.search(r"[][@;?#/\s]|^[^:]*:[^:]*$", value)):
                return f"its {part} holds {'a port' if ':' in found[0] else found[0]}"
    ports = str(params.get("port", "")).split(",")
    if not all(port == "" or (port.isdecimal() and 0 < int(port) < 65536) for port in ports):
        return "its port is not a number from 1 to 65535"
    if is_url and (found := re.search("[@;]", str(params.get("dbname", "")))):
        return f"its database holds {found[0]}"
    return ""


def mask_conninfo(conninfo: str) -> str:
    """Return *conninfo* as key=value with its secrets replaced; never fails."""
    try:
        params = parse(str(conninfo)).items()
        return make_conninfo("", **{key: mask_value(value, key) for key, value in params})
    except (ConfigError, psycopg.Error):
        return "(malformed)"


def already_set(params: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the string, its service file or libpq's variables set, in that precedence."""
    environ = conceal(environ)
    variables = {key: environ[var] for key, var in VARIABLES.items() if environ.get(var)}
    service = params.get("service") or variables.get("service")
    entries = _service(str(service), environ) if service else {}
    return conceal_params({**variables, **entries, **params})


def _service(name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of one service, read where libpq reads them."""
    files = [environ.get("PGSERVICEFILE") or "~/.pg_service.conf"]
    if "PGSYSCONFDIR" in environ:
        files.append(f"{environ['PGSYSCONFDIR']}/pg_service.conf")
    for file in files:
        with suppress(OSError, RuntimeError):  # nobody may have said where home is
            lines = Path(file).expanduser().read_text("utf-8", "surrogateescape").split("\n")
            if found := _section([line.strip() for line in lines], f"[{name}]"):
                return found
    return {}


def _section(lines: Iterable[str], head: str) -> dict[str, str]:
    """Return the entries of the first section with that *head*; of one key the first counts."""
    rest = dropwhile(lambda line: not line.startswith(head), lines)
    own = takewhile(lambda line: not line.startswith("["), islice(rest, 1, None))
    entries = [line.partition("=") for line in own if not line.startswith("#")]
    return {key.strip(): value.strip() for key, sign, value in reversed(entries) if sign}
