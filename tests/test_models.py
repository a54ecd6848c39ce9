"""What threads do to a pool at once, by thousands of schedules of their steps: see `tests.models`."""

from __future__ import annotations

import subprocess

import pytest

from tests.scripts import python

pytest.importorskip("frontrun")

MODELS = ["checkout", "hand_over", "time_out", "close", "growth"]


def explore(name: str, schedules: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Explore in a process of its own: there locks and queues are frontrun's."""
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
