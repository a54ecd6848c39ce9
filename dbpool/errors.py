"""The exceptions, and the kinds of failure to connect.

Nothing here talks to a database or knows a pool.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests

from dbpool._secrets import MASK, mask, printable, read_lines, secrets_of
from dbpool.metrics import Snapshot, holders_by_place

__all__ = [
    "CommitUncertain", "ConfigError", "DatabaseMisconfigured", "DatabaseUnavailable", "FailureKind",
    "PoolClosed", "PoolError", "PoolExhausted", "PoolTimeout", "TooManyRequests", "classify",
    "describe", "is_permanent", "sanitize",
]  # fmt: skip

_NO_TEXT: Final = "(no text)"
# What PgBouncer and RDS Proxy say of our timeouts.
UNSUPPORTED_PARAMETER: Final = re.compile("unsupported startup parameter|support command-line opt")


class FailureKind(StrEnum):
    """Why a connection could not be made; each kind equals its string.

    `python -m dbpool explain DBE02` and `DBE03` say what each of them means.
    """

    ACCESS = "access"  # pg_hba.conf, or the permissions of a socket, file or database
    CLOSED = "closed"  # the server closed the connection
    CONNINFO = "conninfo"  # a wrong parameter, or one that the server does not accept
    DATABASE = "database"  # it does not exist, or accepts no connections
    DESCRIPTORS = "descriptors"  # this process may open no more files
    DNS = "dns"  # transient: routine while containers start
    PASSWORD = "password"  # noqa: S105
    REFUSED = "refused"  # nothing listens there
    ROLE = "role"
    SATURATED = "saturated"  # the server or the pooler has no connection left
    SHUTDOWN = "shutdown"
    STANDBY = "standby"  # a standby where a primary was asked for, or the other way round
    STARTING = "starting"
    TIMEOUT = "timeout"
    TLS = "tls"
    UNKNOWN = "unknown"

    __repr__ = str.__repr__  # in logs and events as in JSON


_PERMANENT: Final = frozenset({"access", "conninfo", "database", "password", "role", "tls"})

# libpq reports a failed connect as text only: `sqlstate` is None, and the server's part of the
# text is localised. Patterns are searched for in the first line, the most specific one first. The
# texts are those of PostgreSQL 12 to 18 and of PgBouncer.
_TEXTS: Final = [x.partition(": ")[::2] for x in read_lines(__package__, "failures.txt")]

# If it tried several addresses, psycopg lists each attempt like this: the host and port, the error.
_ATTEMPT: Final = re.compile(r"^- (host: .*), hostaddr: (?:'[^']*'|None): (.*)$", re.MULTILINE)


class _Coded(Exception):
    """An error whose text ends with a code, which `python -m dbpool explain CODE` explains."""

    code = ""

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} [{self.code}]" if self.code else text


class ConfigError(_Coded, ValueError):
    """Settings are wrong; the message names the variable or keyword, never a secret."""

    code = "DBE07"


class PoolError(_Coded, psycopg.OperationalError):
    """The base of a pool's errors.

    `pool` is the pool's name, `snapshot` its state at that moment. Each caller gets its own
    instance. The error can be pickled, but without its chained cause.
    """

    pool: str = ""
    snapshot: Snapshot | None = None

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        vars(self).update(attributes)


class PoolExhausted(PoolError, PoolTimeout):
    """All connections stayed checked out until the deadline; the text names the holders.

    If no connection was returned in that time, the text also says whether the network may be why.
    """

    code = "DBE01"


class DatabaseUnavailable(PoolError, PoolTimeout):
    """No connection could be made; `__cause__` is the last connect error.

    `kind` is its `FailureKind`, `since` the Unix time of the first failure, `retry_after` the
    seconds until the pool tries again.
    """

    code = "DBE02"
    kind: str = FailureKind.UNKNOWN
    since: float = 0.0
    retry_after: float = 0.0


class DatabaseMisconfigured(DatabaseUnavailable):
    """Password, role, database, access, TLS or a parameter is wrong: waiting will hardly help."""

    code = "DBE03"


class CommitUncertain(PoolError):
    """The connection was lost before the answer to COMMIT arrived: the server may have committed.

    Also raised for a statement in autocommit. `__cause__` is the connection's error.
    """

    code = "DBE04"


for _cls in (ConfigError, PoolError, *PoolError.__subclasses__(), DatabaseMisconfigured):
    _cls.__module__ = "dbpool"  # the path that users import them from, for tracebacks and pickles


def closed_error(pool: str, *, was_opened: bool = True) -> PoolClosed:
    """Build the error of a checkout from a pool that is closed, or not open yet."""
    state = "already closed" if was_opened else "not open yet"
    return PoolClosed(f"the pool {pool!r} is {state} [DBE06]")


def too_many_error(pool: str, now: Snapshot, max_waiting: int) -> TooManyRequests:
    """Build the error of a caller who may not wait beside the others."""
    text = f"pool {pool!r}: {now.waiting} waiting already, max_waiting is {max_waiting};"
    return TooManyRequests(f"{text} {now.active} of {now.max_size} connections checked out [DBE05]")


def exhausted_error(
    pool: str, now: Snapshot, seconds: float, held: int, suspicion: str
) -> PoolExhausted:
    """Build the error of a caller who waited *seconds*, and itself has *held* connections.

    *suspicion* is what may delay the holders, if anything is known.
    """
    nested = (
        f"; nested: this thread itself holds {held}, and n threads that hold {held + 1} at once"
        f" need a max_size of at least n * {held} + 1"
    )
    text = (
        f"pool {pool!r}: no connection within {seconds:.2f} s: {now.active} of {now.max_size}"
        f" checked out, {now.idle} idle, {now.waiting - 1} more waiting; held longest:"
        f" {holders_by_place(now.holders) or 'none, they are being checked or reset'}{nested if held else suspicion}"
    )
    return PoolExhausted(text, pool=pool, snapshot=now)


def no_answer_error(seconds: float) -> psycopg.OperationalError:
    """Build the error of a server that has been silent for that time."""
    span = f"for {seconds:.1f} s" if seconds >= 0.1 else "yet"
    return psycopg.errors.ConnectionTimeout(f"no answer from the server {span}")


def classify(exc: BaseException) -> FailureKind:
    """Return what kind of failure to connect *exc* is.

    This is a best effort by type and text: libpq provides nothing better.
    """
    if isinstance(exc, ConfigError):
        return FailureKind.CONNINFO
    if isinstance(exc, psycopg.errors.ConnectionTimeout):
        return FailureKind.TIMEOUT
    if not isinstance(exc, psycopg.Error):
        # It cannot be encoded; Python 3.12 says so in a note.
        is_host = isinstance(exc, UnicodeError) and "idna" in f"{exc} {vars(exc)}"
        return FailureKind.CONNINFO if is_host else FailureKind.UNKNOWN
    # psycopg tries every address of a name: keep the last attempt for each host and port. The
    # settings are to blame only if they are wrong for all of them.
    text = _text_of(exc)
    attempts = dict(_ATTEMPT.findall(text)) or {"": text.partition("\n")[0]}
    kinds = [_kind_of(line) for line in attempts.values()]
    kind = next((kind for kind in kinds if not is_permanent(kind)), kinds[-1])
    if kind is FailureKind.UNKNOWN:
        # With a sqlstate it is a statement of `configure` that failed.
        if isinstance(exc, psycopg.ProgrammingError) and exc.sqlstate is None:
            return FailureKind.CONNINFO
        if exc.pgconn is not None and exc.pgconn.needs_password:
            return FailureKind.PASSWORD
    return kind


def _kind_of(line: str) -> FailureKind:
    # `re` compiles the patterns at their first use, and keeps them.
    kinds = (FailureKind(kind) for kind, text in _TEXTS if re.search(text, line, re.IGNORECASE))
    return next(kinds, FailureKind.UNKNOWN)


def is_permanent(kind: str) -> bool:
    """Whether this *kind* of failure will hardly go away by waiting."""
    return kind in _PERMANENT


def describe(exc: BaseException, conn: Any = None) -> str:
    """Return the one line that logs, views and events show of *exc*.

    For an error of psycopg or of dbpool it is the text, without the secrets of *conn*, or of the
    connection that could not be made, and without the statement that failed and its values: a
    callback's may hold any secret. For any
    other exception, which a user's callback raised, it is the type alone: its text may hold
    anything.
    """
    if not isinstance(exc, (psycopg.Error, ConfigError)):
        return type(exc).__name__
    return mask(_text_of(exc), secrets_of({}, getattr(conn or exc, "pgconn", None)))


def sanitize(exc: BaseException, secrets: Collection[str] = ()) -> BaseException:
    """Return *exc* without connection, traceback, causes and secrets, so that it can be kept.

    `psycopg.Error.pgconn` of a failed connect still contains the password.
    """
    cls, text = type(exc), mask(_text_of(exc), secrets)
    if isinstance(exc, psycopg.Error):
        with suppress(Exception):  # a user's class may want other arguments, or have no text
            if str(copy := cls(text)) == text:
                return copy
        return psycopg.OperationalError(f"{cls.__name__}: {text}")
    everything = _text_of(exc, "{0} {0!r} {0.__dict__}")
    has_secrets = not mask(everything, secrets) == printable(everything) != _NO_TEXT
    if has_secrets or isinstance(exc, BaseExceptionGroup):
        stand_in = type(cls.__name__, (Exception,), {"__module__": cls.__module__})
        return Exception.__new__(stand_in, text)
    exc.__cause__ = exc.__context__ = None
    return exc.with_traceback(None)


def _text_of(exc: BaseException, template: str = "{}") -> str:
    try:
        # If a statement failed, return only the reason, without the statement and its values.
        if isinstance(exc, psycopg.Error) and exc.sqlstate and exc.diag.message_primary:
            return re.sub(r'(?s)(: |near )".*"', rf'\1"{MASK}"', exc.diag.message_primary)
        return template.format(exc)
    except Exception:  # noqa: BLE001  # a user's exception may fail at anything
        return _NO_TEXT
