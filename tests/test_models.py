"""What threads do to a pool at once, by thousands of schedules of their steps: see `tests.models`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("frontrun")

MODELS = ["checkout", "hand_over", "time_out", "close", "growth"]


def explore(name: str, schedules: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Explore in a process of its own: there locks and queues are frontrun's."""
    return subprocess.run(
        [sys.executable, "-m", "tests.models", name, str(schedules), *options],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"FRONTRUN_ACTIVE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_schedule_of_a_few_goes_wrong(name: str) -> None:
    done = explore(name, 25)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_model_finds_that_the_lock_is_missing(name: str) -> None:
    done = explore(name, 200, "--unlocked")
    assert done.returncode == 1
    assert done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_schedule_of_many_goes_wrong(name: str) -> None:
    done = explore(name, 400)
    assert done.returncode == 0, done.stdout + done.stderr
