"""The commands of the documentation that need an engine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.waiting import free_port
from webapp import ROOT

from .engine import docker

POSTGRES = os.environ.get("POSTGRES_IMAGE", "postgres")


def test_the_database_of_the_start_page_answers(checkout: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    [command] = re.findall(r"^docker (run .*) postgres$", page, re.MULTILINE)
    [url] = re.findall(r"^\$ export DATABASE_URL=(\S+)$", page, re.MULTILINE)
    port = free_port()  # 5432 may be taken
    command = command.replace(":5432:", f":{port}:")
    url = url.replace("@localhost/", f"@localhost:{port}/")
    assert str(port) in command
    assert str(port) in url
    container = docker(*shlex.split(command), POSTGRES).strip()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dbpool", "wait"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        docker("rm", "--force", "--volumes", container)


def test_the_compose_file_of_the_start_page_is_valid(checkout: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    [text] = re.findall(r"^```yaml\n(services:.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "compose.yaml").write_text(text)
    docker("compose", "config", "--quiet", cwd=tmp_path)
