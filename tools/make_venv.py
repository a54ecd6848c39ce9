"""Make a virtual environment from lock files, unless it is up to date.

Usage: python3 tools/make_venv.py .venv requirements.txt [...]

This runs on any Python, even an old one, so that it can say in one line what is missing.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
# A file in each environment: it says from which lock files that was made.
STAMP = ".stamp"
# Bytes that even an environment without packages needs.
ROOM = 32 * 2**20


def main(venv, *lock_files):
    """Bring the environment up to date; return at once if it is."""
    if sys.version_info < OLDEST:
        fail("Python %d.%d or newer is needed, this is %s" % (*OLDEST, sys.version.split()[0]))
    insist_on_ours(venv)
    wanted = fingerprint(lock_files)
    stamp = venv / STAMP
    if read(stamp) == wanted:
        return
    if not os.access(str(venv if venv.exists() else venv.parent), os.W_OK):
        fail("cannot write %s: choose another place, such as make run VENV=~/dbpool-venv" % venv)
    # Two runs at once, in two terminals, wait for each other. The file of the lock is kept.
    with venv.with_name(venv.name + ".lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if read(stamp) != wanted:
            make(venv, lock_files)
            # Written last, so that an interrupted run is repeated.
            stamp.write_text(wanted)


def insist_on_ours(venv):
    """Refuse a directory that is not an environment: its content would be deleted."""
    try:
        found = {path.name for path in venv.iterdir()}
    except FileNotFoundError:
        return
    except OSError as exc:
        fail("%s cannot hold the environment: %s" % (venv, exc.strerror))
    if found and STAMP not in found and "pyvenv.cfg" not in found:
        fail("%s is not empty, and no environment: choose another place: VENV=..." % venv)


def make(venv, lock_files):
    named = " and ".join(map(str, lock_files))
    print("making %s from %s ..." % (venv, named), flush=True)
    try:
        clear(venv)
    except OSError as exc:
        fail("cannot make %s anew: %s" % (venv, exc))
    made = run([sys.executable, "-m", "venv", str(venv)])
    if made.returncode:
        fail(why_no_venv(venv, made.stdout))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    wanted = ["--requirement=%s" % path for path in lock_files]
    installed = run([*pip, "install", "--quiet", "--retries", "2", "--require-hashes", *wanted])
    if installed.returncode:
        fail("cannot install %s: %s" % (named, reason(installed.stdout)))


def clear(venv):
    """Empty the directory, and mark it as ours, so that it is not refused after an interruption."""
    venv.mkdir(exist_ok=True)
    for path in venv.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        else:
            path.unlink()
    (venv / STAMP).write_text("")


def why_no_venv(venv, said):
    if "ensurepip is not available" in " ".join(said.split()):
        return "ensurepip is missing; on Debian: apt-get install python3-venv"
    if shutil.disk_usage(str(venv)).free < ROOM:
        return "no space left on the device of %s" % venv
    if "ensurepip" in said:
        # venv does not show ensurepip's output.
        said = run([str(venv / "bin" / "python"), "-m", "ensurepip", "--default-pip"]).stdout
    return "python3 -m venv failed: " + reason(said)


def fingerprint(lock_files):
    """Return a digest that changes with the packages, the Python, or this script."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (*lock_files, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(path):
    try:
        return path.read_text()
    except OSError:
        return None


def run(command):
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def reason(said):
    """Return the first error: pip's last message is only a consequence."""
    lowered = said.lower()
    if "no space left" in lowered:
        return "no space left on the device"
    if "newconnectionerror" in lowered or "name resolution" in lowered or "timed out" in lowered:
        return "the package index cannot be reached; is there a network?"
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    return errors[0] if errors else last_line(said)


def last_line(said):
    """Return the last line of a traceback, cut off: it may quote a long command."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"


def fail(message):
    sys.exit("venv: " + message)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; the next run starts again")
