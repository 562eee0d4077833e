"""Children that cannot outlive their parent, whatever ends it (Linux, PR_SET_PDEATHSIG).

- The kernel sends SIGKILL to the child when the thread that started it ends: kill -9 of the
  parent included. Start such children from the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tied_to_parent() -> Callable[[], None]:
    """What a child runs between fork and exec to be ended together with this process."""
    # Loaded here: after fork, before exec, there must be nothing left to import or look up.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we could ask to be told
            os._exit(1)

    return tie
