"""Several databases by name: their settings, and a mapping of their pools."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from typing import Any, Self

from dbpool._secrets import conceal, safe_repr
from dbpool.errors import ConfigError
from dbpool.events import validate_listeners
from dbpool.pool import Pool
from dbpool.settings import (
    COMMON,
    NAME,
    Settings,
    build_settings,
    database_names,
    find_unknown,
    variables_of,
    warn_of_unknown,
)
from dbpool.settings._parsing import did_you_mean
from dbpool.settings._sources import Dotenv, Environ, find, read_sources

__all__ = ["Databases", "databases_from_env", "settings_from_config"]

logger = logging.getLogger("dbpool")

# What our keys in an application's configuration begin with, and how those end that name a server.
_PREFIXES = ("DBPOOL", "DATABASE", "PG")
_ENDINGS = "(?i)(ur[il]s?|dsn|conninfo|connection_?string|host(name)?)(_file)?$"


class Databases(Mapping[str, Pool[Any]]):
    """The pools of an application by name, the default one first.

    The pools are created at once and open on first use. As a context manager, the mapping closes
    them. Every `Pool` gets *options*: `configure`, `kwargs`, `connection_class` ...
    """

    def __init__(
        self, settings: Mapping[str, Settings], listeners: Iterable[Any] = (), **options: Any
    ) -> None:
        settings, options = conceal(settings), conceal(options)
        listeners = validate_listeners(listeners)
        self._pools: dict[str, Pool[Any]] = {}
        for name, each in settings.items():
            self._pools[str(name)] = Pool(settings=each, listeners=listeners, **options)

    @classmethod
    def from_env(
        cls,
        environ: Environ = None,
        dotenv: Dotenv = None,
        listeners: Iterable[Any] = (),
        **options: Any,
    ) -> Self:
        """Create the default pool and those that `DBPOOL_DATABASES` names.

        *environ* is the process's environment by default, *dotenv* the path of a `.env`. Raises
        `ConfigError` if a setting is wrong.
        """
        environ, options = conceal(environ), conceal(options)
        return cls(databases_from_env(environ, dotenv), listeners, **options)

    @property
    def default(self) -> Pool[Any]:
        """The pool called `default`."""
        return self["default"]

    def open(self) -> None:
        """Open each pool that is not open yet, without waiting for connections."""
        for pool in self._pools.values():
            pool.open()

    def close(self, timeout: float = 2.0) -> None:
        """Close all pools in reverse order, within *timeout* seconds; log failures and go on."""
        deadline = monotonic() + timeout
        for name, pool in reversed(self._pools.items()):
            try:
                pool.close(timeout=max(0.0, deadline - monotonic()))
            except Exception:
                logger.exception("closing pool %r failed", name)

    def __getitem__(self, name: str) -> Pool[Any]:
        if name not in self._pools:  # not caught: the chained error would show the name
            name = conceal(name)
            raise KeyError(f"no database {safe_name(name)}, only {', '.join(self._pools)}")
        return self._pools[name]

    def __contains__(self, name: object) -> bool:
        return name in self._pools

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    def __repr__(self) -> str:
        return f"<Databases {list(self._pools.values())!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def databases_from_env(environ: Environ = None, dotenv: Dotenv = None) -> dict[str, Settings]:
    """Return the settings of the default database and of `DBPOOL_DATABASES`, in order."""
    environ = conceal(environ)
    return settings_from_config({}, environ, dotenv)


def settings_from_config(
    config: Mapping[str, Any], environ: Environ = None, dotenv: Dotenv = None
) -> dict[str, Settings]:
    """Return the settings of all databases from an application's configuration.

    Its keys are names of variables; those that it lacks are read from the environment.
    `DBPOOL_DATABASES` may be a dict of URLs, or of dicts with `url` and fields. An unknown
    `DBPOOL_` key raises `ConfigError`.
    """
    # Other extensions keep their own values there, which may refer to the configuration itself.
    config = {k: _with_urls(k, v) for k, v in config.items() if _may_be_meant(str(k))}
    config, environ = conceal(config), conceal(environ)
    outside = read_sources(environ, dotenv)
    sources = [config, *outside]
    names = database_names(sources)
    for key, suggestion in find_unknown([config], names):
        raise ConfigError(f"there is no setting {key}{did_you_mean(suggestion)}")
    warn_of_unknown(outside, names)
    given = find(sources, "DBPOOL_DATABASES")
    details = given if isinstance(given, Mapping) else {}
    databases = {"default": build_settings("default", sources, {})}
    for name in names:
        _check_name(name, databases)
        detail = details.get(name, {})
        overrides = dict(detail)
        if "url" in overrides:
            overrides["conninfo"] = overrides.pop("url")
        databases[name] = build_settings(name, sources, overrides)
    return databases


def _with_urls(key: str, value: Any) -> Any:
    """Return `DBPOOL_DATABASES` with a dict for each database, and any other value as it is."""
    if key != "DBPOOL_DATABASES" or not isinstance(value, Mapping):
        return value
    return {k: v if isinstance(v, Mapping) else {"url": v} for k, v in value.items()}


def _may_be_meant(key: str) -> bool:
    return key.strip().upper().startswith(_PREFIXES) or re.search(_ENDINGS, key) is not None


def _check_name(name: str, taken: Mapping[str, object]) -> None:
    """Raise `ConfigError` if *name* cannot name a database besides those that are *taken*."""
    others = COMMON.union(*(variables_of(other) for other in taken if other != "default"))
    if not NAME.fullmatch(name):
        problem = (
            f": {safe_name(name)} is not a valid name for a database: use only lower-case"
            " letters, digits and _, and begin with a letter"
        )
    elif name == "default":
        problem = " names 'default' twice: leave it out, it is the database of DATABASE_URL"
    elif name in taken:
        problem = f" names {name!r} twice"
    elif collision := sorted(variables_of(name) & others):
        problem = f": {name!r} would make {collision[0]} ambiguous; choose another name"
    else:
        return
    raise ConfigError(f"DBPOOL_DATABASES{problem}")


def safe_name(name: object) -> str:
    """Return what a message may quote of a name, which may be a misplaced secret."""
    is_word = re.fullmatch("[a-z]{1,15}", str(name)) is not None
    return repr(str(name)) if is_word else safe_repr(name)
