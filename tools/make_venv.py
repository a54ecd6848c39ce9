"""Make a virtual environment out of lock files, once.

Usage: python3 tools/make_venv.py .venv requirements.txt [...]

Run by whatever Python there is, old ones included, so that it can say what is missing in a line.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)


def main(venv, *lock_files):
    """Bring the environment up to date; return at once if it is."""
    if sys.version_info < OLDEST:
        fail("Python %d.%d or newer is needed, this is %s" % (*OLDEST, sys.version.split()[0]))
    wanted = fingerprint(lock_files)
    stamp = venv / ".stamp"
    if read(stamp) == wanted:
        return
    if not os.access(str(venv if venv.exists() else venv.parent), os.W_OK):
        fail("cannot write %s: remove it, or choose another place: VENV=..." % venv)
    # Two at once, in two terminals, wait for each other.
    with venv.with_name(venv.name + ".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if read(stamp) != wanted:
            make(venv, lock_files)
            # Last, so that what was interrupted is done again.
            stamp.write_text(wanted)


def make(venv, lock_files):
    named = " and ".join(map(str, lock_files))
    print("making %s from %s ..." % (venv, named), flush=True)
    shutil.rmtree(str(venv), ignore_errors=True)
    made = run([sys.executable, "-m", "venv", str(venv)])
    if made.returncode:
        fail("python3 -m venv failed; on Debian: apt-get install python3-venv")
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    wanted = ["--requirement=%s" % path for path in lock_files]
    installed = run([*pip, "install", "--quiet", "--retries", "2", "--require-hashes", *wanted])
    if installed.returncode:
        fail("cannot install %s: %s" % (named, reason(installed.stdout)))


def fingerprint(lock_files):
    """Differs when the packages, the Python or this recipe differ."""
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
    """The cause that pip met first; what it says last is a consequence."""
    lowered = said.lower()
    if "newconnectionerror" in lowered or "name resolution" in lowered or "timed out" in lowered:
        return "the package index cannot be reached; is there a network?"
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    return errors[0] if errors else "pip failed: " + said.strip()[-200:]


def fail(message):
    sys.exit("venv: " + message)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; the next time it is made anew")
