"""What error trackers record: the local variables of each frame, and their contents."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote, quote_plus

TESTS_FOLDER = str(Path(__file__).parent)


def forms(secret: str) -> set[str]:
    """The forms in which a secret may appear."""
    return {secret, quote(secret, safe=""), quote_plus(secret), quote(secret)}


def shown(value: object, depth: int = 4) -> Iterator[str]:
    """What a tracker shows of a local variable: its repr and those of its contents."""
    with suppress(Exception):  # some have no repr
        yield repr(value)
    if depth and isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield from shown(key, depth - 1)
            yield from shown(item, depth - 1)
    elif (
        depth and isinstance(value, (Sequence, AbstractSet)) and not isinstance(value, (str, bytes))
    ):
        for item in list(value):
            yield from shown(item, depth - 1)


def of_frame(frame: FrameType) -> Iterator[str]:
    """What is shown of a frame, except frames of the tests."""
    if not frame.f_code.co_filename.startswith(TESTS_FOLDER):
        for name, value in list(frame.f_locals.items()):
            location = (
                f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}: {name} ="
            )
            yield from (f"{location} {text}" for text in shown(value))


def of_error(error: BaseException | None) -> Iterator[str]:
    """Everything that is shown of an error and of the errors it is chained to."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        ex = pending.pop()
        if ex is None or id(ex) in seen:
            continue
        seen.add(id(ex))
        pending += [ex.__cause__, ex.__context__]
        with suppress(Exception):
            yield f"{ex!r} {ex} {ex.args!r} {vars(ex)!r}"
        yield getattr(getattr(ex, "pgconn", None), "password", b"").decode()
        for frame, _ in traceback.walk_tb(ex.__traceback__):
            yield from of_frame(frame)


class Frames(logging.Handler):
    """Keeps what is shown of the frames below each log record of dbpool."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.shown: list[str] = []
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name}: {record.getMessage()}")
        self.shown += [record.getMessage(), repr(record.args), repr(vars(record))]
        if record.exc_info:
            self.shown += of_error(record.exc_info[1])
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] in ("dbpool", "psycopg_pool"):
                self.shown += of_frame(frame)
            frame = frame.f_back


def leaks(texts: Any, *secrets: str) -> list[str]:
    """Return those *texts* that contain a secret in any form."""
    return [text for text in texts if any(form in text for each in secrets for form in forms(each))]
