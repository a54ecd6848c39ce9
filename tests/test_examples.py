"""Each example runs from an empty directory as its first lines describe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

OUTPUTS = {
    "processes": r"144\n\[0, 1, 4, 9, 16\]\n",
    "cron_job": r"0 deleted\n",
    "script": r"\('hello',\)\n42\n2 checkouts\n",
    "orm": r"\['hello'\]\n0 still checked out\n",
    "replica": r"reading from the primary\ndefault up\nreplica up\n",
    "listener": r"default: connected in \d+ ms\n(default: connected in \d+ ms\n)?default: closed\n",
    "transfer": r"moved\nalready done\n\[\(1, 70\), \(2, 30\)\]\n",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_script_prints_what_it_should(name: str, dsn: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": dsn,
            **(
                {"DBPOOL_DATABASES": "replica", "DBPOOL_REPLICA_URL": dsn}
                if name == "replica"
                else {}
            ),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(OUTPUTS[name], done.stdout), done.stdout
    assert done.stderr == ""


@contextmanager
def made(name: str, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """An example's application, made as `flask --app` makes it."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    spec = spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    app: Flask = module.create_app()
    try:
        yield app
    finally:
        app.extensions["dbpool"].processes.close()
        app.extensions["dbpool"].databases.close()


def test_the_application_serves(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with made("application", dsn, monkeypatch) as app:
        client = app.test_client()
        assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
        assert client.post("/notes", json={"title": "first"}).json == {"id": 1}
        assert client.get("/notes").json == [{"id": 1, "title": "first"}]
        assert client.get("/db/health/ready").status_code == 200
        assert client.get("/db/stats").status_code == 403


def test_the_examples_own_check_is_in_readiness(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with made("custom_check", dsn, monkeypatch) as app:
        answer = app.test_client().get("/db/health/ready")
        assert answer.json is not None
        assert answer.json["checks"].keys() == {"disk"}


def test_the_tests_of_the_application_pass(dsn: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         f"--rootdir={tmp_path}", "-c", os.devnull, ROOT / "examples" / "test_notes.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": dsn},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )  # fmt: skip
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == OUTPUTS.keys() | {"application", "custom_check", "test_notes"}
    listed = (ROOT / "examples" / "README.md").read_text()
    assert {name for name in names if f"`{name}.py`" not in listed} == set()
