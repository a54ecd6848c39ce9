"""Importing dbpool is cheap: its names are imported on first use."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import dbpool
from tests.scripts import python

ROOT = Path(__file__).parent.parent
MODULES = ("breaker", "databases", "errors", "events", "holders", "liveness", "metrics", "pool",
           "report", "retry", "settings")  # fmt: skip
ERRORS = [
    name
    for name in dbpool.__all__
    if isinstance(found := getattr(dbpool, name), type) and issubclass(found, BaseException)
]


def output_of(script: str) -> str:
    """Run a script in a new process; return its output."""
    done = python("-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = (
    "import sys; print(sorted(m for m in sys.modules"
    " if m.partition('.')[0] in ('dbpool', 'psycopg', 'psycopg_pool', 'backoff', 'flask')))"
)


@pytest.mark.parametrize("statement", ["import dbpool", "dbpool.__version__; dir(dbpool)"])
def test_importing_dbpool_imports_none_of_its_modules(statement: str) -> None:
    assert output_of(f"import dbpool; {statement}; {LOADED}") == "['dbpool']"


def test_importing_the_hooks_imports_only_the_standard_library() -> None:
    script = f"""
import sys
before = set(sys.modules)
from dbpool.gunicorn import *
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(tops - sys.stdlib_module_names))
{LOADED}
"""
    files = [f"dbpool.processes{name}" for name in ("", "._directory", "._files")]
    assert output_of(script).splitlines() == [
        "['dbpool']",
        f"{['dbpool', 'dbpool.gunicorn', *files]}",
    ]


def test_importing_an_error_does_not_import_the_pool() -> None:
    assert (
        output_of("import dbpool, sys; dbpool.ConfigError; print('dbpool.pool' in sys.modules)")
        == "False"
    )


FIRST = """
import sys
for name in {names}:
    for module in [m for m in sys.modules if m.partition(".")[0] == "dbpool"]:
        del sys.modules[module]
    import dbpool
    print(getattr(dbpool, name).__name__)
"""


def test_each_public_name_can_be_imported_first() -> None:
    assert output_of(FIRST.format(names=dbpool.__all__)).split() == dbpool.__all__


def test_each_public_module_is_an_attribute() -> None:
    names = output_of(FIRST.format(names=MODULES)).split()
    assert names == [f"dbpool.{name}" for name in MODULES]


def test_a_star_import_brings_all_public_names() -> None:
    script = "import dbpool\nfrom dbpool import *\nprint({*dbpool.__all__} - {*globals()})"
    assert output_of(script) == "set()"


def test_dir_lists_all_names_before_their_first_use() -> None:
    names = {*dbpool.__all__, *MODULES, "__version__"}
    assert output_of(f"import dbpool; print({names} - {{*dir(dbpool)}})") == "set()"


@pytest.mark.parametrize("name", ["Poool", "no_such_module", "flask", "_no_such", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    script = f"""
import dbpool
assert not hasattr(dbpool, {name!r})
try:
    dbpool.{name}
except AttributeError as ex:
    print(ex, ex.name)
"""
    assert output_of(script) == f"module 'dbpool' has no attribute {name!r} {name}"


def test_a_misspelt_name_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="Poool"):
        exec("from dbpool import Poool")


def test_an_error_can_be_unpickled_before_dbpool_is_imported() -> None:
    pickles = [pickle.dumps(getattr(dbpool, name)("why")) for name in ERRORS]
    script = f"""
import pickle, sys
for data in {pickles}:
    for module in [m for m in sys.modules if m.partition(".")[0] == "dbpool"]:
        del sys.modules[module]
    ex = pickle.loads(data)
    print(type(ex).__name__, *ex.args)
"""
    assert output_of(script).splitlines() == [f"{name} why" for name in ERRORS]


def test_many_threads_may_use_a_name_first_at_once() -> None:
    script = """
import dbpool, sys, threading
sys.setswitchinterval(1e-6)
begin, found = threading.Barrier(16), []

def use(name):
    begin.wait()
    found.append(getattr(dbpool, name).__name__)

names = [*dbpool.__all__, "pool", "settings", "databases", "metrics"]
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found))
"""
    assert len(dbpool.__all__) == 12
    assert output_of(script) == "16"


def test_importing_events_imports_no_module_for_error_messages() -> None:
    script = "import dbpool.events, sys; print({'difflib'} & {*sys.modules})"
    assert output_of(script) == "set()"
