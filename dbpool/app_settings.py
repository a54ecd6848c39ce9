"""What an application is set to beside its pools: readiness, views, shared statistics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dbpool._secrets import conceal, conceals_fields
from dbpool._values import find, flag, read_layers, secret, secret_of, words
from dbpool.errors import ConfigError

__all__ = ["AppSettings"]


@conceals_fields
@dataclass(frozen=True)
class AppSettings:
    """What an application is set to, beside its pools."""

    required: tuple[str, ...] = ("default",)
    token: str | None = field(default=None, repr=False)
    details: str = "token"
    stats_dir: str | None = None
    error_handlers: bool = True

    def __post_init__(self) -> None:
        if self.details not in ("token", "always"):
            raise ConfigError("DBPOOL_DETAILS must be token or always")

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        dotenv: str | os.PathLike[str] | None = None,
    ) -> AppSettings:
        """Read them from the environment and, if given, a `.env`."""
        environ = conceal(environ)
        return cls.from_config({}, environ, dotenv)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        dotenv: str | os.PathLike[str] | None = None,
    ) -> AppSettings:
        """Read them from an application's configuration, else from the environment."""
        config, environ = conceal(config), conceal(environ)
        layers = [config, *read_layers(environ, dotenv)]
        required = find(layers, "DBPOOL_REQUIRED")
        token, token_file = secret_of(layers, "DBPOOL_TOKEN")
        return cls(
            required=("default",) if required is None else words(required, "DBPOOL_REQUIRED"),
            token=secret(token_file, "DBPOOL_TOKEN_FILE") if token_file else token,
            details=str(find(layers, "DBPOOL_DETAILS") or "token"),
            stats_dir=find(layers, "DBPOOL_STATS_DIR"),
            error_handlers=flag(find(layers, "DBPOOL_ERROR_HANDLERS"), "DBPOOL_ERROR_HANDLERS"),
        )
