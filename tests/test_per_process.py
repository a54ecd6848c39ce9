"""Values that belong to one process, and services that start with a server's worker."""

from __future__ import annotations

from itertools import count

from dbpool._per_process import PerProcess, Starter
from tests.scripts import python

FORK = """
import os
from dbpool._per_process import PerProcess

values = PerProcess(object)
assert values.known() is None
own = values()
assert values() is own is values.known()
assert values.inherited() == []
if (pid := os.fork()) == 0:
    assert values.known() is None
    assert values() not in (own, None)
    assert values.inherited() == [own]
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert values() is own
assert values.inherited() == []
"""


class Counted:
    def __init__(self) -> None:
        self.starts = 0

    def start(self) -> None:
        self.starts += 1


def test_a_forked_child_has_values_of_its_own() -> None:
    python("-c", FORK, check=True)


def test_a_value_is_made_at_its_first_use() -> None:
    made = count()
    values = PerProcess(lambda: f"value {next(made)}")
    assert next(made) == 0
    assert (values(), values()) == ("value 1", "value 1")


def test_instances_start_with_the_worker_and_later_ones_at_once() -> None:
    starter: Starter[Counted] = Starter()
    old, dropped = Counted(), Counted()
    starter.add(old)
    starter.add(dropped)
    del dropped
    assert (old.starts, starter.is_started) == (0, False)
    starter.start()
    new = Counted()
    starter.add(new)
    assert [old.starts, new.starts] == [1, 1]
    assert set(starter) == {old, new}
