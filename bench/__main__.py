"""`python -m bench [--quick] [NAME …]`: run the benchmarks, print tables, write `bench/results`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from bench._report import Missing, Table

ALL = (
    "checkout",
    "query",
    "contention",
    "spike",
    "timeouts",
    "scaling",
    "web",
    "observe",
    "recovery",
    "sizes",
    "failover",
    "storm",
    "stops",
)

# The value that each plot shows, the factor that it is multiplied by, and the unit of the result.
PLOTS = {
    "checkout": ("median", 1e6, "us"),
    "query": ("median", 1e6, "us"),
    "contention": ("throughput", 1.0, "per second"),
    "spike": ("seconds", 1e3, "ms"),
    "timeouts": ("seconds", 1e3, "ms"),
    "scaling": ("median", 1e6, "us"),
    "web": ("median", 1.0, "requests/s"),
    "observe": ("median", 1e3, "ms"),
    "recovery": ("seconds", 1e3, "ms"),
    "failover": ("seconds", 1.0, "s"),
    "storm": ("peak", 1.0, "/s"),
    "stops": ("failed", 1.0, "failed"),
    "sizes": ("connections", 1.0, "connections"),
}


def main() -> int:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter, under a minute; nothing is written"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ALL)):
        parser.error(f"there is no benchmark {unknown[0]!r}")
    logging.disable()  # what the peers log about their failures
    missing = 0
    for name in arguments.names or ALL:
        print(f"{name}:", flush=True)
        try:
            table = importlib.import_module(f"bench.{name}").run(arguments.quick)
        except Missing as ex:
            print(f"left out: {ex}\n", flush=True)
            missing = 1
        except ModuleNotFoundError as ex:
            print(f"bench: {ex.name} is missing: pip install -r bench/requirements.txt")
            return 1
        else:
            _show(table, name, write=not arguments.quick)
    return missing


def _show(table: Table, name: str, *, write: bool) -> None:
    print(f"\n{table.as_markdown()}\n", flush=True)
    if write:
        print(f"written to {table.save()}\n", flush=True)
        table.plot(*PLOTS[name])


if __name__ == "__main__":
    sys.exit(main())
