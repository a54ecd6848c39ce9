"""How gunicorn serves the application, under `make run` and in the container alike."""

import atexit
import os
import signal
import sys
from logging.config import dictConfig
from pathlib import Path
from runpy import run_path
from types import FrameType
from typing import Any

from dbpool.gunicorn import *  # noqa: F403 -- the server hooks; its __all__ holds nothing else

# From here on SIGTERM ends the master, also before it has a handler of its own: see serve.py.
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

# Run and not imported: a module that the master holds stays as it was in every worker, after a
# reload too.
_environment, _logs = (
    run_path(str(Path(__file__).with_name(name))) for name in ("environment.py", "logs.py")
)

_log = _logs["config"](_environment["log_kind"]())
dictConfig(_log)
# As text gunicorn's own lines look the same, and do not come this way.
logconfig_dict = _log if os.environ["WEBAPP_LOG"] == "json" else {}

bind = _environment["bind_address"]()
worker_class = "gthread"
workers = _environment["set_number"]("WEB_CONCURRENCY")
threads = 8
graceful_timeout = 2
# Its heartbeat file does not belong on a disk, whose writes can stall.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
# The socket would be in HOME, where a second instance takes it from the first.
control_socket_disable = True


def when_ready(server: Any) -> None:
    """End the master when the supervisor that started it is gone, killed for example.

    A timer, since a thread in the master would be forked into every worker; children inherit no
    timers.
    """
    supervisor = os.environ.get("WEBAPP_SUPERVISOR")
    if supervisor is None:
        return

    def look(signum: int, frame: FrameType | None) -> None:
        if os.getppid() != int(supervisor):
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGQUIT)

    # At its end Python gives the signals back their own meaning: this one's is to kill.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
