"""OpenTelemetry with gunicorn: all workers together report exactly what the clients counted."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from .gunicorn_site import Site
from .pools import SLACK
from .scripts import ROOT
from .waiting import until

pytest.importorskip("opentelemetry.sdk")

WORKERS, THREADS, CLIENTS = 4, 4, 8
INTERVAL = 0.5  # seconds between two exports
COLLECTING = 0.25  # seconds at most between reading a count and its timestamp
APP = """
from dbpool.opentelemetry import instrument
instrument(app.extensions["dbpool"].databases)
"""
# Replaces the exporter that the documentation's sample names.
EXPORTER = """
import os
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

def OTLPMetricExporter():
    file = open(f"exported-{os.getpid()}.jsonl", "a", buffering=1)
    return ConsoleMetricExporter(file, lambda data: data.to_json(indent=None) + "\\n")
"""


def sample() -> str:
    """The `gunicorn.conf.py` that the page shows."""
    page = (ROOT / "docs" / "opentelemetry.md").read_text()
    (found,) = re.findall(
        r"^```python\n(# gunicorn\.conf\.py.*?)^```$", page, re.DOTALL | re.MULTILINE
    )
    return str(found)


class Export:
    """One export of a worker: the number of uses, the time, and the attributes."""

    def __init__(self, line: str) -> None:
        (resource,) = json.loads(line)["resource_metrics"]
        attributes = resource["resource"]["attributes"]
        self.instance = attributes["service.instance.id"]
        (scope,) = resource["scope_metrics"]
        found = {each["name"]: each["data"]["data_points"] for each in scope["metrics"]}
        (point,) = found["db.client.connection.use_time"]
        self.count, self.time = point["count"], point["time_unix_nano"] / 1e9
        self.start = point["start_time_unix_nano"]
        names = {
            name for points in found.values() for each in points for name in each["attributes"]
        }
        assert names == {"db.client.connection.pool.name", "db.client.connection.state"}


def stop(site: Site) -> None:
    """Stop it once all workers serve: gunicorn loses signals to a worker that is starting."""
    until(lambda: len(site.stats()["processes"]) == WORKERS, 30.0)
    site.stop()


class Traffic:
    """What the clients saw: the times of each worker's answers, and the errors."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.answers: defaultdict[int, list[float]] = defaultdict(list)
        self.errors: list[str] = []  # any worker may have served these requests

    def send(self, number: int) -> None:
        with ThreadPoolExecutor(CLIENTS) as threads:
            for answer in threads.map(self._ask, range(number)):
                if isinstance(answer, str):
                    self.errors.append(answer)
                else:
                    self.answers[answer[0]].append(answer[1])

    def _ask(self, n: int) -> tuple[int, float] | str:
        try:
            return int(self.site.get("/")), time.time()
        except (OSError, HTTPException) as ex:  # the worker may have been killed while answering
            return repr(ex)

    def counted(self) -> dict[int, int]:
        return {pid: len(times) for pid, times in self.answers.items()}


@pytest.fixture
def start(make_site: Callable[..., Site], tmp_path: Path) -> Callable[..., Site]:
    """A function that serves with the page's configuration; exports are written to *tmp_path*."""

    def start(**options: Any) -> Site:
        package = tmp_path / "opentelemetry" / "exporter" / "otlp" / "proto" / "http"
        package.mkdir(parents=True)
        (package / "metric_exporter.py").write_text(EXPORTER)
        more = f"{sample()}\nworkers, threads, worker_class = {WORKERS}, {THREADS}, 'gthread'\n"
        interval = str(int(1000 * INTERVAL))
        # Otherwise the search for blockers, on a busy machine, adds a use that no client made.
        options["DBPOOL_BLOCKERS"] = "false"
        return make_site(more=more, app=APP, OTEL_METRIC_EXPORT_INTERVAL=interval, **options)

    return start


def exports(directory: Path) -> dict[int, list[Export]]:
    """Each worker's exports in order; a worker that used no connection has none."""
    return {
        int(path.stem.partition("-")[2]): found
        for path in directory.glob("exported-*.jsonl")
        if (found := [Export(line) for line in lines(path) if "use_time" in line])
    }


def lines(path: Path) -> list[str]:
    """The complete lines: a worker may have been killed while writing one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_counts(directory: Path) -> dict[int, int]:
    return {pid: found[-1].count for pid, found in exports(directory).items()}


def assert_in_slots(directory: Path, most: int) -> None:
    """Check that there are at most *most* series, and that no two workers report one at once."""
    found = exports(directory).values()
    assert len({each.instance for series in found for each in series}) <= most
    starts = {(series[-1].instance, series[-1].start) for series in found}
    assert len(starts) == len(found)


@pytest.mark.parametrize("number", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_recycled_and_killed_workers_report_what_the_clients_counted(
    start: Callable[..., Site], tmp_path: Path, number: int
) -> None:
    """A killed worker's report may lack at most its last export interval."""
    site = start(max_requests=number // 3)
    traffic = Traffic(site)
    traffic.send(number // 2)
    latest = sorted(traffic.answers, key=lambda pid: traffic.answers[pid][-1])[-WORKERS:]
    killed = min(latest, key=lambda pid: len(traffic.answers[pid]))  # far from its last request
    until(lambda: killed in exports(tmp_path))
    killing = Timer(0.1, os.kill, (killed, signal.SIGKILL))
    killing.start()
    traffic.send(number // 2)
    killing.join()
    stop(site)
    reported, counted = last_counts(tmp_path), traffic.counted()
    answered, last = traffic.answers[killed], exports(tmp_path)[killed][-1]
    errors = len(traffic.errors)
    assert errors <= CLIENTS, traffic.errors  # each client may have waited for the killed worker
    assert reported.pop(killed) <= counted.pop(killed) + errors
    assert last.count >= sum(moment <= last.time - COLLECTING for moment in answered)
    assert answered[-1] - last.time <= INTERVAL + SLACK
    unanswered = Counter(reported)
    unanswered.subtract(counted)
    assert min(unanswered.values()) >= 0, "an answer was not counted"
    assert sum(unanswered.values()) <= errors, (unanswered, traffic.errors)
    assert_in_slots(tmp_path, WORKERS)


@pytest.mark.slow
@pytest.mark.parametrize("max_requests", [0, 7_000])
def test_100_000_requests_are_reported_exactly(
    start: Callable[..., Site], tmp_path: Path, max_requests: int
) -> None:
    site = start(max_requests=max_requests)
    traffic = Traffic(site)
    traffic.send(100_000)
    stop(site)
    assert traffic.errors == []
    assert last_counts(tmp_path) == traffic.counted()
    assert sum(last_counts(tmp_path).values()) == 100_000
    assert_in_slots(tmp_path, WORKERS)
