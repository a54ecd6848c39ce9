"""Named pools: one mapping, opened in order, closed in reverse."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from types import TracebackType
from typing import Any, Self

from dbpool.pool import Pool
from dbpool.settings import Settings, databases_from_env

logger = logging.getLogger("dbpool")


class Databases(Mapping[str, Pool[Any]]):
    """The pools of an application by name, the default one first.

    They are made at once and open themselves on first use. As a context manager it closes
    them at the end. *options* go to every `Pool`: `configure`, `kwargs`, `connection_class` ...
    """

    def __init__(
        self, settings: Mapping[str, Settings], listeners: Iterable[Any] = (), **options: Any
    ) -> None:
        heard = tuple(listeners)
        self._pools: dict[str, Pool[Any]] = {
            name: Pool(settings=each, listeners=heard, **options) for name, each in settings.items()
        }

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        dotenv: str | os.PathLike[str] | None = None,
        listeners: Iterable[Any] = (),
        **options: Any,
    ) -> Self:
        """Make the default pool and those of `DBPOOL_DATABASES`. Raises `ConfigError`."""
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
            raise KeyError(f"no database {name!r}, only {', '.join(self._pools)}") from None

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
