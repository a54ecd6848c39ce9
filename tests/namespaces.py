"""Commands that run other commands in Linux namespaces of their own, as containers do."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

IS_ROOT = os.geteuid() == 0


def unshared(*options: str) -> list[str]:
    """Return a command prefix that makes new namespaces; skip the test if that is not possible."""
    found = shutil.which("unshare")
    if found is None:
        pytest.skip("namespaces are made with Linux's unshare")
    command = [found, *options, *(() if IS_ROOT else ("--map-root-user",))]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace can be made here")
    return command


def own_pids() -> list[str]:
    """Return a prefix: the command becomes process 1 and sees no other process."""
    return unshared("--pid", "--fork", "--kill-child", "--mount-proc")


def read_only(*writable: str) -> list[str]:
    """Return a prefix: the command can write only to the named mounts."""
    script = """
    for mount in $(cut -d " " -f 5 /proc/self/mountinfo); do
        case "$0" in *" $mount "*) ;; *) mount -o remount,bind,ro "$mount" 2>/dev/null ;; esac
    done
    for place in /tmp /var/tmp / .; do
        touch "$place/dbpool-probe" 2>/dev/null && rm "$place/dbpool-probe" && exit 77
    done
    exec "$@"
    """
    command = [*unshared("--mount"), "sh", "-c", script, f" {' '.join(writable)} "]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be made read-only here")
    return command
