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

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dbpool._secrets import conceal, conceal_params, mask_value
from dbpool.errors import ConfigError

# SQLAlchemy's spelling of the driver, which libpq does not know.
_DRIVER: Final = re.compile(r"^postgres(?:ql)?\+psycopg(?:2|3)?://", re.IGNORECASE)

# What psycopg's `connect` takes beside libpq's parameters.
PSYCOPG: Final = frozenset(
    {"autocommit", "row_factory", "prepare_threshold", "cursor_factory", "context"}
)

# libpq's environment variables for the parameters that matter to a pool.
_VARIABLES: Final = {
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "options": "PGOPTIONS",
    "password": "PGPASSWORD",
    "service": "PGSERVICE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
}


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
    conninfo = conceal(conninfo)
    try:
        # All of it, as in a malformed one any part may be of the password.
        params: dict[str, Any] = conceal(conninfo_to_dict(_spell(conninfo)))
    except (psycopg.Error, ValueError):
        params = {"": ""}
    # Raised out here, so that no chained error repeats the string.
    is_url = "://" in conninfo.partition("=")[0]
    problem = "it cannot be parsed" if "" in params else _problem(params, is_url=is_url)
    if problem:
        hint = " (percent-encode special characters in user and password)" if is_url else ""
        raise ConfigError(f"{known_as} is malformed: {problem}{hint}")
    return conceal_params(params)


def _problem(params: Mapping[str, Any], *, is_url: bool) -> str:
    """What is wrong with parameters that libpq would only find out by connecting, if anything.

    An unencoded `@`, `/` or `:` in a URL's password puts the rest of it into another field.
    """
    for part in ("host", "hostaddr"):
        value = conceal(params.get(part, ""))
        if "@" in value and not value.startswith(("/", "@")):
            return f"its {part} holds an @"
    ports = str(params.get("port", "")).split(",")
    if not all(port == "" or (port.isdecimal() and 0 < int(port) < 65536) for port in ports):
        return "its port is no number from 1 to 65535"
    if is_url and "@" in str(params.get("dbname", "")):
        return "its database holds an @"
    return ""


def mask_conninfo(conninfo: str) -> str:
    """Return *conninfo* as key=value with its secrets replaced; never fails."""
    try:
        params = {key: mask_value(value, key) for key, value in parse(str(conninfo)).items()}
        return make_conninfo("", **params)
    except (ConfigError, psycopg.Error):
        return "(malformed)"


def already_set(params: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the string, its service file or libpq's variables set, in that precedence."""
    environ = conceal(environ)
    variables = {name: environ[var] for name, var in _VARIABLES.items() if environ.get(var)}
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
