"""The layout of the code: floors, sizes, and allowed imports."""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from psycopg_pool import ConnectionPool

import dbpool.pool
from dbpool import Pool
from dbpool.pool._store import Store

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dbpool"

# A folder is listed as one name, or file by file; then its own name means its `__init__`.
FLOORS = {
    0: ["_threads", "_secrets", "metrics", "errors", "liveness", "events"],
    1: [
        "settings._parsing",
        "settings._sources",
        "settings._conninfo",
        "settings",
        "retry",
        "breaker",
        "holders",
    ],
    2: [
        "pool._compatible",
        "pool._psycopg",
        "pool._pipelining",
        "pool._session",
        "pool._fork",
        "pool._notices",
        "pool._bag",
        "pool._waiting",
        "pool._store",
        "pool._connector",
        "pool._lending",
        "pool._transaction",
        "pool._returning",
        "pool._maintenance",
        "pool._options",
        "pool._seam",
        "pool._pool",
        "pool",
    ],
    3: ["embedded", "databases", "settings.app", "settings.origins", "diagnosis"],
    4: [
        "_gevent",
        "_http",
        "_per_process",
        "_rows",
        "_sign_in",
        "report",
        "health",
        "processes",
        "monitor",
        "sizing",
    ],
    5: [
        "opentelemetry",
        "prometheus",
        "door",
        "gunicorn",
        "codes",
        "testing",
        "cli",
        "flask",
        "__main__",
    ],
}
# Tools, each with the only folder or module that may import it.
TOOLS = {
    "flask": "flask",
    "gunicorn": "gunicorn",
    "opentelemetry": "opentelemetry",
    "prometheus_client": "prometheus",
    "psutil": "embedded",
    "pytest": "testing",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# On a floor, modules come before those that import them.
RANK = {name: rank for rank, name in enumerate(name for names in FLOORS.values() for name in names)}
FILES = sorted(PACKAGE.rglob("*.py"))
FILES_OF_POOL = sorted((PACKAGE / "pool").glob("_[a-z]*.py"))


def listed(dotted: str) -> str:
    """The entry of FLOORS for a module or a name in it: the longest that matches."""
    parts = dotted.split(".")
    found = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in found if name in FLOOR_OF), parts[0])


def module_of(path: Path) -> str:
    return listed(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imports(path: Path) -> Iterator[str]:
    """The modules that *path* imports, except those for the type checker only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # The imported name may be a submodule.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


CORE = [path for path in FILES if FLOOR_OF.get(module_of(path), 9) <= 2]


@cache
def code_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines of code, without blank lines, comments and docstrings."""
    source = path.read_text()
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and previous in (
            tokenize.NEWLINE,
            tokenize.INDENT,
        )
        if token.type not in skipped | {tokenize.NEWLINE} and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.DEDENT, tokenize.ENCODING):
            previous = token.type
    return frozenset(lines)


def test_every_module_has_a_floor() -> None:
    assert {module_of(path) for path in FILES} - {"__init__"} == FLOOR_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_downwards(path: Path) -> None:
    module = module_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top != "webapp"
        assert TOOLS.get(top, module) == module, f"only the adapter of {top} imports it"
        if top != "dbpool" or module == "__init__" or rest == "__version__":
            continue
        used = listed(rest)
        if used != module:
            assert RANK[used] < RANK[module], f"{module} may not import {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_the_lower_floors_are_small() -> None:
    total = sum(len(code_lines(path)) for path in CORE)
    assert total < 4123  # to come down to 3,000: what comes in pays with what goes out


def test_one_class_stands_between_the_parent_and_the_pool() -> None:
    own = [cls for cls in Pool.__mro__[1:] if cls.__module__.startswith("dbpool")]
    assert [cls.__name__ for cls in own] == ["PoolBase"]
    assert own[0].__bases__[0] is ConnectionPool


def test_only_the_store_takes_its_lock() -> None:
    """The two exceptions are the hot lines in `Pool._acquire` and `Pool._release`."""
    found: Counter[str] = Counter()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.withitem) and "store.lock" in ast.unparse(node.context_expr):
                found[path.name] += 1
    assert found == {"_pool.py": 2}
    public = {
        name: method
        for name, method in vars(Store).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    unlocked = {name for name, method in public.items() if not hasattr(method, "__wrapped__")}
    assert unlocked == {"flush_later", "hand_over_or_store"}, "called with the lock held"


_QUESTION = re.compile(r"_?(is|are|has|have|was|were|can|may|must|needs?|wants?)_")
_ACTIONS = {"add", "append", "clear", "discard", "draw", "pop", "put", "remove", "update", "write"}


def actions(function: ast.FunctionDef) -> list[str]:
    """What a function changes beside its own variables, as far as its code shows."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = (part for target in targets for part in ast.walk(target))
            found += [
                ast.unparse(x) for x in parts if isinstance(x, (ast.Attribute, ast.Subscript))
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver = node.func.value
            is_own = isinstance(receiver, ast.Name) and receiver.id not in ("self", "cls")
            if node.func.attr in _ACTIONS and not is_own:
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_answers_a_question_changes_nothing(path: Path) -> None:
    """A function whose name asks, such as `is_due`, only answers; what acts is named by a verb."""
    predicates = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and _QUESTION.match(node.name)
    )
    assert {node.name: found for node in predicates if (found := actions(node))} == {}


def test_functions_are_short() -> None:
    """In the core the median is at most five lines of code, and the 90th percentile at most 20."""
    sizes = sorted(
        len(code_lines(path).intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
        for path in CORE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert sizes[len(sizes) // 2] <= 5
    assert sizes[len(sizes) * 9 // 10] <= 20


def test_importing_dbpool_brings_no_optional_package() -> None:
    script = (
        "import sys; from dbpool import *;"
        "print([m for m in ('flask', 'prometheus_client', 'gunicorn', 'dotenv', 'opentelemetry') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_type_information_ships() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_public_names_are_sorted_and_show_their_public_path() -> None:
    assert dbpool.__all__ == sorted(dbpool.__all__)
    for name in dbpool.__all__:
        found = getattr(dbpool, name)
        if isinstance(found, type) and issubclass(found, BaseException):
            assert found.__module__ in ("dbpool", "psycopg_pool"), "tracebacks show the public path"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_has_a_docstring(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring.splitlines()[0]) <= 99


def test_a_gunicorn_configuration_gets_hooks_and_nothing_else() -> None:
    settings = pytest.importorskip("gunicorn.config").KNOWN_SETTINGS
    from dbpool import gunicorn

    assert set(gunicorn.__all__) <= {setting.name for setting in settings}


# The maps


def test_contributing_names_every_folder_and_module_of_the_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:dbpool/)?(\w+(?:/|\.py))`", text))
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert (folders | modules) - named == set()


def test_the_pools_own_map_names_every_file() -> None:
    named = set(re.findall(r"`(_\w+)`", dbpool.pool.__doc__ or ""))
    assert {path.stem for path in FILES_OF_POOL} == named


def test_the_pools_own_map_names_functions_that_exist() -> None:
    named = re.findall(r"`(\w+)\.(\w+)`", dbpool.pool.__doc__ or "")
    modules = {path.stem: import_module(f"dbpool.pool.{path.stem}") for path in FILES_OF_POOL}
    owners: dict[str, object] = {"dbpool": dbpool, **modules}
    for module in modules.values():
        owners |= {name: each for name, each in vars(module).items() if isinstance(each, type)}
    assert len(named) > 20
    assert [pair for pair in named if not hasattr(owners[pair[0]], pair[1])] == []
