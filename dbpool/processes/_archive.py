"""Reads the files of all processes, and keeps the totals of those that have ended.

A process lives as long as it holds the lock on its file `….alive`. Processes of other pid
namespaces see that lock too: containers may share the directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from dbpool.diagnosis.endpoints import Rows, complete
from dbpool.metrics import TIMES, Snapshot
from dbpool.processes._files import is_held, locked, read, start_time, write
from dbpool.report import (
    SCHEMA,
    Process,
    Report,
    malformed,
    read_count,
    read_optional,
    read_pid,
    read_pools,
    read_seconds,
    read_text,
    read_usage,
)

ALIVE: Final = ".alive"
USAGE: Final = ".usage"
_HOLDER: Final = ("thread", "seconds", "where", "endpoint", "pid", "status", "waits")  # as a row
_MAX_HOLDERS: Final = 40  # of all pools in a file, the longest
MAX_FILES: Final = 1024  # that are read

T = TypeVar("T")
Warn = Callable[[str, str], None]  # once for each subject, with a message


def part_to_json(part: Report) -> dict[str, Any]:
    """Return the content of a process's file."""
    (process,) = part.processes
    head = {key: value for key, value in vars(process).items() if key != "age"}
    held = sorted((h.seconds for pool in part.pools.values() for h in pool.holders), reverse=True)
    least = held[_MAX_HOLDERS] if len(held) > _MAX_HOLDERS else -1.0
    pools = {name: _pool_to_json(pool, least) for name, pool in part.pools.items()}
    return {"schema": SCHEMA, **head, "pools": pools}


def _pool_to_json(pool: Snapshot, least: float) -> dict[str, Any]:
    """Return what is read back of a pool, which is written each second: the less, the better.

    Of its holders those that have held for longer than *least* seconds.
    """
    data = pool.to_json()
    for name in TIMES:
        data[name] = {key: data[name][key] for key in ("sum_ns", "max", "buckets")}
    rows = [vars(h) | {"seconds": round(h.seconds, 3)} for h in pool.holders if h.seconds > least]
    data["holders"] = [[row[key] for key in _HOLDER] for row in rows]
    return data


def _pool_from_json(data: Any, pid: int) -> dict[str, Any]:
    holders = [dict(zip(_HOLDER, row, strict=True)) | {"worker": pid} for row in data["holders"]]
    return {**data, "holders": holders}


def _part_from_json(data: Any) -> Report:
    """Rebuild a process's report from its file; raise `ValueError` if there is none in it."""
    with malformed("record"):
        _check_schema(data)
        process = Process(
            pid=read_pid(data["pid"]),
            start=read_text(data["start"]),
            number=read_count(data["number"]),
            written=read_seconds(data["written"]),
            uptime=read_seconds(data["uptime"]),
            interval=read_seconds(data["interval"]),
            threads=read_optional(read_count, data["threads"]),
            busy=read_optional(read_count, data["busy"]),
        )
        pools = {name: _pool_from_json(pool, process.pid) for name, pool in data["pools"].items()}
        return Report(read_pools(pools), (process,))


def _check_schema(data: Any) -> None:
    if data["schema"] != SCHEMA:
        raise ValueError("it is of another version")


class Archive:
    """The files of one application's processes in *directory*."""

    def __init__(self, directory: Path, app: str, warn: Warn) -> None:
        self._directory = directory
        self._app = app
        self._path = directory / f"{app}.archive"
        self._warn = warn

    def collect(self, own_key: str, *, usage: bool) -> list[Report]:
        """Return the reports of the other living processes, and of all that have ended.

        Files of processes that have ended since are moved into the archive. *usage* says whether to
        read the use by endpoint of those that live.
        """
        with locked(self._directory / f"{self._app}.lock") as is_locked:
            folded, archived = self._read()
            living: list[Report] = []
            dead: dict[Path, Report] = {}
            for path in sorted(self._directory.glob(f"{self._app}-*-*.json"))[:MAX_FILES]:
                part = self._read_part(path)
                if part is None or part.processes[0].key == own_key:
                    continue
                if _is_alive(path, part.processes[0]):
                    living.append(self._with_usage(path, part) if usage else part)
                else:
                    dead[path] = _completed(self._with_usage(path, part))
            ended = [p.totals_only() for p in dead.values() if p.processes[0].key not in folded]
            archived = archived.merge(*ended)
            if dead and is_locked:
                self._write(dead, archived)
        return [archived, *living]

    def _read(self) -> tuple[set[str], Report]:
        """Return the keys of the processes that were added last, and the totals."""
        try:
            data = read(self._path)
            with malformed("archive"):
                _check_schema(data)
                totals = Report(read_pools(data["pools"]), usage=read_usage(data.get("usage", {})))
                return set(map(read_text, data["folded"])), totals
        except FileNotFoundError:
            return set(), Report({})
        except (OSError, ValueError) as ex:
            self._warn(self._path.name, f"{self._path} cannot be used: {ex}")
            return set(), Report({})

    def _write(self, dead: Mapping[Path, Report], archived: Report) -> None:
        """Write the archive, then remove the files: after a crash in between, none counts twice."""
        data = {
            "schema": SCHEMA,
            "folded": [part.processes[0].key for part in dead.values()],
            "pools": archived.to_json()["pools"],
            "usage": archived.usage,
        }
        try:
            write(self._path, data)
            for path in dead:
                path.with_suffix(ALIVE).unlink(missing_ok=True)
                path.with_suffix(USAGE).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except OSError as ex:
            self._warn("archive", f"cannot archive statistics: {ex.strerror}")

    def _read_part(self, path: Path) -> Report | None:
        return self._try_read(path, _part_from_json)

    def _with_usage(self, path: Path, part: Report) -> Report:
        return replace(part, usage=self._try_read(path.with_suffix(USAGE), _usage_from_json) or {})

    def _try_read(self, path: Path, parse: Callable[[Any], T]) -> T | None:
        try:
            return parse(read(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as ex:
            self._warn(path.name, f"{path} cannot be used: {ex}")
            return None


def _usage_from_json(data: Any) -> dict[str, Rows]:
    with malformed("use by endpoint"):
        _check_schema(data)
        return read_usage(data["usage"])


def _completed(part: Report) -> Report:
    """Return the full report of a process that ended, whose file of use by endpoint is older."""
    usage = {name: complete(part.usage.get(name, {}), pool) for name, pool in part.pools.items()}
    return replace(part, usage=usage)


def _is_alive(path: Path, process: Process) -> bool:
    held = is_held(path.with_suffix(ALIVE))
    if held is None:  # the file system keeps no locks
        return start_time(process.pid) == process.start
    return held
