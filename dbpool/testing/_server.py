"""A private PostgreSQL for a test session that names none; its programs come in a wheel."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from psycopg.conninfo import make_conninfo

from dbpool.embedded import Cluster

# Nothing has to survive a crash.
_SETTINGS: Final = {
    "listen_addresses": "",  # the socket alone
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}


@contextmanager
def private_server() -> Iterator[str]:
    """Start a server; yield its connection string. It is gone afterwards, with all its data.

    Raises `dbpool.embedded.EmbeddedError`, without the wheel for example.
    """
    directory = Path(tempfile.mkdtemp(prefix="dbpool-"))
    try:
        directory.chmod(0o755)  # root's server runs as another user, who has the folders in it
        cluster = Cluster(directory / "data", directory / "socket")
        cluster.make("--auth=trust", "--no-sync")
        try:
            cluster.serve(_SETTINGS)
            yield make_conninfo("", host=str(cluster.sockets), user="postgres", dbname="postgres")
        finally:
            cluster.end()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
