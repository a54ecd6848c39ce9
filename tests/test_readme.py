"""What the README shows runs as it stands there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbpool.settings import COMMON

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs(dsn: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DATABASE_URL": dsn},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1,)\n", "")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_example_is_python(block: str) -> None:
    ast.parse(block)


def test_every_variable_is_told_of() -> None:
    assert {name for name in COMMON if f"`{name}`" not in README} == set()


def test_no_link_of_the_readme_is_relative() -> None:
    """An index shows this page without the files beside it."""
    links = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(
        r"^\[[^\]]+\]: *(\S+)", README, re.MULTILINE
    )
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
