"""What an application is set to beside its pools: its `.env`, readiness, views, statistics."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from dbpool._secrets import conceal, conceals_fields
from dbpool.errors import ConfigError
from dbpool.settings._parsing import parse_bool, parse_list
from dbpool.settings._sources import (
    SKIPPED,
    Dotenv,
    distrust,
    find,
    find_secret,
    parse_dotenv,
    read_dotenv,
    read_secret,
    read_sources,
)

__all__ = ["AppSettings", "find_dotenv"]

logger = logging.getLogger("dbpool")

_SHORT: Final = 16  # characters; with fewer a token may be guessed


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
        object.__setattr__(self, "details", str(self.details))
        if self.token and not _fits_a_header(self.token):
            raise ConfigError(
                "DBPOOL_TOKEN holds what cannot be sent as a Bearer token: it must be printable"
                " ASCII, without a blank at either end, and with = at its end alone"
            )
        if self.token and len(self.token) < _SHORT:
            logger.warning(
                "DBPOOL_TOKEN is shorter than %d characters and may be guessed; a good one is"
                " printed by: python -c 'import secrets; print(secrets.token_urlsafe())'",
                _SHORT,
            )

    def is_open_to_others(self, address: str) -> bool:
        """Whether everybody may see the details, on a server that listens on *address*.

        False where that is no IP address, as for a Unix socket or a name.
        """
        try:
            return self.details == "always" and not ip_address(address).is_loopback
        except ValueError:
            return False

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        dotenv: Dotenv = None,
    ) -> AppSettings:
        """Read them from the environment and, if given, a `.env`."""
        environ = conceal(environ)
        return cls.from_config({}, environ, dotenv)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        dotenv: Dotenv = None,
    ) -> AppSettings:
        """Read them from an application's configuration, else from the environment."""
        ours = {key: value for key, value in config.items() if str(key).startswith("DBPOOL_")}
        config, environ = conceal(ours), conceal(environ)
        del ours
        sources = [config, *read_sources(environ, dotenv)]
        required = find(sources, "DBPOOL_REQUIRED")
        token, token_file = find_secret(sources, "DBPOOL_TOKEN")
        return cls(
            required=("default",) if required is None else parse_list(required, "DBPOOL_REQUIRED"),
            token=read_secret(token_file, "DBPOOL_TOKEN_FILE") if token_file else token,
            details=str(find(sources, "DBPOOL_DETAILS") or "token"),
            stats_dir=find(sources, "DBPOOL_STATS_DIR"),
            error_handlers=parse_bool(
                find(sources, "DBPOOL_ERROR_HANDLERS"), "DBPOOL_ERROR_HANDLERS"
            ),
        )


def _fits_a_header(token: str) -> bool:
    is_plain = token.isascii() and token.isprintable() and token == token.strip()
    return is_plain and "=" not in token.rstrip("=")


def find_dotenv(config: Mapping[str, Any] | None = None) -> Mapping[str, str]:
    """Read the `.env` in the working directory, else the nearest one above it.

    `DBPOOL_DOTENV`, in *config* or in the environment, names another file, or is `off`. A file
    that somebody else could have written is skipped with a warning, unless it was named.
    """
    chosen = conceal((config or {}).get("DBPOOL_DOTENV"))
    del config  # as it came it would show a password to whoever looks at this frame
    if chosen is False:
        return {}
    named = chosen or conceal(os.environ.get("DBPOOL_DOTENV"))
    if named:
        return read_dotenv(named)
    passed: list[Path] = []
    try:
        here = Path.cwd()
    except OSError:  # the working directory is gone
        return {}
    for directory in (here, *here.parents):
        passed.append(directory)
        path = directory / ".env"
        if os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file it never raises
            return _read_if_trusted(path, passed)
    return {}


def _read_if_trusted(path: Path, passed: list[Path]) -> Mapping[str, str]:
    try:
        # Not to hang if somebody puts a pipe in its place.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not (reason := distrust(file, passed)):
                return parse_dotenv(file)
    except OSError as ex:
        reason = f"it cannot be read ({ex.strerror})"
    skipped = f"{path} is not read, since {reason}"
    logger.warning("%s", skipped)
    return {SKIPPED: skipped}
