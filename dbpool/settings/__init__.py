"""Settings of one pool, from keywords, the environment, secret files and a `.env`.

- `_parsing`: numbers, durations, switches, lists; suggestions for unknown names (`names.txt`,
  `meant.txt`)
- `_sources`: the environment, secret files, a `.env` that nobody else could have written
- `_conninfo`: connection strings, validated (`mistakes.txt`) and masked
- `app`: the settings of an application beside its pools
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Final

from psycopg.conninfo import make_conninfo

from dbpool._secrets import NOT_TEXT, conceal, conceal_params, conceals_fields, mask_value, safe_key
from dbpool.errors import ConfigError
from dbpool.settings import _conninfo, _parsing, _sources
from dbpool.settings._parsing import LEFT_TO_SERVER, MAX_INT, MEANT, did_you_mean, nearest, parsed
from dbpool.settings._sources import Dotenv, Environ, Sources, find, read_secret

__all__ = ["Settings", "unknown_variables"]

logger = logging.getLogger("dbpool")

_Params = Mapping[str, Any] | None
_Unknown = tuple[str, str | None]  # a variable, and what was probably meant
NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
_URL: Final = re.compile(r"DBPOOL_(?:DATABASE_|DEFAULT_|(\w+)_)?(?:UR[LI]|DSN|CONNINFO)(_FILE)?")

# The fields that the server enforces, with their names there.
SERVER_SIDE: Final = {name: name for name in ("statement_timeout", "lock_timeout")}
SERVER_SIDE["idle_in_transaction_timeout"] = "idle_in_transaction_session_timeout"
_RESETS: Final = {"none": "none", "session": "session"}
_POOLERS: Final = {"none": "none", "transaction": "transaction", "pgbouncer": "transaction"}
# libpq's variables that say which database is meant.
_NAMES_A_DATABASE: Final = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE")
# libpq's variables that stand for no parameter: it reads them from the process's environment alone.
_PROCESS_ONLY: Final = {"PGTZ", "PGDATESTYLE", "PGGEQO", "PGSERVICEFILE", "PGSYSCONFDIR"}
# Fields without a variable.
_WITHOUT_VARIABLE: Final = """name conninfo_file password_file libpq explicit
    keepalives_idle keepalives_interval keepalives_count tcp_user_timeout"""


_POSITIVE: Final = (0.001, MAX_INT)
_count: Final = partial(parsed, parse=_parsing.parse_number, time="", whole=True)
_whole_seconds: Final = partial(parsed, parse=_parsing.parse_time, whole=True)
_seconds: Final = partial(parsed, parse=_parsing.parse_time)
_server_timeout: Final = partial(parsed, parse=_parsing.parse_server_timeout)


@conceals_fields
@dataclass(frozen=True, repr=False)
class Settings:
    """The settings of one pool. Times are in seconds; `"500ms"`, `"30s"`, `"5min"`, `"1h"` work too.

    Raises `ConfigError` for a value that does not parse, is out of range, or contradicts
    another. `explicit` names the fields that were set on purpose: they win over the connection
    string, which wins over the defaults. `libpq` holds, as key=value, the parameters of `PG*`
    variables that libpq itself does not see, because they are in a `.env`, for example.
    """

    name: str = parsed("default", _parsing.parse_name)
    conninfo: str = parsed("", _conninfo.normalise)
    conninfo_file: str | None = parsed(None, _parsing.parse_path)
    password_file: str | None = parsed(None, _parsing.parse_path)
    min_size: int = _count(1)
    max_size: int = _count(10, limits=(1, MAX_INT))
    timeout: float = _seconds(5.0)
    max_waiting: int = _count(0)
    max_lifetime: float = _seconds(1800.0, limits=_POSITIVE, suspect=200_000)
    max_idle: float = _seconds(600.0, limits=_POSITIVE, suspect=200_000)
    connect_timeout: int = _whole_seconds(5, limits=(2, MAX_INT))
    statement_timeout: float | str = _server_timeout(30.0)
    lock_timeout: float | str = _server_timeout(0.0)
    idle_in_transaction_timeout: float | str = _server_timeout(60.0)
    keepalives_idle: int = _whole_seconds(30, limits=(1, 32_767))  # as on Linux
    keepalives_interval: int = _whole_seconds(10, limits=(1, 32_767))
    keepalives_count: int = _count(3, limits=(1, 127))
    tcp_user_timeout: float = parsed(30.0, _parsing.parse_timeout)
    ping_after: float = _seconds(30.0)
    ping_timeout: float = _seconds(1.0, limits=_POSITIVE)
    outage_grace: float = _seconds(2.0)
    leak_after: float = _seconds(60.0)
    slow_acquire: float = _seconds(1.0)
    session_reset: str = parsed("none", _parsing.parse_choice, choices=_RESETS)
    pooler: str = parsed("none", _parsing.parse_choice, choices=_POOLERS)
    pipeline_begin: bool = _parsing.switch(False)
    application_name: str = parsed("", lambda text, known_as: str(text))
    libpq: str = ""
    explicit: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        self._set("explicit", self.explicit | (changed - {"name", "explicit"}))
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, str) and not isinstance(value, str):
                self._refuse(f.name, f"must be a string, not of type {type(value).__name__}")
            if parse := f.metadata.get("parse"):
                self._set(f.name, parse(value, self._known_as(f.name)))
        if "max_size" not in self.explicit:
            self._set("max_size", max(self.min_size, self.max_size))
        if self.min_size > self.max_size:
            self._refuse("min_size", f"is {self.min_size}, but max_size is {self.max_size}")
        if self.pooler == "transaction" and self.session_reset == "session":
            self._refuse("session_reset", "cannot work through a transaction pooler")
        for name in sorted(self.explicit & SERVER_SIDE.keys()):
            if self.pooler == "transaction" and getattr(self, name) != LEFT_TO_SERVER:
                advice = f"use ALTER ROLE … SET {SERVER_SIDE[name]} on the server"
                self._refuse(name, f"cannot be set through a transaction pooler: {advice}")

    _set = object.__setattr__  # the class is frozen for everybody else

    def _known_as(self, name: str) -> str:
        """Return a field's name for a message, with the variables that can set it."""
        if name in _WITHOUT_VARIABLE.split() or not NAME.fullmatch(str(self.name)):
            return name
        own, common = variable(name, self.name), variable(name)
        return f"{name} ({own if name == 'conninfo' or own == common else f'{own} or {common}'})"

    def _refuse(self, name: str, reason: str) -> None:
        raise ConfigError(f"{self._known_as(name)} {reason}")

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{key}={value!r}' for key, value in self.masked().items())})"

    def masked(self) -> dict[str, object]:
        """Return all fields, without secrets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "explicit"}
        free = ("conninfo_file", "password_file", "application_name")
        masked = {key: mask_value(values[key]) for key in free if values[key]}
        masked |= {key: _conninfo.mask_conninfo(values[key]) for key in ("conninfo", "libpq")}
        return values | masked

    def resolve(self) -> str:
        """Return the current connection string; its secret file is read again."""
        if self.conninfo or self.conninfo_file is None:
            return self.conninfo
        name = f"{variable('conninfo', self.name)}_FILE"
        return _conninfo.normalise(read_secret(self.conninfo_file, name), name)

    def connect_params(
        self, conninfo: str | None = None, kwargs: _Params = None, *, defaults: bool = True
    ) -> dict[str, Any]:
        """Return the keywords to connect with: those of *conninfo* and *kwargs*, and our defaults.

        *kwargs* win; psycopg's own keywords pass through. Without *defaults* the `default_options`
        are left out.
        """
        conninfo, given, kwargs = conceal(conninfo), conceal_params(kwargs or {}), None
        params = {**_conninfo.parse(self.resolve() if conninfo is None else conninfo), **given}
        unseen = _conninfo.parse(self.libpq)
        variables = {_conninfo.VARIABLES[key]: value for key, value in unseen.items()}
        known = _conninfo.already_set(params, {**os.environ, **variables})
        # psycopg's errors name a host only if it is passed. A service may hold ports that belong to it.
        shown = unseen.keys() | ({"host"} & known.keys() if "service" not in known else set())
        params |= conceal_params({key: known[key] for key in shown})
        params |= {key: value for key, value in self._defaults().items() if key not in known}
        if "connect_timeout" in self.explicit and "connect_timeout" not in given:
            params["connect_timeout"] = self.connect_timeout
        if self.password_file and "password" not in known:
            params["password"] = read_secret(self.password_file, "PGPASSWORD_FILE")
        _insist_on_text(params)
        if self.pooler == "transaction":
            return {"prepare_threshold": None} | params
        # If an option is given twice, the server takes the last one.
        before = self.default_options().values() if defaults else ()
        after = self._server_side(self.explicit).values()
        options = " ".join(filter(None, (*before, str(known.get("options", "")), *after)))
        return params | ({"options": options} if options else {})

    def _defaults(self) -> dict[str, object]:
        same = ("connect_timeout", "keepalives_idle", "keepalives_interval", "keepalives_count")
        return {name: getattr(self, name) for name in same} | {
            "tcp_user_timeout": round(self.tcp_user_timeout * 1000),
            "fallback_application_name": self._known_to_server_as(),
        }

    def _known_to_server_as(self) -> str:
        """Return the application_name; by default it is different in each process.

        Behind a transaction pooler it is not: the pooler would have to set the name for each client
        that it serves. The server keeps 63 bytes, and replaces characters that are not ASCII.
        """
        name = self.application_name or f"dbpool:{self.name}"[:40]
        if self.application_name or self.pooler == "transaction":
            return name
        tail = f"/{os.getpid()}"
        return re.sub("[^ -~]", "?", f"{name}@{os.uname().nodename}"[: 63 - len(tail)] + tail)

    def default_options(self) -> dict[str, str]:
        """Return the startup options of timeouts that nobody set on purpose, by their names."""
        return self._server_side(SERVER_SIDE.keys() - self.explicit)

    def _server_side(self, fields: Collection[str]) -> dict[str, str]:
        return {
            parameter: f"-c {parameter}={round(value * 1000)}"
            for name, parameter in SERVER_SIDE.items()
            if name in fields
            and (value := getattr(self, name)) != LEFT_TO_SERVER
            and (value or name in self.explicit)
            and self.pooler != "transaction"
        }

    @classmethod
    def from_env(
        cls, name: str = "default", environ: Environ = None, dotenv: Dotenv = None, **overrides: Any
    ) -> Settings:
        """Read the settings of the database called *name* from variables; keywords win.

        *environ* is the process's environment by default, *dotenv* the path of a `.env`. Raises
        `ConfigError`.
        """
        name, environ, dotenv, overrides = map(conceal, (name, environ, dotenv, overrides))
        name, sources = _parsing.parse_name(name), _sources.read_sources(environ, dotenv)
        warn_of_unknown(sources, tuple({*database_names(sources), name} - {"default"}))
        return build_settings(name, sources, overrides)


def unknown_variables(environ: Environ = None, dotenv: Dotenv = None) -> list[_Unknown]:
    """Return the unknown `DBPOOL_` variables, each with the nearest known one."""
    environ = conceal(environ)
    sources = _sources.read_sources(environ, dotenv)
    return list(find_unknown(sources, database_names(sources)))


def variable(name: str, database: str = "default") -> str:
    """Return the environment variable of a field."""
    if name == "conninfo":
        return "DATABASE_URL" if database == "default" else variable("url", database)
    name = {"session_reset": "reset"}.get(name, name)
    return f"DBPOOL_{'' if database == 'default' else f'{database}_'}{name}".upper()


_FIELDS: Final = tuple(f.name for f in fields(Settings) if f.name not in _WITHOUT_VARIABLE.split())
# The variables of an application, in addition to those of its pools.
_OTHERS: Final = "DATABASES REQUIRED TOKEN TOKEN_FILE DETAILS DOTENV STATS_DIR ERROR_HANDLERS BLOCKERS SHOW_QUERIES SERVE ENDPOINT_METRICS"
COMMON: Final = frozenset(map(variable, [*_FIELDS, *_OTHERS.lower().split()])) - {"DATABASE_URL"}


def variables_of(database: str) -> set[str]:
    """Return the variables of a database other than the default one."""
    return {variable(name, database) for name in (*_FIELDS, "url_file")}


def build_settings(name: str, sources: Sources, overrides: Mapping[str, Any]) -> Settings:
    """Make the settings of the database called *name*; *overrides* win unless they are None."""
    known = {f.name for f in fields(Settings)} - {"name", "explicit"}
    for key in map(safe_key, sorted(overrides.keys() - known)):
        raise ConfigError(f"there is no setting {key!r}{did_you_mean(nearest(key, known))}")
    found = {key: find(sources, variable(key, name), variable(key)) for key in _FIELDS}
    url = variable("conninfo", name)
    found["conninfo"], found["conninfo_file"] = _sources.find_secret(sources, url)
    found["password_file"] = find(sources, "PGPASSWORD_FILE")
    variables = {key: find(sources, name) for key, name in _conninfo.VARIABLES.items() if name}
    unseen = {k: v for k, v in variables.items() if v != os.environ.get(_conninfo.VARIABLES[k])}
    _insist_on_text({_conninfo.VARIABLES[key]: value for key, value in unseen.items()})
    found["libpq"] = conceal(make_conninfo("", **unseen)) or None
    values = {k: v for k, v in (*found.items(), *overrides.items()) if v is not None}
    if not (values.get("conninfo") or values.get("conninfo_file")):
        if name != "default":
            raise ConfigError(f"database {name!r} needs {url} or {url}_FILE")
        if not find([*sources, os.environ], *_NAMES_A_DATABASE):
            _check_that_nothing_was_meant(sources)
    return Settings(name=name, explicit=frozenset(values), **values)


def _insist_on_text(params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a value that libpq or the server would not take, or not as it is."""
    if bad := [key for key, v in params.items() if NOT_TEXT.match(f"{type(v).__name__} {v}")]:
        raise ConfigError(f"{bad[0]} must be a str without NUL characters or invalid UTF-8")


def _check_that_nothing_was_meant(sources: Sources) -> None:
    """Raise `ConfigError` if a database was probably meant, but libpq's defaults would apply."""
    if skipped := find(sources, _sources.SKIPPED):
        raise ConfigError(f"DATABASE_URL is not set, and {skipped}; DBPOOL_DOTENV can name it")
    given = {str(key) for source in sources for key, value in source.items() if value}
    for name, pattern in MEANT:
        typos = get_close_matches(name, given, cutoff=0.9)
        if meant := sorted(filter(re.compile(pattern).fullmatch, given)) or typos:
            raise ConfigError(f"{name} is not set, but {meant[0]} is: rename it")
        if any(source.get(name) == "" for source in sources):
            raise ConfigError(f"{name} is empty, and nothing else names a database")


def database_names(sources: Sources) -> tuple[str, ...]:
    """Return the names of the databases beside the default one."""
    return _parsing.parse_list(find(sources, "DBPOOL_DATABASES") or "", "DBPOOL_DATABASES")


def find_unknown(sources: Sources, databases: tuple[str, ...]) -> Iterator[_Unknown]:
    """Yield the keys that are ours or libpq's and have no effect, with what was probably meant."""
    known = COMMON.union(*map(variables_of, databases))
    given = {str(k) for s in sources for k in s if re.match(r"(?i)\s*dbpool[\W_]", str(k))}
    given |= {k for s in sources for k in _PROCESS_ONLY & s.keys() if s[k] != os.environ.get(k)}
    for key in sorted(given - known):
        if (libpq := key.replace("DBPOOL_", "PG")) in _conninfo.VARIABLES.values():
            yield safe_key(key), libpq
        elif (url := _URL.fullmatch(key)) is None:
            yield safe_key(key), nearest(key, known | {"PGPASSWORD_FILE"})
        elif (database := (url[1] or "default").lower()) in ("default", *databases):
            yield key, variable("conninfo", database) + (url[2] or "")
        else:  # what is no name may be a misplaced secret
            names = [*filter(NAME.fullmatch, databases), database]
            yield key, f"DBPOOL_DATABASES={','.join(names)}"


def warn_of_unknown(sources: Sources, databases: tuple[str, ...]) -> None:
    """Log what `find_unknown` yields."""
    for key, suggestion in find_unknown(sources, databases):
        logger.warning("unknown variable %s is ignored%s", key, did_you_mean(suggestion))
