"""The settings of an application other than those of its pools, and the search for its `.env`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from dbpool._secrets import Secret, conceal, conceals_fields, safe_repr
from dbpool.errors import ConfigError
from dbpool.settings import _sources
from dbpool.settings._parsing import parse_choice, parse_list, parse_path, parsed, switch
from dbpool.settings._sources import Dotenv, Environ, find

__all__ = ["AppSettings", "find_dotenv"]

logger = logging.getLogger("dbpool")

_MIN_TOKEN: Final = 16  # characters; a shorter token may be guessed
_DETAILS: Final = {"token": "token", "always": "always"}


def _parse_text(value: object, known_as: str) -> str | None:
    """Return text, a number included; None for None. Raises `ConfigError`."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 128:
        value = Secret(value)
    if not isinstance(value, str | None):
        raise ConfigError(f"{known_as} must be a string, not {safe_repr(value)}")
    return value


@conceals_fields
@dataclass(frozen=True)
class AppSettings:
    """The settings of an application other than those of its pools. Raises `ConfigError`."""

    required: tuple[str, ...] = parsed(("default",), parse_list)
    token: str | None = field(default=None, repr=False, metadata={"parse": _parse_text})
    details: str = parsed("token", parse_choice, choices=_DETAILS)
    stats_dir: str | None = parsed(None, parse_path)
    error_handlers: bool = switch(True)
    blockers: bool = switch(True)
    show_queries: bool = switch(False)
    endpoint_metrics: bool = switch(False)
    serve: str | None = parsed(None, _parse_text)

    def __post_init__(self) -> None:
        for f in fields(self):
            if parse := f.metadata.get("parse"):
                value = parse(getattr(self, f.name), f"DBPOOL_{f.name}".upper())
                object.__setattr__(self, f.name, value)
        if self.token and not _fits_a_header(self.token):
            raise ConfigError(
                "DBPOOL_TOKEN cannot be sent as a Bearer token: it must be printable"
                " ASCII without blanks at either end, and with = only at the end"
            )
        if self.token and len(self.token) < _MIN_TOKEN:
            logger.warning(
                "DBPOOL_TOKEN is shorter than %d characters and may be guessed; a good one is"
                " printed by: python -c 'import secrets; print(secrets.token_urlsafe())'",
                _MIN_TOKEN,
            )

    def is_open_to_others(self, address: str) -> bool:
        """Whether everybody may see the details, where *address* is the server's or a client's.

        False for a Unix socket and for a name.
        """
        try:
            found = ip_address(address)
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None)  # of a client of IPv4 on a socket of IPv6
        return self.details == "always" and not (mapped or found).is_loopback

    @classmethod
    def from_env(cls, environ: Environ = None, dotenv: Dotenv = None) -> AppSettings:
        """Read the settings from the environment and, if given, a `.env`."""
        environ = conceal(environ)
        return cls.from_config({}, environ, dotenv)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], environ: Environ = None, dotenv: Dotenv = None
    ) -> AppSettings:
        """Read the settings from an application's configuration, then from the environment."""
        config = {key: value for key, value in config.items() if str(key).startswith("DBPOOL_")}
        config, environ, dotenv = conceal(config), conceal(environ), conceal(dotenv)
        sources = [config, *_sources.read_sources(environ, dotenv)]
        found = {f.name: find(sources, f"DBPOOL_{f.name}".upper()) for f in fields(cls)}
        _parse_text(config.get("DBPOOL_TOKEN") or None, "DBPOOL_TOKEN")  # before it is text
        found["token"], path = _sources.find_secret(sources, "DBPOOL_TOKEN")
        if path:
            name = "DBPOOL_TOKEN_FILE"
            found["token"] = _sources.read_secret(path, name, may_be_empty=True)
        return cls(**{name: value for name, value in found.items() if value is not None})


def _fits_a_header(token: str) -> bool:
    is_plain = token.isascii() and token.isprintable() and token == token.strip()
    return is_plain and "=" not in token.rstrip("=")


def find_dotenv(config: Mapping[str, Any] | None = None) -> Mapping[str, str]:
    """Read the `.env` in the working directory, else the nearest one above it.

    `DBPOOL_DOTENV`, in *config* or in the environment, names another file, or is `off`. A file
    that another user could have written is skipped with a warning, unless it was named.
    """
    chosen = conceal((config or {}).get("DBPOOL_DOTENV"))
    del config  # error trackers would show its passwords as a local variable
    if chosen is False:
        return {}
    if named := chosen or conceal(os.environ.get("DBPOOL_DOTENV")):
        return _sources.read_dotenv(named)
    try:
        here = Path.cwd()
    except OSError:  # the working directory is gone
        return {}
    directories = [here, *here.parents]
    for depth, directory in enumerate(directories, start=1):
        path = directory / ".env"
        if os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file it never raises
            return _read_if_trusted(path, directories[:depth])
    return {}


def _read_if_trusted(path: Path, directories: list[Path]) -> Mapping[str, str]:
    try:
        # O_NONBLOCK: a pipe in place of the file must not block this process.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not (reason := _sources.why_untrusted(file, directories)):
                return _sources.parse_dotenv(file)
    except OSError as ex:
        reason = f"it cannot be read ({ex.strerror})"
    skipped = f"{path} is not read, since {reason}"
    logger.warning("%s", skipped)
    return {_sources.SKIPPED: skipped}
