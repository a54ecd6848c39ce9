"""How gunicorn serves the application, both under `make run` and in the container."""

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

# From here on SIGTERM ends the master, even before gunicorn has set its own handler: see serve.py.
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

# Run, not imported: if the master had imported a module, every worker would keep that version, even
# after a reload.
_environment, _logs = (
    run_path(str(Path(__file__).with_name(name))) for name in ("environment.py", "logs.py")
)

_log = _logs["config"](_environment["log_kind"]())
dictConfig(_log)
# As text, gunicorn's own lines already look the same, so gunicorn keeps its own logging.
logconfig_dict = _log if os.environ["WEBAPP_LOG"] == "json" else {}

bind = _environment["bind_address"]()
worker_class = "gthread"
workers = _environment["set_number"]("WEB_CONCURRENCY")
threads = 8
graceful_timeout = 2
# The heartbeat files must not be on a disk, where writes can stall.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
# The socket would be in HOME, where a second instance would take it from the first.
control_socket_disable = True


def when_ready(server: Any) -> None:
    """End the master when the supervisor that started it is gone, for example killed.

    This uses a timer, which children do not inherit: forking while a thread runs in the master
    would be unsafe.
    """
    supervisor = os.environ.get("WEBAPP_SUPERVISOR")
    if supervisor is None:
        return

    def check_supervisor(signum: int, frame: FrameType | None) -> None:
        if os.getppid() != int(supervisor):
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGQUIT)

    # When Python exits, it restores the default action of SIGALRM, which kills the process.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, check_supervisor)
    signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
