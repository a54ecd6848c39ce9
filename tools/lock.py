"""Write the lock files: pip's own resolution of every bound in pyproject.toml, groups included."""

import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

HEADER = """\
# {what}, pinned.
# Made from the bounds in pyproject.toml by
#     make lock
"""


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())
    everything = bounds(project)
    peers = project["dependency-groups"]["bench"]
    needed = resolved([bound for bound in everything if bound not in peers])
    write("requirements.txt", "Every package to run, test and lint with", needed)
    # Beside the others, so that the two files never contradict each other.
    compared = resolved([f"{name}=={version}" for name, version in needed] + peers)
    extra = [item for item in compared if item not in needed]
    write("bench/requirements.txt", "What the benchmarks need beside ../requirements.txt", extra)


def write(path: str, what: str, packages: list[tuple[str, str]]) -> None:
    lines = sorted(f"{name}=={version}" for name, version in packages)
    Path(path).write_text(HEADER.format(what=what) + "\n".join(lines) + "\n")


def bounds(project: dict) -> list[str]:
    """Collect the dependencies, those of all extras, and those of all groups."""
    package = project["project"]
    found = list(package["dependencies"])
    for extra in package["optional-dependencies"].values():
        found += extra
    for group in project["dependency-groups"].values():
        # An included group is a table, and comes by itself.
        found += [bound for bound in group if isinstance(bound, str)]
    return found


def resolved(wanted: list[str]) -> list[tuple[str, str]]:
    """Ask pip what it would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install"]
        options = ["--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
        done = subprocess.run([*pip, *options, *wanted], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit("lock: pip found no resolution")
    installed = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return [(item["name"].lower(), item["version"]) for item in installed]


if __name__ == "__main__":
    main()
