"""Fixtures: a Docker Engine, images built on it, and the application run by compose.

These tests are slow: `.ci/containers` runs them, and `make test-slow` if an engine answers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import free_port

from .engine import Project, attempt, copy_checkout

PORTS = ("PORT", "DEV_PORT", "CLUSTER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
BASE = os.environ.get("PYTHON_IMAGE", "python:3.13-slim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tests' measurements."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"measured: {name}: {value}")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("docker") is None or attempt("compose", "version").returncode != 0:
        pytest.skip("there is no docker compose")
    if attempt("info").returncode != 0:
        pytest.skip("no Docker Engine answers")
    checkout = tmp_path_factory.mktemp("checkout")
    copy_checkout(checkout)
    return checkout


# A container takes a second or two to restart, and on a busy machine longer than the default.
SETTINGS = {"DBPOOL_OUTAGE_GRACE": "10s", "DBPOOL_TIMEOUT": "15s"}


@pytest.fixture(scope="session")
def stack(checkout: Path) -> Iterator[Project]:
    """PostgreSQL, the application, and its development service, after the first `up`."""
    ports = {name: str(free_port()) for name in PORTS}
    project = Project(checkout, {**ports, "DEV_USER": str(os.getuid())})
    project.set(**SETTINGS)
    # All services at once, with those of the cluster.
    project("--profile", "*", "build", "schema", "dev", "pgbouncer", "prometheus")
    try:
        project("--profile", "dev", "up", "--detach", "--wait", "--wait-timeout", "120")
        yield project
    finally:
        project("--profile", "*", "down", "--volumes", "--timeout", "5")


@pytest.fixture(scope="session")
def port(stack: Project) -> int:
    return int(stack.environ["PORT"])


@pytest.fixture(scope="session")
def token(stack: Project) -> str:
    """The token that compose printed."""
    found = re.search(r"token: ([0-9a-f]{48})$", stack.logs("schema"), re.MULTILINE)
    assert found
    return found[1]
