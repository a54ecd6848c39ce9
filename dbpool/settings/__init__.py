"""Settings: from keywords, the environment, secret files and `.env`; validated and masked."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from psycopg.conninfo import make_conninfo

from dbpool import _secrets
from dbpool._secrets import conceal
from dbpool.errors import ConfigError
from dbpool.settings import _conninfo
from dbpool.settings._parsing import did_you_mean, nearest, parse_bool, parse_list, parse_number
from dbpool.settings._sources import SKIPPED, Source, find, read_layers, secret, secret_of

__all__ = ["Settings", "unknown_variables"]

logger = logging.getLogger("dbpool")

NAME: Final = re.compile(r"[a-z][a-z0-9_]*")
_URL: Final = re.compile(r"DBPOOL_(?:([A-Z][A-Z0-9_]*)_)?(?:URL|URI|DSN|CONNINFO)(_FILE)?")

_POOLERS: Final = {"none": "none", "transaction": "transaction", "pgbouncer": "transaction"}
# Numbers that are no times.
_SIZES: Final = frozenset({"min_size", "max_size", "max_waiting", "keepalives_count"})
# Seconds from which on a number without a unit is probably one of milliseconds: 1000, but for these.
_LONG: Final = {"max_lifetime": 200_000, "max_idle": 200_000}
# Our fields that the server enforces, with their names there.
SERVER_SIDE: Final = {
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_timeout": "idle_in_transaction_session_timeout",
}
# The least values; a time below a millisecond would be sent as 0, which turns these off.
_OFF_AT_0: Final = dict.fromkeys((*SERVER_SIDE, "tcp_user_timeout"), 0.001)
_LEAST: Final = {"max_size": 1, "connect_timeout": 2, **_OFF_AT_0} | dict.fromkeys(
    ("max_lifetime", "max_idle", "ping_timeout"), 0.001
)
LEFT_TO_SERVER: Final = "server"  # a value of theirs: what role, database or configuration say
# libpq's variables that say which database is meant.
_NAMES_A_DATABASE: Final = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE")
# What others call DATABASE_URL.
_MEANT: Final = "DATABASE_URI SQLALCHEMY_DATABASE_URI DB_URL DATABASE_DSN POSTGRES_URL PG_URL"
# Fields without a variable: nobody was seen to need one.
_UNNAMED: Final = frozenset(
    {"name", "conninfo", "conninfo_file", "password_file", "libpq", "explicit"}
    | {"keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"}
)


@_secrets.conceals_fields
@dataclass(frozen=True, repr=False)
class Settings:
    """What one pool is set to. Times are in seconds; `"500ms"`, `"30s"`, `"5m"`, `"1h"` too.

    Raises `ConfigError` for a value that does not parse, is out of range, or contradicts
    another. `explicit` names the fields that were set on purpose: those win over what the
    connection string sets, which wins over the defaults. `libpq` are parameters as key=value
    that `PG*` variables set where libpq does not see them, such as in a `.env`.
    """

    name: str = "default"
    conninfo: str = ""
    conninfo_file: str | None = None
    password_file: str | None = None
    min_size: int = 1
    max_size: int = 10
    timeout: float = 5.0
    max_waiting: int = 0
    max_lifetime: float = 1800.0
    max_idle: float = 600.0
    connect_timeout: int = 5
    statement_timeout: float | str = 30.0
    lock_timeout: float | str = 0.0
    idle_in_transaction_timeout: float | str = 60.0
    keepalives_idle: int = 30
    keepalives_interval: int = 10
    keepalives_count: int = 3
    tcp_user_timeout: float = 30.0
    ping_after: float = 30.0
    ping_timeout: float = 1.0
    outage_grace: float = 2.0
    leak_after: float = 60.0
    session_reset: str = "none"
    pooler: str = "none"
    pipeline_begin: bool = False
    application_name: str = ""
    libpq: str = ""
    explicit: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        self._set("explicit", self.explicit | (changed - {"name", "explicit"}))
        _name_only(self.name)
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            if f.name in SERVER_SIDE and str(value).strip().lower() == LEFT_TO_SERVER:
                self._set(f.name, LEFT_TO_SERVER)
            elif kind in (int, float):
                known_as, is_time = self._known_as(f.name), f.name not in _SIZES
                self._set(f.name, parse_number(value, known_as, whole=kind is int, is_time=is_time))
                is_bare = isinstance(value, int) or str(value).strip().isdecimal()
                if is_bare and kind is float and int(value) >= _LONG.get(f.name, 1000):
                    text = "%s is %d seconds (%.1f hours); for milliseconds write %dms"
                    logger.warning(text, known_as, int(value), int(value) / 3600, int(value))
            elif isinstance(f.default, bool):
                self._set(f.name, value is not None and parse_bool(value, self._known_as(f.name)))
            elif kind is str and not isinstance(value, str):
                raise ConfigError(f"{f.name} must be a string, not of type {type(value).__name__}")
            elif f.name in ("name", "application_name"):
                self._set(f.name, str(value))
        self._set("conninfo", _conninfo.normalise(self.conninfo, self._known_as("conninfo")))
        if self.min_size > self.max_size and "max_size" not in self.explicit:
            self._set("max_size", self.min_size)
        self._check()

    _set = object.__setattr__  # the class is frozen for everybody else

    def _known_as(self, name: str) -> str:
        if not NAME.fullmatch(self.name):  # no variable could be called so
            return name
        own, common = variable(name, self.name), variable(name)
        either = own if name == "conninfo" or own == common else f"{own} or {common}"
        return f"{name} ({either})"

    def _refuse(self, name: str, reason: str) -> None:
        raise ConfigError(f"{self._known_as(name)} {reason}")

    def _check(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            is_word = value == LEFT_TO_SERVER or (value == 0 and name in _OFF_AT_0)
            if not is_word and value < least:
                self._refuse(name, f"must be at least {least:g}{'' if name in _SIZES else ' s'}")
        if self.min_size > self.max_size:
            self._refuse("min_size", f"is {self.min_size}, but max_size is {self.max_size}")
        if self.pooler not in _POOLERS:
            self._refuse("pooler", "must be none or transaction")
        self._set("pooler", _POOLERS[self.pooler])
        if self.session_reset not in ("none", "session"):
            self._refuse("session_reset", "must be none or session")
        self._set("session_reset", str(self.session_reset))
        self._check_pooler()

    def _check_pooler(self) -> None:
        if self.pooler == "transaction":
            if self.session_reset == "session":
                self._refuse("session_reset", "cannot work through a transaction pooler")
            explicit = sorted(self.explicit & SERVER_SIDE.keys())
            for name in (name for name in explicit if getattr(self, name) != LEFT_TO_SERVER):
                advice = f"use ALTER ROLE … SET {SERVER_SIDE[name]} on the server"
                self._refuse(name, f"cannot be set through a transaction pooler: {advice}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self.masked().items())
        return f"Settings({shown})"

    def masked(self) -> dict[str, object]:
        """Return all fields, without secrets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "explicit"}
        paths = ("conninfo_file", "password_file", "application_name")
        masked = {key: _secrets.mask_value(values[key]) for key in paths if values[key]}
        masked |= {key: _conninfo.mask_conninfo(values[key]) for key in ("conninfo", "libpq")}
        return values | masked

    def resolve(self) -> str:
        """Return the connection string as it is now; its secret file is read again."""
        if self.conninfo or self.conninfo_file is None:
            return self.conninfo
        name = f"{variable('conninfo', self.name)}_FILE"
        if not (found := _conninfo.normalise(secret(self.conninfo_file, name), name)):
            raise ConfigError(f"{name}: the file is empty")
        return found

    def connect_params(
        self,
        conninfo: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        defaults: bool = True,
    ) -> dict[str, Any]:
        """Return the keywords to connect with: the string's, the user's, and what is missing.

        *kwargs* are the user's own and win; those that are psycopg's pass through. Without
        *defaults* the `default_options` are left out.
        """
        conninfo, kwargs = conceal(conninfo), conceal(kwargs)
        given = _secrets.conceal_params(kwargs or {})
        own = {key: given.pop(key) for key in _conninfo.PSYCOPG & given.keys()}
        params = _conninfo.parse(self.resolve() if conninfo is None else conninfo) | given
        unseen = _conninfo.parse(self.libpq)
        variables = {_conninfo.VARIABLES[key]: value for key, value in unseen.items()}
        known = _conninfo.already_set(params, {**os.environ, **variables})
        params |= {key: known[key] for key in unseen}
        params |= {key: v for key, v in self._defaults().items() if key not in known}
        if "connect_timeout" in self.explicit and "connect_timeout" not in given:
            params["connect_timeout"] = self.connect_timeout
        if self.password_file and "password" not in known:
            params["password"] = secret(self.password_file, "PGPASSWORD_FILE")
        if cut := [key for key, value in params.items() if "\0" in str(value)]:
            raise ConfigError(f"{cut[0]} must not hold a NUL character")
        if self.pooler == "transaction":
            own.setdefault("prepare_threshold", None)
        elif options := self._options(str(known.get("options", "")), defaults=defaults):
            params["options"] = options
        return params | own

    def _defaults(self) -> dict[str, object]:
        return {
            "connect_timeout": self.connect_timeout,
            "keepalives_idle": self.keepalives_idle,
            "keepalives_interval": self.keepalives_interval,
            "keepalives_count": self.keepalives_count,
            "tcp_user_timeout": round(self.tcp_user_timeout * 1000),
            "fallback_application_name": self.application_name or f"dbpool:{self.name}",
        }

    def default_options(self) -> dict[str, str]:
        """Return the startup options of timeouts that nobody set on purpose, by their names."""
        return self._server_side(SERVER_SIDE.keys() - self.explicit)

    def _options(self, given: str, *, defaults: bool) -> str:
        """Merge the options: the server takes the last of two, so defaults go first."""
        before = self.default_options().values() if defaults else ()
        after = self._server_side(self.explicit).values()
        return " ".join(filter(None, (*before, given, *after)))

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
        cls,
        name: str = "default",
        environ: Mapping[str, str] | None = None,
        dotenv: Source = None,
        **overrides: Any,
    ) -> Settings:
        """Read the settings of the database called *name*; keywords win.

        *environ* is the process's environment by default, *dotenv* the path of a `.env`.
        """
        name, environ, overrides = map(conceal, (name, environ, overrides))
        name = _name_only(name)
        layers = read_layers(environ, dotenv)
        warn_of_unknown(layers, tuple({*names_in(layers), name} - {"default"}))
        return build(name, layers, overrides)


def unknown_variables(
    environ: Mapping[str, str] | None = None, dotenv: Source = None
) -> list[tuple[str, str | None]]:
    """Return the `DBPOOL_` variables that mean nothing, each with the nearest that does."""
    environ = conceal(environ)
    layers = read_layers(environ, dotenv)
    return list(unknown(layers, names_in(layers)))


def _name_only(name: str) -> str:
    """Return the name of a database; raise `ConfigError` for a connection string in its place."""
    if re.search(r"://|=", str(name)):
        raise ConfigError("name looks like a connection string, which belongs in conninfo")
    if name == "":
        raise ConfigError("name must not be empty")
    return f"{name}"


def variable(name: str, database: str = "default") -> str:
    """Return the environment variable of a field."""
    if name == "conninfo":
        return "DATABASE_URL" if database == "default" else variable("url", database)
    name = {"session_reset": "reset"}.get(name, name)
    return f"DBPOOL_{'' if database == 'default' else f'{database}_'}{name}".upper()


_FIELDS: Final = tuple(f.name for f in fields(Settings) if f.name not in _UNNAMED)
# Those of an application, beside its pools.
_OTHERS: Final = "DATABASES REQUIRED TOKEN TOKEN_FILE DETAILS DOTENV STATS_DIR ERROR_HANDLERS"
COMMON: Final = frozenset(map(variable, [*_FIELDS, *_OTHERS.lower().split()]))


def variables_of(database: str) -> set[str]:
    """Return the variables of a database that is not the default one."""
    return {variable(name, database) for name in (*_FIELDS, "url", "url_file")}


def build(name: str, layers: list[Mapping[str, Any]], overrides: Mapping[str, Any]) -> Settings:
    """Make the settings of the database called *name*; *overrides* win unless they are None."""
    known = {f.name for f in fields(Settings)} - {"name", "explicit"}
    for key in sorted(overrides.keys() - known):
        raise ConfigError(f"there is no setting {key!r}{did_you_mean(nearest(key, known))}")
    found = {key: find(layers, variable(key, name), variable(key)) for key in _FIELDS}
    url = variable("conninfo", name)
    found["conninfo"], found["conninfo_file"] = secret_of(layers, url)
    found["password_file"] = find(layers, "PGPASSWORD_FILE")
    variables = {key: find(layers, name) for key, name in _conninfo.VARIABLES.items() if name}
    unseen = {k: v for k, v in variables.items() if v != os.environ.get(_conninfo.VARIABLES[k])}
    found["libpq"] = conceal(make_conninfo("", **unseen)) or None
    given = found | {key: value for key, value in overrides.items() if value is not None}
    values = {key: value for key, value in given.items() if value is not None}
    if name != "default" and not (values.get("conninfo") or values.get("conninfo_file")):
        raise ConfigError(f"database {name!r} needs {url} or {url}_FILE")
    if not (values.get("conninfo") or values.get("conninfo_file")):
        _check_that_nothing_was_meant(layers)
    return Settings(name=name, explicit=frozenset(values), **values)


def _check_that_nothing_was_meant(layers: list[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` if libpq's defaults would be used in place of what the user meant."""
    if find([*layers, os.environ], *_NAMES_A_DATABASE):
        return
    if skipped := find(layers, SKIPPED):
        raise ConfigError(f"DATABASE_URL is not set, and {skipped}; DBPOOL_DOTENV can name it")
    if any(layer.get("DATABASE_URL_FILE") == "" for layer in layers):
        raise ConfigError("DATABASE_URL_FILE is empty, and DATABASE_URL is not set")
    if meant := [key for key in _MEANT.split() if find(layers, key)]:
        raise ConfigError(f"DATABASE_URL is not set, but {meant[0]} is: rename it")


def names_in(layers: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the databases beside the default one."""
    return parse_list(find(layers, "DBPOOL_DATABASES") or "", "DBPOOL_DATABASES")


def unknown(
    layers: list[Mapping[str, Any]], databases: tuple[str, ...]
) -> Iterator[tuple[str, str | None]]:
    """Yield the `DBPOOL_` keys that mean nothing, each with what was probably meant."""
    known = COMMON.union(*map(variables_of, databases))
    given = {key for layer in layers for key in layer if key.startswith("DBPOOL_")}
    for key in sorted(given - known):
        url = _URL.fullmatch(key)
        libpq = key.replace("DBPOOL_", "PG")
        if libpq in _conninfo.VARIABLES.values():
            yield key, libpq
        elif url is None:
            yield key, nearest(key, known | {"PGPASSWORD_FILE"})
        elif url[1] in (None, "DATABASE", "DEFAULT"):
            yield key, f"DATABASE_URL{url[2] or ''}"
        elif url[1].lower() in databases:
            yield key, f"DBPOOL_{url[1]}_URL{url[2] or ''}"
        else:
            yield key, f"DBPOOL_DATABASES={','.join((*databases, url[1].lower()))}"


def warn_of_unknown(layers: list[Mapping[str, Any]], databases: tuple[str, ...]) -> None:
    """Log what `unknown` yields."""
    for key, suggestion in unknown(layers, databases):
        logger.warning("unknown variable %s is ignored%s", key, did_you_mean(suggestion))
