"""What can go wrong: the exceptions, and what a failure to connect means.

Nothing in here talks to a database or knows a pool.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

from dbpool._secrets import mask, printable, secrets_of

if TYPE_CHECKING:
    from dbpool.metrics import Snapshot

__all__ = [
    "CommitUncertain", "ConfigError", "DatabaseMisconfigured", "DatabaseUnavailable", "PoolClosed",
    "PoolError", "PoolExhausted", "PoolTimeout", "TooManyRequests", "classify", "describe",
    "is_permanent", "sanitize",
]  # fmt: skip

_NO_TEXT: Final = "(no text)"
SATURATED: Final = "saturated"
UNSUPPORTED_PARAMETER: Final = "unsupported startup parameter"  # PgBouncer, of our timeouts

# The kinds that waiting will hardly cure.
_PERMANENT: Final = frozenset({"password", "role", "database", "access", "tls", "conninfo"})

# libpq tells a failed connect by text only: `sqlstate` is None and the server's part is
# localised. Matched against the first line, most specific first; what matches nothing is
# transient. The texts are those of PostgreSQL 12 to 18 and of PgBouncer.
_TEXTS: Final = (
    # No name looks like that: it is a URL, or has a port or brackets.
    ("conninfo", r"resolve host '(?:[^':]*:\d*'|[^']*[][/@\s])|could not translate host name \"\["),
    ("dns", r"failed to resolve host|could not translate host name"),
    ("timeout", r"timeout expired|timed out|query_wait_timeout"),
    (
        SATURATED,
        r"no server connection within|too many (clients|connections)|slots are reserved|no more connections",
    ),
    ("starting", r"database system is|not yet accepting connections|recovery mode"),
    ("shutdown", r"terminating connection due to administrator command"),
    ("standby", r"session is (not )?read-only|server is (not )?in hot standby"),
    ("conninfo", r"authentication method|channel binding|GSSAPI encryption|OAuth"),
    ("password", r"authentication failed for|no password supplied|SASL auth"),
    ("role", r'role "[^"]*" does not exist|not permitted to log in|no such user'),
    ("database", r'database "[^"]*" does not exist|no such database|not currently accepting'),
    ("conninfo", r"could not access file|permission denied to set|requires a value"),
    (
        "access",
        r"failed: Permission denied|pg_hba\.conf (entry|rej)|permission denied for database",
    ),
    ("closed", r"unexpected eof|EOF detected"),  # in the middle of a TLS handshake, say
    ("tls", r"certificate|private key file|SSL engine|not support SSL|SSL error|sslmode"),
    ("refused", r"Connection refused|No such file or directory|login has been failing"),
    ("closed", r"server closed the connection|Connection reset"),
    ("conninfo", r"for parameter|configuration parameter|\" cannot be|command-line|wal ?sender"),
    ("conninfo", r"protocol_version|protocol (version|negot)|peer user name|could not match \d"),
    ("conninfo", r"Not a directory|Invalid argument|setsockopt|path .* is too long"),
    ("conninfo", UNSUPPORTED_PARAMETER),
    # The second and third: the port is that of another service.
    ("conninfo", r"invalid (port|connection opt|integer)|received invalid|expected authentication"),
    # What libpq refuses without asking a server. Its own text may be localised.
    ("conninfo", r"^connection is bad: (?!.*(\.s\.PGSQL\.|, \w+ \d+ |memory))"),
)


# How psycopg lists the attempts on several addresses: the host with its port, and the error.
_ATTEMPT: Final = re.compile(r"^- (host: .*), hostaddr: (?:'[^']*'|None): (.*)$", re.MULTILINE)


class ConfigError(ValueError):
    """Settings are wrong; the message names the variable or keyword, never a secret."""

    __module__ = "dbpool"


class PoolError(psycopg.OperationalError):
    """A pool could not do what was asked.

    `pool` is the pool's name, `snapshot` its state at that moment. Each caller gets an
    instance of its own. It can be pickled; the chained cause stays behind, as always.
    """

    __module__ = "dbpool"

    def __init__(
        self, message: str = "", *, pool: str = "", snapshot: Snapshot | None = None
    ) -> None:
        super().__init__(message)
        self.pool = pool
        self.snapshot = snapshot


class PoolExhausted(PoolError, PoolTimeout):
    """Every connection stayed checked out until the deadline; the text says by whom.

    Where none came back for that long, it also says whether the network may be to blame.
    """

    __module__ = "dbpool"


class DatabaseUnavailable(PoolError, PoolTimeout):
    """No connection could be made; `__cause__` is the last connect error.

    `kind` is what `classify` made of it, `since` the Unix time of the first failure,
    `retry_after` the seconds until the pool tries again.
    """

    __module__ = "dbpool"

    def __init__(
        self,
        message: str = "",
        *,
        pool: str = "",
        snapshot: Snapshot | None = None,
        kind: str = "unknown",
        since: float = 0.0,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message, pool=pool, snapshot=snapshot)
        self.kind = kind
        self.since = since
        self.retry_after = retry_after


class DatabaseMisconfigured(DatabaseUnavailable):
    """Password, role, database, access or TLS are wrong: waiting will hardly help."""

    __module__ = "dbpool"


class CommitUncertain(PoolError):
    """The connection was lost before the answer to COMMIT came: it may or may not have been done.

    The same holds for a statement in autocommit. `__cause__` is the connection's error.
    """

    __module__ = "dbpool"


def classify(exc: BaseException) -> str:
    """Name what kind of failure to connect *exc* is; "unknown" when it cannot be told.

    A best effort by type and text, as libpq gives nothing better. A name that does not
    resolve is transient: routine while containers start.
    """
    if isinstance(exc, ConfigError):
        return "conninfo"
    if isinstance(exc, psycopg.errors.ConnectionTimeout):
        return "timeout"
    if not isinstance(exc, psycopg.Error):  # a host's name may be none that can be encoded
        return "conninfo" if isinstance(exc, UnicodeError) and "idna" in str(exc) else "unknown"
    # Of each host and port the last attempt: psycopg tries every address of a name. The settings
    # are wrong only if they are for all of them.
    text = _text_of(exc)
    attempts = dict(_ATTEMPT.findall(text)) or {"": text.partition("\n")[0]}
    kinds = [_kind_of(line) for line in attempts.values()]
    kind = next((kind for kind in kinds if not is_permanent(kind)), kinds[-1])
    if kind != "unknown":
        return kind
    if isinstance(exc, psycopg.ProgrammingError) and exc.sqlstate is None:
        return "conninfo"  # with one, it is a statement of `configure` that failed
    if exc.pgconn is not None and exc.pgconn.needs_password:
        return "password"
    return "unknown"


def _kind_of(line: str) -> str:
    # `re` compiles the patterns at their first use, and keeps them.
    return next((kind for kind, text in _TEXTS if re.search(text, line, re.IGNORECASE)), "unknown")


def is_permanent(kind: str) -> bool:
    """Whether a failure of this *kind* will hardly go away by waiting."""
    return kind in _PERMANENT


def describe(exc: BaseException, conn: Any = None) -> str:
    """Return what logs, views and events say of *exc*, on one line.

    That is the text of an error of psycopg's or of our own, without the secrets of *conn*. Of
    any other, which a user's callback raised, it is the type alone: its text may hold anything.
    """
    if not isinstance(exc, (psycopg.Error, ConfigError)):
        return type(exc).__name__
    return mask(_text_of(exc), secrets_of({}, getattr(conn, "pgconn", None)))


def sanitize(exc: BaseException, secrets: Collection[str] = ()) -> BaseException:
    """Return *exc* without connection, traceback, causes and secrets, to be kept and chained.

    `psycopg.Error.pgconn` of a failed connect still knows the password.
    """
    name, text = type(exc).__name__, mask(_text_of(exc), secrets)
    if isinstance(exc, psycopg.Error):
        with suppress(Exception):  # a user's class may want other arguments, or have no text
            if str(bare := type(exc)(text)) == text:
                return bare
        return psycopg.OperationalError(f"{name}: {text}")
    everything = _text_of(exc, "{0} {0!r} {0.__dict__}")
    has_secrets = not mask(everything, secrets) == printable(everything) != _NO_TEXT
    if has_secrets or isinstance(exc, BaseExceptionGroup):
        stand_in = type(name, (Exception,), {"__module__": type(exc).__module__})
        return Exception.__new__(stand_in, text)
    exc.__cause__ = exc.__context__ = None
    return exc.with_traceback(None)


def _text_of(exc: BaseException, template: str = "{}") -> str:
    try:
        return template.format(exc)
    except Exception:  # noqa: BLE001  # a user's exception may fail at anything
        return _NO_TEXT
