"""Several databases by name: their settings, and one mapping of pools over them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, Self

from dbpool._secrets import conceal, safe_repr
from dbpool.errors import ConfigError
from dbpool.events import validate_listeners
from dbpool.pool import Pool
from dbpool.settings import (
    COMMON,
    NAME,
    Settings,
    build,
    names_in,
    unknown,
    variables_of,
    warn_of_unknown,
)
from dbpool.settings._parsing import did_you_mean
from dbpool.settings._sources import Dotenv, find, read_sources

__all__ = ["Databases", "databases_from_env", "settings_from_config"]

logger = logging.getLogger("dbpool")

_PREFIXES = ("DBPOOL_", "DATABASE_URL")  # of our keys in an application's configuration


class Databases(Mapping[str, Pool[Any]]):
    """The pools of an application by name, the default one first.

    They are made at once and open themselves on first use. As a context manager it closes
    them at the end. *options* go to every `Pool`: `configure`, `kwargs`, `connection_class` ...
    """

    def __init__(
        self, settings: Mapping[str, Settings], listeners: Iterable[Any] = (), **options: Any
    ) -> None:
        settings, options = conceal(settings), conceal(options)
        heard = validate_listeners(listeners)
        self._pools: dict[str, Pool[Any]] = {}
        for name, each in settings.items():
            self._pools[name] = Pool(settings=each, listeners=heard, **options)

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        dotenv: Dotenv = None,
        listeners: Iterable[Any] = (),
        **options: Any,
    ) -> Self:
        """Make the default pool and those of `DBPOOL_DATABASES`. Raises `ConfigError`."""
        environ, options = conceal(environ), conceal(options)
        return cls(databases_from_env(environ, dotenv), listeners, **options)

    @property
    def default(self) -> Pool[Any]:
        """The pool called `default`."""
        return self["default"]

    def open(self) -> None:
        """Open every pool that is not open yet, without waiting for connections."""
        for pool in self._pools.values():
            pool.open()

    def close(self, timeout: float = 2.0) -> None:
        """Close all in reverse order, within *timeout* seconds; a failure stops nothing."""
        deadline = monotonic() + timeout
        for name, pool in reversed(self._pools.items()):
            try:
                pool.close(timeout=max(0.0, deadline - monotonic()))
            except Exception:
                logger.exception("closing pool %r failed", name)

    def __getitem__(self, name: str) -> Pool[Any]:
        try:
            return self._pools[name]
        except KeyError:
            name = conceal(name)
            known = ", ".join(self._pools)
            raise KeyError(f"no database {shown_name(name)}, only {known}") from None

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

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def databases_from_env(
    environ: Mapping[str, str] | None = None, dotenv: Dotenv = None
) -> dict[str, Settings]:
    """Return the settings of the default database and of `DBPOOL_DATABASES`, in order."""
    environ = conceal(environ)
    sources = read_sources(environ, dotenv)
    names = names_in(sources)
    warn_of_unknown(sources, names)
    return _databases(sources, names, {})


def settings_from_config(
    config: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    dotenv: Dotenv = None,
) -> dict[str, Settings]:
    """Return the settings of all databases from an application's configuration.

    Its keys are the variables' names; where one is missing the environment is asked.
    `DBPOOL_DATABASES` may be a dict of URLs, or of dicts with `url` and fields. An unknown
    `DBPOOL_` key raises `ConfigError`.
    """
    # What other extensions keep in there is theirs, and may refer to itself.
    config = {k: v for k, v in config.items() if _is_plain(v) or str(k).startswith(_PREFIXES)}
    config, environ = conceal(config), conceal(environ)
    outside = read_sources(environ, dotenv)
    sources = [config, *outside]
    wanted = find(sources, "DBPOOL_DATABASES")
    details = wanted if isinstance(wanted, Mapping) else {}
    names = names_in(sources)
    for key, suggestion in unknown([config], names):
        raise ConfigError(f"there is no setting {key}{did_you_mean(suggestion)}")
    warn_of_unknown(outside, names)
    return _databases(sources, names, details)


def _databases(
    sources: list[Mapping[str, Any]], names: tuple[str, ...], details: Mapping[str, Any]
) -> dict[str, Settings]:
    databases = {"default": build("default", sources, {})}
    for name in names:
        _check_name(name, databases)
        detail = details.get(name, {})
        overrides = dict(detail) if isinstance(detail, Mapping) else {"conninfo": conceal(detail)}
        if "url" in overrides:
            overrides["conninfo"] = overrides.pop("url")
        databases[name] = build(name, sources, overrides)
    return databases


def _is_plain(value: object) -> bool:
    return not isinstance(value, (Mapping, list))


def _check_name(name: str, taken: Mapping[str, object]) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"DBPOOL_DATABASES: {shown_name(name)} is no name for a database: it must begin with a"
            " small letter and hold only small letters, digits and _"
        )
    if name == "default":
        raise ConfigError(
            "DBPOOL_DATABASES names 'default' twice: leave it out, it is the database of DATABASE_URL"
        )
    if name in taken:
        raise ConfigError(f"DBPOOL_DATABASES names {name!r} twice")
    theirs = variables_of(name)
    others = COMMON.union(*(variables_of(other) for other in taken if other != "default"))
    if collision := sorted(theirs & others):
        raise ConfigError(
            f"DBPOOL_DATABASES: {name!r} would make {collision[0]} ambiguous; choose another name"
        )


def shown_name(name: object) -> str:
    """Return a name for a message if it is a plain word: it may be a secret in the wrong place."""
    is_word = re.fullmatch("[a-z]{1,15}", str(name)) is not None
    return repr(str(name)) if is_word else safe_repr(name)
