"""Scripts that tests of faults run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
EXIT_SECONDS = 2.0

# A fork in a process with threads is what is tested; newer Pythons warn of every one.
_WARNINGS = "error,ignore:This process:DeprecationWarning"


def environ() -> dict[str, str]:
    """The environment of a process that is to find what we find."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": _WARNINGS}


def run_script(script: Path, *arguments: str, seconds: float = 60.0) -> str:
    """Run a script that says `END <monotonic time>` last; return what it said.

    It must succeed, and its process must be gone soon after that.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environ(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    ended = time.monotonic()
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Traceback" not in said, said
    ends = [line for line in done.stdout.splitlines() if line.startswith("END ")]
    assert ends, said
    taken = ended - float(ends[-1].split()[1])
    assert taken < EXIT_SECONDS, f"the process exited after {taken:.1f} s: {said}"
    return said
