"""The documentation quotes the figures of `bench/README.md`, row by row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEASURED = (ROOT / "bench" / "README.md").read_text()
QUOTED = (ROOT / "docs" / "benchmarks.md").read_text()

# Rows and columns with another name in the documentation.
ALIASES = {
    "dbpool, fetch_one and execute": "dbpool, one trip",
    "dbpool, DBPOOL_PIPELINE_BEGIN": "dbpool, pipeline_begin",
    "Django's pool": "Django pool",
    "a connection for each request": "connect per request",
    "one SELECT, server far away": "the same, server far away",
    "ratio": "requests per second",
    "restart with 10 idle connections: first answer, errors in 30 requests": (
        "restart (immediate), 10 idle, next 30 requests"
    ),
    "outage of 20 s under load: first answer after it": "20 s outage under load: served after",
    "during that outage: duration of a call": "the same: a call while it is down",
    "frozen server, idle connections, timeout 2 s: a call; first answer after the thaw": (
        "all frozen, idle for 60 s, timeout 2: call; after thaw"
    ),
    "network silent, 10 connections idle for 60 s: first answer": (
        "10 idle for 60 s, network silent: first answer"
    ),
    "100 dead connections: first answer, errors before it": "100 dead: until one is served",
    "16 threads, room for 8 on the server, 10 s": "16 threads, room for 8, 10 s",
    "wrong password: duration of a call": "wrong password",
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def cells(text: str) -> Iterator[tuple[str, str, str]]:
    """Each non-empty cell of a page's tables, with the names of its row and column."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = [
            [plain(cell) for cell in line.strip("|\n").split("|")] for line in table.splitlines()
        ]
        for name, *values in rows:
            yield from (
                (name, column, value)
                for column, value in zip(header[1:], values, strict=True)
                if value
            )


def plain(cell: str) -> str:
    text = cell.replace("`", "").strip()
    return ALIASES.get(text, text)


SOURCE = {(row, column): value for row, column, value in cells(MEASURED)}


@pytest.mark.parametrize(("row", "column", "quoted"), list(cells(QUOTED)))
def test_a_pages_figure_is_the_measured_one(row: str, column: str, quoted: str) -> None:
    measured = SOURCE[row, column]
    spread = re.compile(r"±[\d.]+%?|\(at most [^)]*\)")
    figures = NUMBER.findall(spread.sub("", measured))
    assert set(NUMBER.findall(quoted)) <= set(figures), measured
    assert bool(NUMBER.search(quoted)) == bool(figures)
    assert ("waits" in quoted) == ("waits" in measured)


def figure(row: str, column: str, pattern: str) -> float:
    """A measured figure, in seconds if it has a unit of time."""
    found = re.search(pattern, SOURCE[row, column])
    assert found is not None, SOURCE[row, column]
    return float(found[1]) * (0.001 if found[0].endswith("ms") else 1.0)


RESTART = "restart (immediate), 10 idle, next 30 requests"
OUTAGE = "20 s outage under load: served after"


@pytest.mark.parametrize("page", ["README.md", "docs/why.md"])
def test_the_comparisons_figures_were_measured(page: str) -> None:
    """Both pages' tables have round figures; each is compared with its exact one."""
    text = (ROOT / page).read_text()
    assert "10 failed requests, or with `check=` more than 30 s" in text
    assert figure(RESTART, "psycopg_pool", r"(\d+) errors") == 10
    assert figure(RESTART, "psycopg_pool, check", r"([\d.]+) s") > 30
    assert "no failed request" in text
    assert figure(RESTART, "dbpool", r"(\d+) errors") == 0
    assert "served again 8 s after it is back | served within 1 s" in text
    assert round(figure(OUTAGE, "psycopg_pool", r"([\d.]+) s")) == 8
    assert round(figure(OUTAGE, "psycopg_pool, check", r"([\d.]+) s")) == 8
    assert figure(OUTAGE, "dbpool", r"([\d.]+) m?s") < 1
    assert "`PoolTimeout` after 30 s" in text
    assert figure("wrong password", "psycopg_pool", r"([\d.]+) s, PoolTimeout") == 30
    assert "with cause" in SOURCE["wrong password", "dbpool"]
    assert figure("gunicorn --preload, 3 workers, 300 requests", "dbpool", r"(\d+) shared") == 0
    assert figure("gunicorn --preload, 3 workers, 300 requests", "psycopg_pool", r"(\d+) sh") > 1


def test_the_cost_of_a_check_was_measured() -> None:
    text = (ROOT / "docs" / "why.md").read_text()
    ratio = r"\(([\d.]+) x\)"
    check = figure("psycopg_pool, check", "checkout and return", ratio)
    dbpool = figure("dbpool", "checkout and return", ratio)
    assert f"| {check:.0f} times the cost of a checkout | {dbpool:g} times" in text
