"""Stops asking a server that is down, and notices when it is back.

- While open, every call fails at once with the reason the last one failed with.
- When the time is up exactly one caller goes through; the others keep failing at once until it is
  done. Its success closes the breaker, its failure opens it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from identity_ca.backends.vault.wire import VaultUnavailable

__all__ = ["CircuitBreaker"]


class CircuitBreaker:
    """Shared by all threads of one session.

    Args:
        open_seconds: how long to stay open after a failure.
        clock: seconds that never go back.
    """

    def __init__(self, open_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._open_seconds = open_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failure: VaultUnavailable | None = None
        self._open_until = 0.0
        self._probe_until = 0.0

    def enter(self, *, patience: float) -> bool:
        """Returns whether this caller is the probe after an outage; a probe should not retry.

        Args:
            patience: seconds after which a probe that never reported back is given up.

        Raises:
            VaultUnavailable: the server is known to be down.
        """
        with self._lock:
            failure = self._failure
            if failure is None:
                return False
            now = self._clock()
            waits_until = max(self._open_until, self._probe_until)
            if now >= waits_until:
                self._probe_until = now + patience
                return True
            retry_after = max(self._open_until - now, 0.05)
        raise VaultUnavailable(
            failure.message,
            hint=failure.hint,
            detail=f"not asked again yet; last: {failure.detail}" if failure.detail else "",
            retry_after=retry_after,
            status=failure.status,
            sealed=failure.sealed,
            sent=False,
        )

    def succeeded(self) -> None:
        """The server answered as a working one does."""
        if self._failure is None:  # the usual case costs no lock
            return
        with self._lock:
            self._failure = None
            self._open_until = self._probe_until = 0.0

    def failed(self, failure: VaultUnavailable) -> None:
        """The server is down, or asked for a pause (`retry_after`)."""
        with self._lock:
            pause = self._open_seconds
            if failure.status == 429 and failure.retry_after is not None:
                pause = min(max(failure.retry_after, pause), 30.0)
            self._failure = failure
            self._open_until = self._clock() + pause
            self._probe_until = 0.0
