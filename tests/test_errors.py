"""Exceptions can be pickled, and failures to connect are classified."""

from __future__ import annotations

import json
import logging
import pickle

import psycopg
import pytest

from dbpool.errors import (
    CommitUncertain,
    DatabaseMisconfigured,
    DatabaseUnavailable,
    FailureKind,
    PoolError,
    PoolExhausted,
    PoolTimeout,
    classify,
    is_permanent,
)
from dbpool.events import ConnectFailed, LoggingListener
from dbpool.metrics import PoolState, Snapshot


@pytest.mark.parametrize("cls", [PoolExhausted, CommitUncertain, PoolError])
def test_an_error_can_be_pickled(cls: type[PoolError]) -> None:
    error = cls("all out", pool="replica", snapshot=Snapshot(state="up", size=3))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    text = f"all out [{cls.code}]" if cls.code else "all out"
    assert (str(copy), copy.pool, copy.snapshot) == (text, "replica", error.snapshot)


@pytest.mark.parametrize("cls", [DatabaseUnavailable, DatabaseMisconfigured])
def test_an_outage_can_be_pickled(cls: type[DatabaseUnavailable]) -> None:
    error = cls("gone", pool="default", kind="refused", since=12.5, retry_after=0.25)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert isinstance(copy, PoolTimeout)
    assert (copy.kind, copy.since, copy.retry_after) == ("refused", 12.5, 0.25)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        # PgBouncer's before 1.18, see `tests/faults/test_pgbouncer.py`
        ("FATAL:  no such user", "role"),
        # PostgreSQL 12 to 15
        ("FATAL:  remaining connection slots are reserved for superusers", "saturated"),
        # Supavisor
        ("FATAL:  Max client connections reached", "saturated"),
        ("FATAL:  MaxClientsInSessionMode: max clients reached - in Session mode", "saturated"),
        ("FATAL:  (EMAXCONNSESSION) max clients reached in session mode", "saturated"),
        ("FATAL:  Tenant or user not found", "role"),
        ("FATAL:  (ENOTFOUND) tenant/user postgres.abc not found", "role"),
        # RDS Proxy
        ("FATAL:  The password that was provided for the role app is wrong.", "password"),
        ("FATAL:  This RDS proxy has no credentials for the role app.", "role"),
        ("FATAL:  RDS Proxy currently doesn\u2019t support command-line options.", "conninfo"),
        # Neon
        ("ERROR:  Endpoint ID is not specified. Either please upgrade the client", "conninfo"),
        ("ERROR:  connection is insecure (try using `sslmode=require`)", "tls"),
    ],
)
def test_messages_of_other_servers_are_classified(text: str, kind: str) -> None:
    assert classify(psycopg.OperationalError(f"connection failed: {text}\nmore")) == kind


def test_a_users_failed_statement_is_not_classified_as_a_conninfo_error() -> None:
    assert classify(psycopg.errors.UndefinedTable('relation "t" does not exist')) == "unknown"
    assert classify(psycopg.ProgrammingError("invalid dsn")) == "conninfo"
    assert not is_permanent("unknown")


@pytest.mark.parametrize("member", [*FailureKind, *PoolState])
def test_kinds_and_states_behave_as_strings(
    member: FailureKind | PoolState, caplog: pytest.LogCaptureFixture
) -> None:
    text = member.value
    assert member == text
    assert {str(member): 1}[member] == 1
    assert (str(member), repr(member), f"{member}") == (text, repr(text), text)
    assert json.dumps(member) == json.dumps(text)
    assert pickle.loads(pickle.dumps(member)) == text
    with caplog.at_level(logging.INFO, logger="dbpool"):
        LoggingListener()(ConnectFailed("main", 1.0, "refused", member))
    assert caplog.messages == [
        f"pool 'main': connect_failed seconds=1 error='refused' kind={text!r}"
    ]


def test_classify_returns_a_kind() -> None:
    timeout = psycopg.errors.ConnectionTimeout("connection timeout expired")
    for error in (timeout, ValueError(), psycopg.OperationalError("Connection refused")):
        assert type(classify(error)) is FailureKind


def test_only_errors_that_a_person_must_repair_are_permanent() -> None:
    permanent = {kind for kind in FailureKind if is_permanent(kind)}
    assert permanent == {"access", "conninfo", "database", "password", "role", "tls"}
