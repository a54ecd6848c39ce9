"""A pool and worker processes: DATABASE_URL=postgresql://… python examples/processes.py

Each process opens its own connections on first use, also after a fork: they share none.
"""

from multiprocessing import get_context

import dbpool

pool = dbpool.Pool(max_size=2)


def square(number: int) -> int:
    """Return the square of a number, as the database computes it."""
    return int(pool.fetch_value("select %s::int * %s::int", [number, number]))


if __name__ == "__main__":
    with pool:
        print(square(12))  # the parent has a connection before it starts the workers
        with get_context("spawn").Pool(2) as workers:
            print(workers.map(square, range(5)))
            workers.close()
            workers.join()
