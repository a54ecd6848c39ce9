"""OpenTelemetry over gunicorn's workers: together they report what the clients counted, to the unit."""

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
COLLECTING = 0.25  # seconds at most from the reading of a count to the time that it is given
APP = """
from dbpool.opentelemetry import instrument
instrument(app.extensions["dbpool"].databases)
"""
# Takes the place of the one that the sample in the documentation names.
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
    """One export of a worker: how many uses of connections it counts, and when and for whom."""

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
    """Stop it once all workers serve: gunicorn loses the signal for one that just starts."""
    until(lambda: len(site.stats()["processes"]) == WORKERS, 30.0)
    site.stop()


class Traffic:
    """What the clients saw: for each worker when its answers came, and how many got none."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.answers: defaultdict[int, list[float]] = defaultdict(list)
        self.errors: list[str] = []  # any worker may have served these

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
        except (OSError, HTTPException) as ex:  # or the worker was killed within its answer
            return repr(ex)

    def counted(self) -> dict[int, int]:
        return {pid: len(times) for pid, times in self.answers.items()}


@pytest.fixture
def start(make_site: Callable[..., Site], tmp_path: Path) -> Callable[..., Site]:
    """Serve with the page's configuration; exports come into files of this directory."""

    def start(**options: Any) -> Site:
        package = tmp_path / "opentelemetry" / "exporter" / "otlp" / "proto" / "http"
        package.mkdir(parents=True)
        (package / "metric_exporter.py").write_text(EXPORTER)
        more = f"{sample()}\nworkers, threads, worker_class = {WORKERS}, {THREADS}, 'gthread'\n"
        interval = str(int(1000 * INTERVAL))
        return make_site(more=more, app=APP, OTEL_METRIC_EXPORT_INTERVAL=interval, **options)

    return start


def exports(directory: Path) -> dict[int, list[Export]]:
    """What each worker exported, in order; one that never used a connection has nothing to say."""
    return {
        int(path.stem.partition("-")[2]): found
        for path in directory.glob("exported-*.jsonl")
        if (found := [Export(line) for line in lines(path) if "use_time" in line])
    }


def lines(path: Path) -> list[str]:
    """The lines that are whole: a worker may have been killed in the middle of one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_counts(directory: Path) -> dict[int, int]:
    return {pid: found[-1].count for pid, found in exports(directory).items()}


def assert_in_slots(directory: Path, most: int) -> None:
    """No more series than workers at a time, and none that is reported by two at once."""
    found = exports(directory).values()
    assert len({each.instance for series in found for each in series}) <= most
    starts = {(series[-1].instance, series[-1].start) for series in found}
    assert len(starts) == len(found)


@pytest.mark.parametrize("number", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_what_recycled_and_killed_workers_report_is_what_the_clients_counted(
    start: Callable[..., Site], tmp_path: Path, number: int
) -> None:
    """Of a worker that was killed it may be less, by its last export interval at most."""
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
    assert errors <= CLIENTS, traffic.errors  # each waited for the worker that was killed
    assert reported.pop(killed) <= counted.pop(killed) + errors
    assert last.count >= sum(moment <= last.time - COLLECTING for moment in answered)
    assert answered[-1] - last.time <= INTERVAL + SLACK
    unanswered = Counter(reported)
    unanswered.subtract(counted)
    assert min(unanswered.values()) >= 0, "every answer was counted"
    assert sum(unanswered.values()) <= errors, (unanswered, traffic.errors)
    assert_in_slots(tmp_path, WORKERS)


@pytest.mark.slow
@pytest.mark.parametrize("max_requests", [0, 7_000])
def test_100_000_requests_are_reported_to_the_unit(
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
