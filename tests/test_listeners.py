"""An invalid listener is an error when it is passed, not silence when an event is sent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from dbpool import ConfigError, Databases, Pool, Settings, events
from dbpool.events import Event, Listener, LoggingListener, name_of
from dbpool.flask import DBPool
from tests.fake import FakeServer
from tests.postgres import until


class Alarm(Listener):
    def circuit_opened(self, event: Event) -> None: ...


class Misspelt(Listener):
    def circut_opened(self, event: Event) -> None: ...


class Prefixed(Listener):
    def on_circuit_opened(self, event: Event) -> None: ...


class CamelCase(Listener):
    def circuitOpened(self, event: Event) -> None: ...  # noqa: N802


class PartlyMisspelt(Listener):
    def opened(self, event: Event) -> None: ...
    def timed_wait_out(self, event: Event) -> None: ...
    def wait_timedout(self, event: Event) -> None: ...


class NoEventMethod(Listener):
    def total(self) -> int:
        return 1


class WrongArguments(Listener):
    def opened(self) -> None: ...


class ExtraArgument(Listener):
    def opened(self, event: Event, pool: Pool[Any]) -> None: ...


class Asynchronous(Listener):
    async def opened(self, event: Event) -> None: ...


class AsynchronousCall:
    async def __call__(self, event: Event) -> None: ...


class NoListener:
    def opened(self, event: Event) -> None: ...


async def asynchronous(event: Event) -> None: ...


WRONG: list[Any] = [
    [Alarm],
    [Listener],
    [dict],
    [print, Alarm],
    ["x"],
    "x",
    b"x",
    [None],
    None,
    3,
    [3],
    [{}],
    [[print]],
    Alarm(),
    print,
    [Misspelt()],
    [Prefixed()],
    [CamelCase()],
    [PartlyMisspelt()],
    [NoEventMethod()],
    [Listener()],
    [WrongArguments()],
    [ExtraArgument()],
    [Asynchronous()],
    [AsynchronousCall()],
    [NoListener()],
    [asynchronous],
    [functools.partial(asynchronous)],
    [lambda: None],
    [lambda event, pool: None],
]


@pytest.mark.parametrize("listeners", WRONG)
def test_invalid_listeners_are_rejected(listeners: Any) -> None:
    with pytest.raises(ConfigError, match="listener"):
        Pool("host=nowhere", listeners=listeners)
    with pytest.raises(ConfigError, match="listener"):
        Databases({"default": Settings(conninfo="host=nowhere")}, listeners)
    with pytest.raises(ConfigError, match="listener"):
        DBPool(listeners=listeners)


def test_the_error_shows_the_correction_and_no_value() -> None:
    with pytest.raises(
        ConfigError, match=r"listener Alarm is a class: pass an instance, Alarm\(\)"
    ):
        Pool("host=nowhere", listeners=[Alarm])
    with pytest.raises(ConfigError, match="'circut_opened'; did you mean 'circuit_opened'"):
        Pool("host=nowhere", listeners=[Misspelt()])
    with pytest.raises(ConfigError) as caught:
        Pool("host=nowhere", listeners=["postgresql://u:hunter2@h/d"])
    assert "hunter2" not in str(caught.value)


class Counting(Listener):
    def __init__(self) -> None:
        self.received = 0

    def opened(self, event: Event) -> None:
        self._count(1)

    def _count(self, number: int) -> None:
        self.received += number

    def close(self) -> None: ...
    def total_of(self, others: int) -> int:
        return self.received + others


class Dynamic(Listener):
    def __init__(self) -> None:
        self.received: list[Event] = []

    def __getattr__(self, name: str) -> Callable[[Event], None]:
        return self.received.append


class Assigned(Listener):
    def __init__(self) -> None:
        self.opened = print


class Overridden(Listener):
    def __call__(self, event: Event) -> None: ...
    def circut(self, event: Event) -> None: ...


@pytest.mark.parametrize(
    "listener",
    [
        print, [].append, Alarm(), Counting(), Dynamic(), Assigned(), Overridden(), Mock(), repr,
        LoggingListener(), functools.partial(print, "event"), lambda *args: None, Counting().opened,
    ],
)  # fmt: skip
def test_valid_listeners_are_accepted(listener: Any) -> None:
    Pool("host=nowhere", listeners=[listener]).close()
    Pool("host=nowhere", listeners=iter([listener])).close()


def test_every_event_has_a_listener_method(fake: FakeServer) -> None:
    kinds = [
        kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)
    ]
    for kind in set(kinds) - {Event}:
        name = name_of(kind.__new__(kind))
        cls = type("Subscriber", (Listener,), {name: lambda self, event: None})
        fake.pool(listeners=[cls()]).close()


def test_an_accepted_listener_gets_events(fake: FakeServer) -> None:
    listener = Counting()
    with fake.pool(listeners=[listener]):
        until(lambda: listener.received == 1)
