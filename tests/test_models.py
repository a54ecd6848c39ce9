"""Concurrent use of a pool in thousands of thread schedules: see `tests.models`."""

from __future__ import annotations

import subprocess

import pytest

from tests.scripts import python

pytest.importorskip("frontrun")

MODELS = ["checkout", "hand_over", "time_out", "close", "growth"]


def explore(name: str, schedules: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Explore a model in a process of its own, in which frontrun replaces locks and queues."""
    return python(
        "-m",
        "tests.models",
        name,
        str(schedules),
        *options,
        env={"FRONTRUN_ACTIVE": "1"},
        seconds=300.0,
    )


@pytest.mark.parametrize("name", MODELS)
def test_no_schedule_fails_in_a_short_run(name: str) -> None:
    done = explore(name, 25)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_a_model_finds_races_if_the_lock_is_missing(name: str) -> None:
    done = explore(name, 200, "--unlocked")
    assert done.returncode == 1
    assert done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_schedule_fails_in_a_long_run(name: str) -> None:
    done = explore(name, 400)
    assert done.returncode == 0, done.stdout + done.stderr
