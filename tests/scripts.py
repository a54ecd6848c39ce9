"""Run Python in separate processes: commands, and scripts that must end in time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXIT_SECONDS = 2.0

# The tests fork processes that have threads, of which newer Pythons warn each time.
_WARNINGS = "error,ignore:This process:DeprecationWarning"


def python(
    *arguments: object,
    prefix: Iterable[str] = (),
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = False,
    seconds: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and wait for its end.

    *prefix* is a command that runs it, *env* is added to this environment; with *check* it must
    succeed.
    """
    done = subprocess.run(
        [*prefix, sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def environ() -> dict[str, str]:
    """The environment for a process that imports the same packages."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": _WARNINGS}


def run_script(script: Path, *arguments: str, seconds: float = 60.0) -> str:
    """Run a script that prints `END <monotonic time>` last; return its output.

    It must succeed, and its process must end soon after that.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environ(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    exited_at = time.monotonic()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Traceback" not in output, output
    end_lines = [line for line in done.stdout.splitlines() if line.startswith("END ")]
    assert end_lines, output
    taken = exited_at - float(end_lines[-1].split()[1])
    assert taken < EXIT_SECONDS, f"the process exited after {taken:.1f} s: {output}"
    return output
